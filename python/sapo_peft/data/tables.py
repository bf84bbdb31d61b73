"""Rows with named columns: JSON, JSONL, CSV, Parquet, datasets of the Hugging Face hub, and rows in memory.

Text files are read with the standard library and not with `datasets`, which reads the label "None" of a CSV file as
missing and "007" as 7, shifts the columns of a row with a cell too many, and turns JSON strings into dates.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sapo_kernels.files import DataError, excerpt, parse_json, read_json, read_text

from ..hub import hub_answers

MAX_DATA_BYTES = 256 * 2**20
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?::[\w.-]+)?")


class Table(NamedTuple):
    """Columns, number of rows, and the rows one by one with their places ("row 3", "line 4").

    `label_names`: of columns whose integers stand for names, the function from one to the other.
    """

    columns: list[str]
    total: int
    rows: Iterator[tuple[str, Any]]
    label_names: Mapping[str, Callable[[int], str]] = {}


def _json_rows(file: Path) -> Table:
    try:
        document = read_json(file, max_bytes=MAX_DATA_BYTES)
    except DataError as error:
        hint = " (if every line is one JSON object, name the file .jsonl)" if "Extra data" in str(error) else ""
        raise DataError(f"{error}{hint}") from None
    if isinstance(document, dict) and isinstance(document.get("Instances"), list):
        document = document["Instances"]
    if not isinstance(document, list) or not document:
        raise DataError(f"{file}: expected a list of rows or an object with 'Instances', got {excerpt(document)}")
    return rows_of(document, str(file))


def _json_lines(file: Path) -> Table:
    text = read_text(file, max_bytes=MAX_DATA_BYTES)
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{file}: expected one JSON object a line, got an empty file")
    place = f"{file}: {lines[0][0]}"
    columns = keys_of(parse_json(lines[0][1], place), place)
    return Table(columns, len(lines), ((where, parse_json(line, f"{file}: {where}")) for where, line in lines))


def _csv(file: Path) -> Table:
    text = read_text(file, max_bytes=MAX_DATA_BYTES)
    head = text.split("\n", 1)[0]
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ";" if ";" in head and "," not in head else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(f"line {reader.line_num}", cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num}: not valid CSV: {error}") from None
    if not rows:
        raise DataError(f"{file}: expected a header line and rows, got an empty file")
    columns = rows.pop(0)[1]
    if len(set(columns)) != len(columns):
        raise DataError(f"{file}: line 1: expected each column once, got {excerpt(columns)}")

    def named() -> Iterator[tuple[str, Any]]:
        for where, cells in rows:
            if len(cells) != len(columns):
                raise DataError(f"{file}: {where}: expected {len(columns)} cells, got {len(cells)}")
            yield where, dict(zip(columns, cells, strict=True))

    return Table(columns, len(rows), named())


def _parquet(file: Path) -> Table:
    import datasets
    from pyarrow import ArrowException, parquet

    try:
        found = parquet.read_metadata(file)
        size = sum(found.row_group(index).total_byte_size for index in range(found.num_row_groups))
        if size > MAX_DATA_BYTES:
            raise DataError(f"{file}: expected at most {MAX_DATA_BYTES} bytes, got {size}")
        return rows_of(datasets.Dataset(parquet.read_table(file)), str(file))
    except ArrowException as error:
        raise DataError(f"{file}: expected a Parquet file, got: {excerpt(str(error), 200)}") from None


READERS: dict[str, Callable[[Path], Table]] = {
    ".json": _json_rows,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def hub_table(name: str, split: str) -> Table:
    """A split of a dataset on the hub, "owner/name" or "owner/name:configuration"; nothing in it is executed."""
    import datasets

    path, _, configuration = name.partition(":")
    offline = not hub_answers(path, "dataset")
    # It looks at what is cached at once where it is told that there is no network.
    kept, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, offline or datasets.config.HF_HUB_OFFLINE
    try:
        found = datasets.load_dataset(path, configuration or None, split=split)
    except Exception as error:
        if offline:
            raise DataError(f"{name}: no such file, and the hub does not answer") from None
        text = " ".join(str(error).split())
        raise DataError(f"{name}: no such file, and not loaded from the hub: {excerpt(text, 300)}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = kept
    return rows_of(found, name)


def rows_of(rows: Any, source: str) -> Table:
    """Rows in memory: a sequence of mappings or a `datasets.Dataset`.

    Raises: `DataError` for no rows or a first row that is no mapping; `TypeError` for anything else, such as a stream.
    """
    sized = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    if not sized or isinstance(rows, (str, bytes, Mapping)):
        raise TypeError(f"{source}: expected a list of rows or a Dataset, got {type(rows).__name__}")
    if not len(rows):
        raise DataError(f"{source}: expected at least one row, got none")
    features = getattr(rows, "features", None) or {}
    names = {column: kind.int2str for column, kind in features.items() if hasattr(kind, "int2str")}
    columns = list(features) or keys_of(rows[0], f"{source}: row 0")
    return Table(columns, len(rows), ((f"row {index}", row) for index, row in enumerate(rows)), names)


def file_type(file: Path, known: Iterable[str]) -> str:
    """The ending of a file's name, one of `known`."""
    suffix = file.suffix.lower()
    if suffix not in known:
        raise DataError(f"{file}: expected a file name ending in {', '.join(known)}, got {excerpt(suffix)}")
    return suffix


def keys_of(row: Any, place: str) -> list[str]:
    """The column names of one row."""
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: expected an object, got {excerpt(row)}")
    return list(row)


def shown(names: Sequence[str]) -> str:
    """Column names inside a message."""
    return ", ".join(map(excerpt, names[:20]))
