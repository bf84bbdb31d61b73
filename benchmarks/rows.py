"""Measured rows: their columns, what every column may hold, and how they are appended to a CSV file.

A row is one provider on one case of one operation. It is written only after the provider's output was checked in the
same run. Files under ``benchmarks/results`` are committed; README tables and plots are made from them (tables.py).
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import math
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

from sapo_kernels.files import DataError, atomic_write, excerpt, read_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Environment:
    """Where a row was measured. `device` names the processor, `threads` torch's threads on the host."""

    date: str
    commit: str
    device: str
    driver: str
    threads: int
    python: str
    torch: str
    triton: str
    transformers: str


@dataclass(frozen=True)
class Row:
    """One provider on one case.

    op, case, provider, dtype, shape: what was run; `shape` is text such as ``K=21 M=8 V=50257``.
    rounds: how many times it was timed. p20_s, p50_s, p80_s: seconds a call.
    peak_bytes: memory above what was held before the call (device memory on a GPU, resident memory on a CPU); -1 where
        it was not read. tokens: tokens that went through the model or the operator; 0 where it has no tokens.
    work, work_unit, formula: operations (FLOP) or bytes (B) that the case needs at least, and how they are counted.
    error, tolerance: the largest difference from the oracle in the same run and what was allowed, in nats or the op's
        own unit. note: anything a reader must know.
    """

    op: str
    case: str
    provider: str
    dtype: str
    shape: str
    rounds: int
    p20_s: float
    p50_s: float
    p80_s: float
    peak_bytes: int
    tokens: int
    work: float
    work_unit: str
    formula: str
    error: float
    tolerance: float
    note: str
    environment: Environment

    def __post_init__(self):
        times = (self.p20_s, self.p50_s, self.p80_s)
        if not all(math.isfinite(t) and t > 0 for t in times) or not times[0] <= times[1] <= times[2]:
            raise DataError(f"row {self.key}: p20, p50, p80: expected ascending positive seconds, got {times}")
        if not (math.isfinite(self.error) and 0 <= self.error <= self.tolerance):
            raise DataError(f"row {self.key}: error: expected 0 to {self.tolerance}, got {self.error}")
        if not (math.isfinite(self.work) and self.work >= 0) or self.work_unit not in ("FLOP", "B", ""):
            raise DataError(f"row {self.key}: work: expected a number of FLOP or B, got {self.work} {self.work_unit}")
        if self.rounds < 1 or self.tokens < 0 or self.peak_bytes < -1:
            raise DataError(f"row {self.key}: rounds, tokens, peak_bytes: expected at least 1, 0, -1")
        for name in ("op", "case", "provider", "dtype"):
            if not re.fullmatch(r"[A-Za-z0-9_.+ ()/=,:-]{1,120}", getattr(self, name)):
                raise DataError(f"row {self.key}: {name}: expected plain text, got {excerpt(getattr(self, name))}")

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.case, self.provider


_KINDS = {"int": int, "float": float, "str": str}


def csv_text(rows: list, header: bool = True) -> str:
    """Dataclasses of one kind as CSV text; floats keep 6 significant digits, line ends inside a text become blanks."""
    text = io.StringIO()
    records = [_flat(row) for row in rows]
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    for row in records:
        writer.writerow({n: f"{v:.6g}" if isinstance(v, float) else " ".join(str(v).split()) for n, v in row.items()})
    return text.getvalue()


def _flat(row) -> dict:
    """The fields of a dataclass; those of its environment after its own."""
    found = asdict(row)
    where = found.pop("environment", {})
    return {**found, **where}


def read_csv(text: str, name: str, *kinds: type) -> list[dict]:
    """The rows of CSV text whose columns are the fields of some dataclasses; `DataError` names what does not fit."""
    types = {f.name: _KINDS[f.type] for kind in kinds for f in fields(kind) if f.type in _KINDS}
    reader, rows = csv.reader(io.StringIO(text), strict=True), []
    try:
        for number, cells in enumerate(reader):
            place = f"{name}, line {reader.line_num}"
            if number == 0:
                if cells != list(types):
                    raise DataError(f"{place}: expected the columns {list(types)}, got {excerpt(cells, 200)}")
                continue
            if len(cells) != len(types):
                raise DataError(f"{place}: expected {len(types)} columns, got {len(cells)}")
            rows.append({n: _value(n, kind, cell, place) for (n, kind), cell in zip(types.items(), cells, strict=True)})
    except csv.Error as error:
        raise DataError(f"{name}: expected CSV, got {error}") from None
    return rows


def _value(column: str, kind: type, cell: str, place: str):
    try:
        return kind(cell)
    except ValueError:
        raise DataError(f"{place}, {column}: expected {kind.__name__}, got {excerpt(cell)}") from None


def from_csv(text: str, name: str) -> list[Row]:
    """The rows of CSV text; `DataError` names file, line and column of whatever does not fit."""
    where = [f.name for f in fields(Environment)]
    rows = []
    for values in read_csv(text, name, Row, Environment):
        environment = Environment(**{column: values.pop(column) for column in where})
        rows.append(Row(**values, environment=environment))
    return rows


def read_rows(path: str | os.PathLike) -> list[Row]:
    """All rows of a file; an absent file has none."""
    if not Path(path).exists():
        return []
    return from_csv(read_text(path), os.fspath(path))


def append_rows(path: str | os.PathLike, rows: list[Row]) -> None:
    """Add rows to a CSV file: what is there stays, if it is whole, and the file is never half written.

    One writer a file: two processes that append to the same file at the same time could lose each other's rows.
    """
    path = Path(path)
    old = read_text(path) if path.exists() else ""
    from_csv(old, os.fspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, old + csv_text(rows, header=not old))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@cache
def commit() -> str:
    """The checkout's commit, with "+" if what is measured differs from it; "unknown" outside a checkout."""
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    measured = ("sapo_kernels", "csrc", "benchmarks", ":!benchmarks/results")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", *measured)
    return f"{found}{'+' if changed else ''}" if found else "unknown"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.*)", text, re.MULTILINE)
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


@cache
def _fixed(device: str) -> dict:
    import torch

    name, driver = _processor(), "none"
    if device == "cuda":
        name = torch.cuda.get_device_name()
        driver = (
            _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "unknown"
        )
    versions = {package: version(package) for package in ("triton", "transformers")}
    return {"commit": commit(), "device": name, "driver": driver, "python": platform.python_version(),
            "torch": torch.__version__, **versions}  # fmt: skip


def environment(device: str = "cpu") -> Environment:
    """This machine, now. `device` is "cpu" or "cuda"."""
    import torch

    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Environment(date=now, threads=torch.get_num_threads(), **_fixed(device))
