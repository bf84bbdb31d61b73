"""Rows of results: one small JSON file a run while they are made, one committed file a kind afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError, atomic_write, read_json, write_json

RESULTS = Path(__file__).resolve().parent / "results"
VERSION = 1


def put(work: Path, kind: str, name: str, made_by: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the rows of one finished run."""
    folder = work / kind
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", {"version": VERSION, "made_by": made_by, "rows": rows})


def done(work: Path, kind: str, name: str, made_by: dict[str, Any]) -> bool:
    """Whether this run is there, made by this configuration; rows of another one are refused, never mixed in."""
    path = work / kind / f"{name}.json"
    if not path.is_file():
        return False
    # Options of the other kind of runs decide nothing.
    other = "sequence" if kind.startswith("single") else "single"
    found = read_json(path).get("made_by", {})
    if {**found, other: None} != {**made_by, other: None}:
        raise DataError(f"{path}: expected rows of this configuration, got others; take a new --work folder")
    return True


def collect(work: Path, kind: str, made_by: dict[str, Any], results: Path = RESULTS) -> int:
    """Join the rows of all finished runs of a kind into ``results/<kind>.json``, in the order of their names."""
    rows = []
    for path in sorted((work / kind).glob("*.json")):
        if not done(work, kind, path.stem, made_by):
            raise DataError(f"{path}: went away")
        rows += read_json(path)["rows"]
    if not rows:
        return 0
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    head = json.dumps({"version": VERSION, "made_by": made_by}, indent=1)[:-2]
    results.mkdir(parents=True, exist_ok=True)
    atomic_write(results / f"{kind}.json", f'{head},\n "rows": [\n{lines}\n]\n}}\n')
    return len(rows)


def load(kind: str, results: Path = RESULTS) -> dict[str, Any]:
    """The committed rows of a kind: {"version", "made_by", "rows"}."""
    found = read_json(results / f"{kind}.json")
    if found.get("version") != VERSION or not found.get("rows"):
        raise DataError(f"{results / kind}.json: expected version {VERSION} with rows")
    return found


def rounded(value: Any) -> Any:
    """Five decimals are more than any difference that matters here."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
