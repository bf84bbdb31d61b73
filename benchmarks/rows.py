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
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

from sapo_kernels.files import DataError, atomic_write, read_text

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
    peak_bytes: int = -1
    tokens: int = 0
    work: float = 0.0
    work_unit: str = ""
    formula: str = ""
    error: float = 0.0
    tolerance: float = 0.0
    note: str = ""
    environment: Environment = field(default_factory=lambda: environment())

    def __post_init__(self):
        times, name = (self.p20_s, self.p50_s, self.p80_s), f"{self.op}, {self.case}: {self.provider}"
        if not 0 < times[0] <= times[1] <= times[2] < math.inf:
            raise DataError(f"{name}: expected ascending positive seconds, got {times}")
        if not (self.rounds >= 1 and 0 <= self.error <= self.tolerance):
            raise DataError(f"{name}: expected an error within {self.tolerance}, got {self.error}")


_KINDS = {"int": int, "float": float, "str": str}


def csv_text(rows: list, header: bool = True) -> str:
    """Dataclasses of one kind as CSV text; floats keep 6 significant digits, line ends inside a text become blanks.

    The fields of an environment stand after the row's own.
    """
    text = io.StringIO()
    for row in rows:
        record = asdict(row)
        record |= record.pop("environment", {})
        writer = csv.DictWriter(text, list(record), lineterminator="\n")
        if header and row is rows[0]:
            writer.writeheader()
        writer.writerow(
            {n: f"{v:.6g}" if isinstance(v, float) else " ".join(str(v).split()) for n, v in record.items()}
        )
    return text.getvalue()


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def read_csv(path: Path, *kinds: type) -> list[dict]:
    """The rows of a file whose columns are the fields of some dataclasses; `DataError` says what does not fit."""
    types = {one.name: _KINDS[one.type] for kind in kinds for one in fields(kind) if one.type in _KINDS}
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    try:
        if list(reader.fieldnames or ()) != list(types):
            raise ValueError(f"expected the columns {list(types)}, got {reader.fieldnames}")
        return [{name: kind(cells[name]) for name, kind in types.items()} for cells in reader]
    except (csv.Error, ValueError, TypeError) as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; an absent file has none."""
    where, rows = [one.name for one in fields(Environment)], []
    for values in read_csv(path, Row, Environment) if path.exists() else ():
        environment = Environment(**{column: values.pop(column) for column in where})
        rows.append(Row(**values, environment=environment))
    return rows


def append_rows(path: Path, rows: list[Row]) -> None:
    """Add rows to a CSV file: what is there stays, if it is whole, and the file is never half written.

    One writer a file: two processes that append to the same file at the same time could lose each other's rows.
    """
    old = read_rows(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (read_text(path) if old else "") + csv_text(rows, header=not old))


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


@cache
def _fixed(device: str) -> dict:
    import torch

    if device == "cuda":
        name = torch.cuda.get_device_name()
        found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = found.split("\n")[0] or "unknown"
    else:
        processor = re.search(r"model name\s*:\s*(.*)", _output("cat", "/proc/cpuinfo"))
        name = f"{processor[1] if processor else platform.machine()}, {os.cpu_count()} cores"
        driver = "none"
    versions = {package: version(package) for package in ("triton", "transformers")}
    return {"commit": commit(), "device": name, "driver": driver, "python": platform.python_version(),
            "torch": torch.__version__, **versions}  # fmt: skip


def environment(device: str = "cpu") -> Environment:
    """This machine, now. `device` is "cpu" or "cuda"."""
    import torch

    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Environment(date=now, threads=torch.get_num_threads(), **_fixed(device))
