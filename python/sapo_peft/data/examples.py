"""Reading examples: one way in, from files, folders of tasks, the hub and rows in memory.

A fault raises `DataError` naming the file and the row; nothing is dropped, repaired or re-worded in silence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError, excerpt

from .columns import Columns
from .names import split_file
from .tables import HUB_NAME, READERS, Table, file_type, hub_table, keys_of, rows_of, shown

# Columns whose texts say nothing about an example.
_IDENTIFIERS = {"id", "idx", "guid", "uid", "task"}


class Examples(list):
    """A list of ``{"input": str, "target": str}`` that knows where it is from; of messages, with a "history" of turns.

    `source` is the file, `columns` the names read as input and target, `total` the rows in the file, `unread`
    those after the limit (counted, not looked at), `skipped` the places of rows left out for an empty label.
    Counted among the rows kept: `duplicates` (equal to an earlier row), `conflicts` (an input that stands
    earlier with another label), `empty_inputs`, `several_targets` (several outputs, the first is used). `references`:
    all outputs of each row.
    Rows are conserved: ``total == len(self) + len(skipped) + unread``.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], source: str, columns: tuple[str, str], total: int):
        super().__init__(rows)
        self.source, self.columns, self.total = source, columns, total
        self.skipped: list[str] = []
        self.remarks: list[str] = []
        self.references: list[list[str]] = [[row["target"]] for row in self]
        self.unread = self.several_targets = 0
        self.duplicates = self.conflicts = self.empty_inputs = 0
        first: dict[str, str] = {}
        seen: set[tuple[str, str]] = set()
        for row in self:
            pair = (json.dumps([row["input"], row.get("history", [])]), row["target"])
            self.duplicates += pair in seen
            self.conflicts += first.setdefault(*pair) != row["target"]
            self.empty_inputs += not row["input"].strip()
            seen.add(pair)

    def notes(self) -> list[str]:
        """What a reader of the results should know about these rows, one sentence a kind."""
        counts = (
            (len(self.skipped), "with an empty label left out"),
            (self.duplicates, "repeat an earlier one exactly"),
            (self.conflicts, "have an input that an earlier row has with another label"),
            (self.empty_inputs, "have an empty input"),
            (self.several_targets, "have several outputs (the first one is used; an evaluation takes any)"),
        )
        notes = [f"{count} of the rows read {what}" for count, what in counts if count]
        return [f"{self.source}: {note}" for note in [*notes, *self.remarks]]


def read_examples(
    source: Any,
    input_column: str | None = None,
    target_column: str | None = None,
    limit: int | None = None,
    *,
    task: str | None = None,
    split: str = "train",
    skip_empty: bool = False,
    name: str = "rows",
) -> Examples:
    """Read (input, target) pairs.

    `source` is a ``.json`` list of rows (SuperNI, TRACE: ``sentence``/``label``), a ``.json`` object with
    ``"Instances"`` (natural-instructions), ``.jsonl``/``.ndjson``, ``.csv``/``.tsv`` with a header line, ``.parquet``,
    a task directory (its ``train.json`` is read, or another `split`), a directory of task directories with `task`,
    a dataset of the hub ("owner/name" or "owner/name:configuration"), a list of mappings or a `datasets.Dataset`
    (`name` stands for these in messages).

    Rows of ``messages`` (also ``conversations`` of ShareGPT, and ``prompt`` and ``completion`` as lists of messages)
    end with the user's and the assistant's turn, which are input and target.

    `input_column` and `target_column` are recognised by name where they are not given; several candidates are an error,
    never a guess. A row's ``instruction`` (Alpaca) is joined in front of its input, its ``choices`` or
    ``options`` below it. Labels are text; integers are taken as the names of their `ClassLabel`, as the letter of
    the choice they point at, or as their digits. An empty label (or only spaces) is an error unless `skip_empty`,
    which leaves such rows out and says so. With `limit`, reading stops after that many examples.

    Raises: `DataError` naming the file, the row and the field; `OSError` from opening and reading; `TypeError` for a
        source that is none of these, such as a stream of rows.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit: expected at least 1, got {limit}")
    if not isinstance(source, (str, os.PathLike)):
        table = rows_of(source, name)
    elif HUB_NAME.fullmatch(str(source)) and not os.path.exists(source) and Path(source).suffix not in READERS:
        table, name = hub_table(str(source), split), str(source)
    else:
        file = split_file(Path(source), task, split)
        table, name = READERS[file_type(file, READERS)](file), str(file)
    return _examples(table, (input_column, target_column), name, limit, skip_empty)


def _examples(
    table: Table, chosen: tuple[str | None, str | None], source: str, limit: int | None, skip_empty: bool
) -> Examples:
    columns, known = Columns.of(table, chosen, f"{source}: columns"), set(table.columns)
    kept, references, beside, skipped, used, numbers = [], [], [], [], 0, False
    # Columns in which no text was seen so far.
    other = [name for name in table.columns if name not in columns.used and name.lower() not in _IDENTIFIERS]
    unused: set[str] = set()
    for where, row in table.rows:
        used += 1
        place = f"{source}: {where}"
        # The columns are those of the first row; a later one may have another pair.
        names = keys_of(row, place)
        other_pair = not known.issuperset(names) and {columns.input, columns.target} <= set(names)
        if other_pair and Columns.of(table._replace(columns=names), chosen, place) != columns:
            raise DataError(f"{place}: expected the columns of the first row, got {shown(names)}")
        example, targets, around = columns.read(row, place)
        if not targets[0].strip():
            if not skip_empty:
                raise DataError(f"{place}: expected a label in {excerpt(columns.target)}, got an empty one")
            skipped.append(where)
            continue
        kept.append(example)
        references.append(targets)
        beside.append(around)
        numbers |= isinstance(row.get(columns.target), int)
        known_too = unused | ({"history"} & example.keys())
        unused |= {name for name in other if name not in known_too and _has_words(row.get(name))}
        if len(kept) == limit:
            break
    if not kept:
        raise DataError(f"{source}: expected at least one row with a label, got {table.total} rows and none")
    joined = columns.join(kept, beside)
    examples = Examples(kept, source, (columns.input, columns.target), table.total)
    examples.skipped, examples.references, examples.unread = skipped, references, table.total - used
    examples.several_targets = sum(len(targets) > 1 for targets in references)
    examples.remarks = joined + columns.notes([name for name in other if name in unused], numbers)
    return examples


def _has_words(value: Any) -> bool:
    if isinstance(value, str):
        return any(character.isalpha() for character in value)
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(isinstance(one, (str, list, dict)) and _has_words(one) for one in values)
