"""The tasks of a sequence: rows of train and test, the pool of prompts, and what is to be known about the data."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from sapo_kernels.files import DataError, excerpt, read_json

from ..data.examples import Examples, read_examples
from ..data.names import DATA_FOLDERS, TaskNameError
from ..data.prompt_pool import PromptPool
from ..data.schema import validated
from ..data.tables import READERS
from .config import MAX_NAME, MAX_TASKS

_STAGE = re.compile(r"(\d{1,4})-.+", re.DOTALL)


class _Entry(BaseModel):
    """A task in a file of an order."""

    model_config = ConfigDict(strict=True)
    dataset_name: str
    strategy: Literal["full"] = Field("full", alias="sampling strategy")


class _Entries(RootModel):
    root: list[_Entry]


@dataclass(frozen=True)
class SequenceTask:
    """One task: made by `build`, `read_order` or `read_tasks`.

    name: unique in its sequence. pool: the prompts, the original first. train, test: rows with "input" and "target",
    those with an empty label left out. rows: how many each file has, whatever was left out. references: all targets of
    each test row, of which an answer needs to meet one. notes: sentences about the data: rows left out, duplicates,
    conflicting labels, test rows that stand in train.
    """

    name: str
    pool: PromptPool
    train: tuple[dict[str, str], ...]
    test: tuple[dict[str, str], ...]
    rows: Mapping[str, int]
    references: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def build(cls, name: str, train: Any, test: Any, pool: PromptPool) -> SequenceTask:
        """A task of what `read_examples` returns, or reads: files, lists of mappings, HF `Dataset` objects.

        Raises: `DataError` naming the split, the row and the field; `TypeError` for a pool or rows of another kind.
        """
        if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable():
            raise DataError(f"task: expected a printable name of 1 to {MAX_NAME} characters, got {excerpt(name)}")
        if not isinstance(pool, PromptPool):
            raise TypeError(f"task {excerpt(name)}: pool: expected a PromptPool, got {type(pool).__name__}")
        read = {}
        for split, rows in (("train", train), ("test", test)):
            place = f"task {excerpt(name)}: {split}"
            if rows is None:
                raise DataError(f"{place}: expected rows, got none")
            done = isinstance(rows, Examples)
            read[split] = rows if done else read_examples(rows, skip_empty=True, name=place)
        notes = [note for split in read.values() for note in split.notes()]
        notes += leaks(read["train"], read["test"])
        rows = {split: found.total for split, found in read.items()}
        references = tuple(map(tuple, read["test"].references))
        return cls(name, pool, tuple(read["train"]), tuple(read["test"]), rows, references, tuple(notes))

    def used(self, train_examples: int | None, test_examples: int | None) -> SequenceTask:
        """This task with at most so many rows of each split, the first ones."""
        test = slice(test_examples)
        return replace(self, train=self.train[:train_examples], test=self.test[test], references=self.references[test])

    def digest(self) -> str:
        """Fingerprint of the rows and the prompts."""
        pool = self.pool
        texts = [self.name, pool.suffix, pool.text_word, pool.prompts, self.train, self.test, self.references]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def leaks(train: Sequence[Mapping[str, str]], test: Sequence[Mapping[str, str]]) -> list[str]:
    """Sentences about test rows that stand in the training rows too."""
    labels: dict[str, set[str]] = {}
    for row in train:
        labels.setdefault(row["input"], set()).add(row["target"])
    known = [row for row in test if row["input"] in labels]
    same = sum(row["target"] in labels[row["input"]] for row in known)
    counts = (
        (same, "are in train too, with the same label"),
        (len(known) - same, "are in train too, with another label"),
    )
    return [f"{count} of {len(test)} test rows {what}" for count, what in counts if count]


def read_order(data: str | os.PathLike, order: str, prompts: str | os.PathLike | None = None) -> list[SequenceTask]:
    """The tasks of an order in SuperNI or TRACE layout.

    The order is ``CL_configs/order/<order>/<N>-<anything>/{train,dev,test}_tasks.json`` in `data` or beside it; each
    stage trains on one task, whose folder of that exact name is in `data`, ``data/SUPERNI`` or ``data/TRACE``.
    Prompts are looked up as `read_prompts` does, from `prompts` if given, else from `data`.

    Raises: `DataError` naming the file, what was expected and what was got.
    """
    data = Path(data)
    stages = _stages(_order_folder(data, order))
    names = []
    for stage in stages:
        trained = _dataset_names(stage / "train_tasks.json")
        if len(trained) != 1 or trained[0] in names:
            expected = "one task to train on, which no earlier stage has"
            raise DataError(f"{stage / 'train_tasks.json'}: expected {expected}, got {excerpt(trained)}")
        names += trained
    tasks = read_tasks(data, names, prompts)
    for file in (stage / "test_tasks.json" for stage in stages):
        if other := set(_dataset_names(file)) - set(names):
            raise DataError(f"{file}: expected tasks that the order trains on, got {excerpt(min(other))}")
    return tasks


def read_tasks(
    data: str | os.PathLike, names: Sequence[str], prompts: str | os.PathLike | None = None
) -> list[SequenceTask]:
    """The tasks of these names, in this order: a folder each with train and test.

    data: the folder with the tasks' own folders; files of a split are .json, .jsonl, .ndjson, .csv, .tsv or .parquet.
    prompts: what `PromptPool.read` reads, where the paraphrases are not in `data`.

    Raises: `DataError` naming the file or folder, what was expected and what was got.
    """
    if not 1 <= len(names) <= MAX_TASKS:
        raise DataError(f"tasks: expected 1 to {MAX_TASKS}, got {len(names)}")
    data = Path(data)
    # A name never becomes a path.
    roots = [data / part for part in DATA_FOLDERS if (data / part).is_dir()]
    folders = [sub for root in roots for sub in sorted(root.iterdir()) if sub.is_dir()]
    tasks = []
    for name in names:
        found = [folder for folder in folders if folder.name == name]
        if len(found) != 1:
            some = ", ".join(map(excerpt, sorted({folder.name for folder in folders})[:5]))
            got = ", ".join(map(str, found)) or f"none (there are: {some}, ...)"
            raise TaskNameError(f"{data}: expected one folder with the exact name {excerpt(name)}, got {got}")
        pool = PromptPool.read(data if prompts is None else prompts, name, needs_original=True)
        files = (_split_file(found[0], split) for split in ("train", "test"))
        tasks.append(SequenceTask.build(name, *files, pool))
    return tasks


def _order_folder(data: Path, order: str) -> Path:
    places = [base / "CL_configs" / "order" for base in (data.resolve().parent, data)]
    known = {sub.name: sub for place in places if place.is_dir() for sub in place.iterdir() if sub.is_dir()}
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
    return [entry.dataset_name for entry in validated(_Entries, read_json(file), str(file)).root]


def _split_file(folder: Path, split: str) -> Path:
    files = [file for file in (folder / f"{split}{suffix}" for suffix in READERS) if file.is_file()]
    if len(files) != 1:
        got = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{folder}: expected one file {split} ({', '.join(READERS)}), got {got}")
    return files[0]
