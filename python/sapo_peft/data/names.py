"""Names of tasks, and where the files of a task lie."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sapo_kernels.files import DataError, excerpt

# Names of data collections: a task or its instructions may be in such a folder below the given path.
DATA_FOLDERS = ("", "SUPERNI", "TRACE")


class TaskNameError(DataError):
    """The files hold several tasks and the name given is none of them, or none was given."""


def pick_task(task: str | None, names: Iterable[str], place: str | os.PathLike) -> str:
    """`task` if it is exactly one of `names` (a part of a name may belong to two tasks), or the only name."""
    names = sorted(names)
    if task is None and len(names) == 1:
        return names[0]
    if task in names:
        return task
    close = [name for name in names if task and name.startswith(task)][:3] or names[:5]
    expected = "the name of a task" if task is None else "an existing task"
    got = "none" if task is None else excerpt(task)
    more = f" and {len(names) - len(close)} more" if len(names) > len(close) else ""
    raise TaskNameError(f"{place}: expected {expected} ({', '.join(map(excerpt, close))}{more}), got {got}")


def task_folders(path: Path, file: str) -> dict[str, Path]:
    """The folders by name, below `path` and its data collections, that hold `file`."""
    # Tasks are looked up among the folders that exist: a name never becomes a path.
    roots = [path / part for part in DATA_FOLDERS if (path / part).is_dir()]
    return {sub.name: sub for root in roots for sub in root.iterdir() if (sub / file).is_file()}


def split_file(path: Path, task: str | None, split: str) -> Path:
    """`path` if it is no folder; else the file of `split` in it, or in the folder of `task` below it."""
    if not path.is_dir():
        return path
    name = f"{split}.json"
    if not split.isidentifier():
        raise DataError(f"split: expected a name such as 'train', got {excerpt(split)}")
    if (path / name).is_file():
        return path / name
    folders = task_folders(path, name)
    if not folders:
        raise DataError(f"{path}: expected {name} or task folders with it, got neither")
    return folders[pick_task(task, folders, path)] / name
