"""The folder of a sequence run: a lock, a task published by one rename, and what a second start finds."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError, excerpt, flush, read_json, write_json

VERSION = 1
MAX_RUN_BYTES = 64 * 2**20
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
# Of the entries of run.json.
_KINDS = {"config": dict, "tasks": list, "data": dict, "versions": dict, "warnings": list, "status": str}


def task_folder(index: int, name: str) -> str:
    """``01-NAME``: what a file name may hold of the task's name."""
    return f"{index:02d}-{_UNSAFE.sub('_', name)[:100]}"


def finished_tasks(run_dir: Path, names: Sequence[str]) -> list[tuple[int, Path]]:
    """(index from 1, folder) of the tasks that are done, in order.

    Raises:
        DataError: a task is done before an earlier one.
    """
    folders = [run_dir / "tasks" / task_folder(index, name) for index, name in enumerate(names, 1)]
    there = [folder.is_dir() for folder in folders]
    count = there.index(False) if False in there else len(there)
    if any(there[count:]):
        raise DataError(f"{folders[count]}: expected this task as later ones are done, got no folder")
    return list(enumerate(folders[:count], 1))


def read_run(file: Path) -> dict[str, Any]:
    """A ``run.json``, as far as a run that goes on builds on it.

    Raises:
        DataError: it is of no sequence run of this version, or an entry is of another kind.
    """
    saved = read_json(file, max_bytes=MAX_RUN_BYTES)
    if not isinstance(saved, dict) or saved.get("version") != VERSION or saved.get("kind") != "sequence":
        raise DataError(f"{file}: expected a sequence run of version {VERSION}, got {excerpt(saved)}")
    for name, kind in _KINDS.items():
        if name not in saved:
            raise DataError(f"{file}: expected the entry {name!r}, got none")
        if not isinstance(saved[name], kind):
            raise DataError(f"{file}: {name!r}: expected {kind.__name__}, got {excerpt(saved[name])}")
    for name in ("tasks", "warnings"):
        if not all(isinstance(text, str) for text in saved[name]):
            raise DataError(f"{file}: {name!r}: expected texts, got {excerpt(saved[name])}")
    return saved


def fingerprint(model: Any) -> str:
    """Of shapes, dtypes and a few values of every weight: another base model is told, cheaply."""
    import torch

    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        few = parameter.detach().flatten()[:64].to("cpu", torch.float32)
        found.update(few.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


class RunFolder:
    """A run's folder while one process works in it; `path` None keeps nothing on disk."""

    def __init__(self, path: Path | None):
        self.path = path

    def started(self, run: dict[str, Any]) -> dict[str, Any] | None:
        """What ``run.json`` holds of an earlier start, or None after having written `run` there.

        Raises:
            DataError: it was another run (the message names what differs), or the folder holds something else.
        """
        if self.path is None:
            return None
        file = self.path / "run.json"
        if not file.exists():
            other = sorted(one.name for one in self.path.iterdir() if not one.name.startswith("."))
            if other:
                raise DataError(f"{self.path}: expected an empty folder or one of a run, got {excerpt(other[0])} in it")
            write_json(file, run)
            return None
        saved = read_run(file)
        for missing in sorted(set(run) - set(saved)):
            raise DataError(f"{file}: expected the entry {missing!r}, got none")
        for what, was, now in _differences(saved, run):
            raise DataError(
                f"{self.path}: {what}: expected {excerpt(was)}, as this run began with, got {excerpt(now)}; give the "
                "same options to go on, or another folder"
            )
        return saved

    def write(self, name: str, value: dict[str, Any]) -> None:
        if self.path is not None:
            write_json(self.path / name, value)

    @contextlib.contextmanager
    def task(self, index: int, name: str) -> Iterator[Path | None]:
        """A folder to write a task's files in, which gets its real name, whole, when the block ends without error."""
        if self.path is None:
            yield None
            return
        tasks = self.path / "tasks"
        tasks.mkdir(exist_ok=True)
        final = tasks / task_folder(index, name)
        staging = tasks / f".{final.name}"
        # Left by a run that was killed.
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir()
        try:
            yield staging
            flush_tree(staging)
            os.rename(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _flush(tasks)


@contextlib.contextmanager
def run_folder(path: str | os.PathLike | None) -> Iterator[RunFolder]:
    """The run's folder, made if need be, locked against a second process for as long as this lasts.

    Raises:
        RuntimeError: another process is at work in it. OSError: it cannot be made.
    """
    if path is None:
        yield RunFolder(None)
        return
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    # The lock goes with the process, however it ends; the empty file stays.
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RuntimeError(f"{path}: another process is at work in this folder") from None
            raise
        yield RunFolder(path)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Every file and folder below, and the folder, to disk."""
    for where, _, files in os.walk(folder, topdown=False):
        for name in files:
            _flush(Path(where, name))
        _flush(Path(where))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    finally:
        os.close(handle)


def _differences(saved: dict[str, Any], run: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(option, its value in the earlier start, its value now) of everything that decides the results."""
    was, now = saved["config"], run["config"]
    for name in sorted({*was, *now}):
        if was.get(name) != now.get(name):
            yield name, was.get(name), now.get(name)
    for name in ("tasks", "order", "model"):
        if saved.get(name) != run[name]:
            yield name, saved.get(name), run[name]
    for name in sorted({*saved["data"], *run["data"]}):
        was, now = saved["data"].get(name), run["data"].get(name)
        if was != now:
            yield f"data, {name}", was, now
