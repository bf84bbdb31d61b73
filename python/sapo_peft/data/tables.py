"""Rows of JSON, JSONL and CSV files as tables with named columns; parsed one row at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError, excerpt, parse_json, read_json, read_text

MAX_DATA_BYTES = 256 * 2**20
MAX_FIELD_CHARS = 131_072  # also the limit of Python's csv module

INPUT_COLUMNS = ("input", "sentence", "text", "question", "prompt")
TARGET_COLUMNS = ("target", "label", "output", "answer")
Chosen = tuple[str | None, str | None]


@dataclass
class Table:
    """Rows of a file, parsed one at a time: `parse(row, place)` gives the mapping, `where(i)` its place."""

    rows: Sequence[Any]
    columns: tuple[str, str]
    parse: Callable[[Any, str], Any] = lambda row, place: row
    lines: Sequence[int] | None = None

    def where(self, index: int) -> str:
        return f"row {index}" if self.lines is None else f"line {self.lines[index]}"


def _read_json_rows(file: Path, chosen: Chosen) -> Table:
    try:
        document = read_json(file, max_bytes=MAX_DATA_BYTES)
    except DataError as error:
        if "Extra data" in str(error):
            raise DataError(f"{error} (if every line is one JSON object, name the file .jsonl)") from None
        raise
    if isinstance(document, dict) and isinstance(document.get("Instances"), list):
        document, chosen = document["Instances"], (chosen[0] or "input", chosen[1] or "output")
    if not isinstance(document, list) or not document:
        wanted = "a list of rows or an object with 'Instances'"
        raise DataError(f"{file}: wanted {wanted}, got {excerpt(document)}")
    return Table(document, _columns(_keys(document[0], f"{file}: row 0"), chosen, f"{file}: row 0"))


def _read_json_lines(file: Path, chosen: Chosen) -> Table:
    text = read_text(file, max_bytes=MAX_DATA_BYTES)
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise DataError(f"{file}: wanted one JSON object a line, got an empty file")
    place = f"{file}: line {numbered[0][0]}"
    columns = _columns(_keys(parse_json(numbered[0][1], place), place), chosen, place)
    return Table([line for _, line in numbered], columns, parse_json, [number for number, _ in numbered])


def _read_csv(file: Path, chosen: Chosen) -> Table:
    text = read_text(file, max_bytes=MAX_DATA_BYTES)
    header_line = text.split("\n", 1)[0]
    semicolon = ";" in header_line and "," not in header_line
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ";" if semicolon else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        numbered = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num}: not valid CSV: {error}") from None
    if not numbered:
        raise DataError(f"{file}: wanted a header line and rows, got an empty file")
    header = numbered.pop(0)[1]
    if len(set(header)) != len(header):
        raise DataError(f"{file}: line 1: wanted each column once, got {excerpt(header)}")

    def parse(cells: list[str], place: str) -> dict[str, str]:
        if len(cells) != len(header):
            raise DataError(f"{place}: wanted {len(header)} cells, got {len(cells)}")
        return dict(zip(header, cells, strict=True))

    columns = _columns(header, chosen, f"{file}: line 1")
    return Table([cells for _, cells in numbered], columns, parse, [number for number, _ in numbered])


READERS: dict[str, Callable[[Path, Chosen], Table]] = {
    ".json": _read_json_rows,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}


def table_of(rows: Any, source: str, chosen: Chosen) -> Table:
    """Rows in memory: a sequence of mappings, or a `datasets.Dataset`."""
    place = f"{source}: row 0"
    names = getattr(rows, "column_names", None)
    return Table(rows, _columns(list(names) if names is not None else _keys(rows[0], place), chosen, place))


def file_type(file: Path, known: Iterable[str]) -> str:
    suffix = file.suffix.lower()
    if suffix not in known:
        raise DataError(f"{file}: wanted a file name ending in {', '.join(known)}, got {excerpt(suffix)}")
    return suffix


def _keys(row: Any, place: str) -> list[str]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: wanted an object, got {excerpt(row)}")
    return list(row)


def _columns(names: list[str], chosen: Chosen, place: str) -> tuple[str, str]:
    for pair in (("input", "target"), ("sentence", "label")):
        if chosen == (None, None) and set(pair) <= set(names):
            return pair
    result = []
    for what, column, known in zip(("input", "target"), chosen, (INPUT_COLUMNS, TARGET_COLUMNS), strict=True):
        candidates = [column] if column else [name for name in known if name not in chosen]
        found = [name for name in candidates if name in names]
        if len(found) != 1:
            wanted = excerpt(column) if column else f"(exactly one of {', '.join(known)})"
            got = ", ".join(map(excerpt, names[:20]))
            raise DataError(f"{place}: wanted the {what} column {wanted}, got the columns {got}")
        result += found
    if result[0] == result[1]:
        raise DataError(f"{place}: wanted two different columns, got {excerpt(result[0])} for both")
    return result[0], result[1]


def text_and_targets(row: Any, columns: tuple[str, str], place: str) -> tuple[str, list[str]]:
    """Input text and the target texts (several only where an ``output`` list holds several)."""
    for column in columns:
        if column not in _keys(row, place):
            got = ", ".join(map(excerpt, list(row)[:20])) or "an empty object"
            raise DataError(f"{place}: wanted the field {excerpt(column)}, got {got}")
    source, target = (row[column] for column in columns)
    targets = target if isinstance(target, list) and columns[1] == "output" else [target]
    if not targets:
        raise DataError(f"{place}: wanted a label in {excerpt(columns[1])}, got an empty list")
    check_text(source, f"{place}: {excerpt(columns[0])}")
    for text in targets:
        check_text(text, f"{place}: {excerpt(columns[1])}")
    return source, targets


def check_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: wanted text, got {type(value).__name__} {excerpt(value)}")
    if len(value) > MAX_FIELD_CHARS:
        raise DataError(f"{place}: wanted at most {MAX_FIELD_CHARS} characters, got {len(value)}")
    return value
