"""The tasks of a sequence: rows of train and test, the pool of prompts, and what is to be known about the data."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError, excerpt, read_json

from ..data.examples import Examples, read_examples
from ..data.names import DATA_FOLDERS, TaskNameError
from ..data.prompt_pool import PromptPool
from ..data.tables import READERS

MAX_ORDER_BYTES = 2**20
# What the report of a run has room for.
MAX_TASKS = 256
MAX_NAME = 300
_STAGE = re.compile(r"(\d{1,4})-.+", re.DOTALL)


@dataclass(frozen=True)
class SequenceTask:
    """One task: made by `build`, `read_order` or `read_tasks`.

    name: unique in its sequence. pool: the prompts, the original first. train, test: rows with "input" and "target",
    those with an empty label left out. rows: how many each file has, whatever was left out. notes: sentences about the
    data: rows left out, duplicates, conflicting labels, test rows that stand in train.
    """

    name: str
    pool: PromptPool
    train: tuple[dict[str, str], ...]
    test: tuple[dict[str, str], ...]
    rows: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @classmethod
    def build(
        cls,
        name: str,
        train: Any,
        test: Any,
        pool: PromptPool,
        dev: Any = None,
        *,
        input_column: str | None = None,
        target_column: str | None = None,
    ) -> SequenceTask:
        """A task of files (.json, .jsonl, .csv, .tsv), lists of mappings or HF `Dataset` objects.

        Columns that are not given are recognised by name, see `read_examples`. `dev` is counted only.

        Raises: `DataError` naming the split, the row and the field; `TypeError` for a pool or rows of another kind.
        """
        if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable():
            raise DataError(f"task: expected a printable name of 1 to {MAX_NAME} characters, got {excerpt(name)}")
        if not isinstance(pool, PromptPool):
            raise TypeError(f"task {excerpt(name)}: pool: expected a PromptPool, got {type(pool).__name__}")
        columns = (input_column, target_column)
        splits = {"train": train, "dev": dev, "test": test}
        read = {split: _rows(rows, name, split, columns) for split, rows in splits.items() if rows is not None}
        for split in ("train", "test"):
            if split not in read:
                raise DataError(f"task {excerpt(name)}: {split}: expected rows, got none")
        notes = [note for split in read.values() for note in split.notes()]
        notes += leaks(read["train"], read["test"])
        rows = {split: read[split].total if split in read else 0 for split in splits}
        return cls(name, pool, tuple(read["train"]), tuple(read["test"]), rows, tuple(notes))

    def used(self, train_examples: int | None, test_examples: int | None) -> SequenceTask:
        """This task with the first so many rows of each split."""
        return replace(self, train=self.train[:train_examples], test=self.test[:test_examples])

    def digest(self) -> str:
        """Fingerprint of the rows and the prompts."""
        found = hashlib.sha256()
        texts = [self.name, self.pool.suffix, self.pool.text_word, *self.pool.prompts]
        for rows in (self.train, self.test):
            texts += ["\0"] + [row[key] for row in rows for key in ("input", "target")]
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            found.update(len(data).to_bytes(8, "little") + data)
        return found.hexdigest()[:16]


def leaks(train: Sequence[Mapping[str, str]], test: Sequence[Mapping[str, str]]) -> list[str]:
    """Sentences about test rows that stand in the training rows too."""
    labels: dict[str, set[str]] = {}
    for row in train:
        labels.setdefault(row["input"], set()).add(row["target"])
    known = [row for row in test if row["input"] in labels]
    same = sum(row["target"] in labels[row["input"]] for row in known)
    counts = ((same, "stand in train with the same label"), (len(known) - same, "stand in train with another label"))
    return [f"{count} of {len(test)} test rows {what}" for count, what in counts if count]


def read_order(data: str | os.PathLike, order: str, prompts: str | os.PathLike | None = None) -> list[SequenceTask]:
    """The tasks of an order in SuperNI or TRACE layout.

    The order is ``CL_configs/order/<order>/<N>-<anything>/{train,dev,test}_tasks.json`` in `data` or beside it; each
    stage trains on one task, whose folder of that exact name lies in `data`, ``data/SUPERNI`` or ``data/TRACE``.
    Prompts are looked up as `read_prompts` does, from `prompts` if given, else from `data`.

    Raises: `DataError` naming the file, what was wanted and what was got.
    """
    data = Path(data)
    folder = _order_folder(data, order)
    names = [_one_task(stage / "train_tasks.json") for stage in _stages(folder)]
    repeated = [name for index, name in enumerate(names) if name in names[:index]]
    if repeated:
        raise DataError(f"{folder}: expected each task once, got {excerpt(repeated[0])} twice")
    tasks = read_tasks(data, names, prompts)
    for stage in _stages(folder):
        for split in ("test", "dev"):
            file = stage / f"{split}_tasks.json"
            other = set(_dataset_names(file)) - set(names) if split == "test" or file.exists() else set()
            if other:
                raise DataError(f"{file}: expected tasks that the order trains on, got {excerpt(min(other))}")
    return tasks


def read_tasks(
    data: str | os.PathLike, names: Sequence[str], prompts: str | os.PathLike | None = None
) -> list[SequenceTask]:
    """The tasks of these names, in this order: a folder each with train, test and perhaps dev.

    data: the folder with the tasks' own folders; files of a split are .json, .jsonl, .ndjson, .csv or .tsv. prompts:
    what `PromptPool.read` reads, where the paraphrases do not lie in `data`.

    Raises: `DataError` naming the file or folder, what was wanted and what was got.
    """
    if not 1 <= len(names) <= MAX_TASKS:
        raise DataError(f"tasks: expected 1 to {MAX_TASKS}, got {len(names)}")
    folders = _task_folders(Path(data))
    tasks = []
    for name in names:
        if name not in folders:
            some = ", ".join(excerpt(one) for one in sorted(folders)[:5]) or "none"
            raise TaskNameError(f"{data}: expected a folder with the exact name {excerpt(name)}, got {some}, ...")
        if len(folders[name]) > 1:
            got = ", ".join(map(str, folders[name]))
            raise TaskNameError(f"{data}: expected one folder {excerpt(name)}, got {got}")
        folder = folders[name][0]
        files = {split: _split_file(folder, split, needed=split != "dev") for split in ("train", "dev", "test")}
        tasks.append(SequenceTask.build(name, files["train"], files["test"], _pool(data, name, prompts), files["dev"]))
    return tasks


def _pool(data: str | os.PathLike, name: str, prompts: str | os.PathLike | None) -> PromptPool:
    source = data if prompts is None else prompts
    return PromptPool.read(source, name, needs_original=True)


def _rows(rows: Any, name: str, split: str, columns: tuple[str | None, str | None]) -> Examples:
    if isinstance(rows, Examples):
        return rows
    return read_examples(rows, *columns, skip_empty=True, name=f"task {excerpt(name)}: {split}")


def _order_folder(data: Path, order: str) -> Path:
    if not data.is_dir():
        raise DataError(f"{data}: expected a folder with tasks, got {'a file' if data.exists() else 'no such folder'}")
    places = [base / "CL_configs" / "order" for base in (data, data.resolve().parent)]
    known: dict[str, Path] = {}
    for place in places:
        if place.is_dir():
            # A name never becomes a path.
            for sub in sorted(place.iterdir()):
                if sub.is_dir():
                    known.setdefault(sub.name, sub)
    if order not in known:
        names = ", ".join(map(excerpt, sorted(known)[:10])) or "none"
        raise DataError(f"{data}: expected an order in CL_configs/order, got {excerpt(order)} (there are: {names})")
    return known[order]


def _stages(folder: Path) -> list[Path]:
    numbered = [(_STAGE.fullmatch(sub.name), sub) for sub in folder.iterdir() if sub.is_dir()]
    stages = sorted((int(match[1]), sub) for match, sub in numbered if match)
    if not stages or [number for number, _ in stages] != list(range(1, len(stages) + 1)):
        got = ", ".join(excerpt(sub.name) for _, sub in stages[:20]) or "none"
        raise DataError(f"{folder}: expected folders 1-..., 2-..., with no number missing or twice, got {got}")
    return [sub for _, sub in stages]


def _dataset_names(file: Path) -> list[str]:
    entries = read_json(file, max_bytes=MAX_ORDER_BYTES)
    if not isinstance(entries, list):
        raise DataError(f"{file}: expected a list of tasks, got {excerpt(entries)}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("dataset_name"), str):
            raise DataError(f"{file}: task {index}: expected an object with 'dataset_name', got {excerpt(entry)}")
        strategy = entry.get("sampling strategy", "full")
        if strategy != "full":
            raise DataError(f"{file}: task {index}: 'sampling strategy': expected 'full', got {excerpt(strategy)}")
    return [entry["dataset_name"] for entry in entries]


def _one_task(file: Path) -> str:
    names = _dataset_names(file)
    if len(names) != 1:
        raise DataError(f"{file}: expected one task to train on, got {len(names)}")
    return names[0]


def _task_folders(data: Path) -> dict[str, list[Path]]:
    if not data.is_dir():
        raise DataError(f"{data}: expected a folder with tasks, got {'a file' if data.exists() else 'no such folder'}")
    found: dict[str, list[Path]] = {}
    for root in (data / part for part in DATA_FOLDERS):
        if root.is_dir():
            for sub in root.iterdir():
                if sub.is_dir() and sub.name not in (*DATA_FOLDERS, "CL_configs"):
                    found.setdefault(sub.name, []).append(sub)
    return found


def _split_file(folder: Path, split: str, needed: bool) -> Path | None:
    files = [file for file in (folder / f"{split}{suffix}" for suffix in READERS) if file.is_file()]
    if len(files) > 1 or (needed and not files):
        got = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{folder}: expected one file {split} ({', '.join(READERS)}), got {got}")
    return files[0] if files else None
