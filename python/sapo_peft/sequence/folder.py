"""The folder of a sequence run: a lock, manifests, a task published by one rename, and what a second start finds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sapo_kernels.files import DataError, atomic_write, excerpt, parse_json
from sapo_kernels.manifest import MANIFEST, TEMPORARY, check_manifest, flush_folder, settle_manifest, write_manifest

from ..locks import alone
from .results import results_of
from .schema import MEASURES, Evaluation, FinishedTask, RunRecord, Scores, TaskData, Training, read

RUN, TASK = "sapo_sequence", "sapo_sequence_task"
_FILES = {"run.json", "before.json", "results.json", "tasks"}
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Run:
    """A run's folder. before: None where it was not evaluated; tasks: those that are done, in order."""

    path: Path
    record: RunRecord
    before: Evaluation | None
    tasks: list[FinishedTask]

    @property
    def finished(self) -> bool:
        return self.record.status == "done"

    @cached_property
    def results(self) -> dict[str, Any]:
        return results_of(self.record.tasks, self.before, self.tasks)

    @property
    def measures(self) -> list[str]:
        """Those of `MEASURES` that it has, after a task is done; the first is its headline."""
        return [name for name in MEASURES if self.tasks and name in self.results["metrics"]]

    def figure(self, measure: str, metric: str) -> Any:
        """ "R", "AP", "BWT" or "FWT" of a measure, None if it is not known."""
        return self.results["metrics"][measure][metric] if measure in self.measures else None


def task_folder(run: Path, index: int, name: str) -> Path:
    """``tasks/01-NAME`` of a run: what a file name may hold of the task's name."""
    return run / "tasks" / f"{index:02d}-{_UNSAFE.sub('_', name)[:100]}"


def read_run(path: str | os.PathLike, locked: bool = False) -> Run:
    """A run that is done, or what is there of one that is going on; its files are as they were written.

    locked: no other process writes to it, and it is going to be resumed.

    Raises: `DataError` naming what is damaged, missing or unexpected; `OSError`.
    """
    path = Path(path)
    record = read(RunRecord, path / "run.json")
    whole = locked or record.status == "done"
    if whole:
        check_manifest(path, RUN, skip=_foreign)
    before = read(Evaluation, path / "before.json") if (path / "before.json").exists() else None
    folders = [task_folder(path, index, name) for index, name in enumerate(record.tasks, 1)]
    count = next((i for i, folder in enumerate(folders) if not folder.is_dir()), len(folders))
    if later := [folder for folder in folders[count:] if folder.is_dir()]:
        raise DataError(f"{folders[count]}: expected this task, as {later[0].name} is done, got no folder")
    if record.status == "done" and count < len(folders):
        raise DataError(f"{folders[count]}: expected this task of a finished run, got no folder")
    tasks = []
    for folder in folders[:count]:
        # The whole of a run that is going on may change between two looks at it, a task never does.
        if not whole:
            check_manifest(folder, TASK)
        kinds = {"scores": Scores, "metrics": Evaluation, "train": Training, "data": TaskData}
        tasks.append(FinishedTask(**{name: read(kind, folder / f"{name}.json") for name, kind in kinds.items()}))
    for found in (before, *(task.metrics for task in tasks)):
        if found and len(found.examples) != len(record.tasks):
            raise DataError(f"{path}: expected scores of {len(record.tasks)} tasks, got {len(found.examples)}")
    return Run(path, record, before, tasks)


class RunFolder:
    """A run's folder while one process works in it; `path` None keeps nothing on disk.

    found: what an earlier start left there, whole and checked, or None.
    """

    def __init__(self, path: Path | None):
        self.path, self.found = path, None
        if path is None:
            return
        # What a run that was killed left.
        for left in path.glob(TEMPORARY):
            left.unlink()
        if (path / "run.json").exists():
            self.found = read_run(path, locked=True)
            for left in path.glob("tasks/.*"):
                shutil.rmtree(left)
            settle_manifest(path, RUN, skip=_foreign)
            return
        # A run that was killed before its first file may have left its manifest.
        other = sorted(one.name for one in path.iterdir() if one.name not in (".lock", MANIFEST))
        if other:
            raise DataError(f"{path}: expected an empty folder or one of a run, got {excerpt(other[0])} in it")

    def write(self, documents: dict[str, BaseModel | dict], staging: Path | None = None) -> None:
        """Put the documents in their files, and a task that was staged in its place.

        All of it is announced in the manifest first: killed in between, the folder is sound, and old or new in each
        of its parts.
        """
        if self.path is None:
            return
        files = {f"{name}.json": _bytes(document) for name, document in documents.items()}
        pending = dict(files)
        if staging is not None:
            write_manifest(staging, TASK)
            pending[f"tasks/{staging.name[1:]}/{MANIFEST}"] = (staging / MANIFEST).read_bytes()
        write_manifest(self.path, RUN, skip=_foreign, pending=pending)
        if staging is not None:
            os.rename(staging, staging.with_name(staging.name[1:]))
            flush_folder(staging.parent)
        for name, data in files.items():
            atomic_write(self.path / name, data)
        write_manifest(self.path, RUN, skip=_foreign)

    @contextlib.contextmanager
    def staging(self, index: int, name: str) -> Iterator[Path | None]:
        """A hidden folder to write a task's files in, for `write`; what is left of it in the end is removed."""
        if self.path is None:
            yield None
            return
        final = task_folder(self.path, index, name)
        staging = final.with_name(f".{final.name}")
        staging.mkdir(parents=True)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def write_documents(folder: Path, task: FinishedTask) -> None:
    """The files of a task, by their names."""
    for name, document in vars(task).items():
        atomic_write(folder / f"{name}.json", _bytes(document))


@contextlib.contextmanager
def run_folder(path: str | os.PathLike | None) -> Iterator[RunFolder]:
    """The run's folder, made if need be, checked, and locked against a second process for as long as this lasts.

    Raises:
        RuntimeError: another process is at work in it. DataError: it is damaged, or holds something else. OSError: it
            cannot be made.
    """
    if path is None:
        yield RunFolder(None)
        return
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with alone(path / ".lock", path):
        yield RunFolder(path)


def _foreign(name: str) -> bool:
    """Whether a path in a run's folder is no part of the run: reports, notes; a task that is being staged."""
    top, _, inside = name.partition("/")
    return top not in _FILES or inside.startswith(".")


def _bytes(document: BaseModel | dict) -> bytes:
    value = document.model_dump(mode="json") if isinstance(document, BaseModel) else document
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, indent=1)
    # A file that could not be read again must fail now, while the data still exists.
    parse_json(text, type(document).__name__)
    return (text + "\n").encode("utf-8")
