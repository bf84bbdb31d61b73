"""The prompts and the examples of one task, from two files that may each hold several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sapo_kernels.files import excerpt

from .examples import Examples, read_examples
from .names import TaskNameError, task_folders
from .prompt_files import read_prompt_file
from .prompt_pool import PromptPool, is_pool_file


def read_task(
    prompts: str | os.PathLike, data: str | os.PathLike, task: str | None = None, **options: Any
) -> tuple[PromptPool, Examples]:
    """The pool in `prompts` and the examples in `data` (`options`: of `read_examples`).

    Without a `task` it is the only one of the prompts, or the one whose name the folder of the data has. A `task` that
    neither of the two knows is refused.

    Raises: `DataError` naming the file and what was expected; `OSError` from opening and reading.
    """
    folder = (Path(data) if Path(data).is_dir() else Path(data).parent).resolve().name
    if task is None:
        try:
            pool = PromptPool.read(prompts)
        except TaskNameError as error:
            try:
                pool = PromptPool.read(prompts, folder)
            except TaskNameError:
                raise error from None
    else:
        pool = PromptPool.read(prompts, task)
        if not (is_pool_file(prompts) or read_prompt_file(Path(prompts), task).named):
            known = set(task_folders(Path(data), "train.json")) if Path(data).is_dir() else set()
            if task not in {*known, folder}:
                raise TaskNameError(
                    f"task: expected none, as neither {prompts} nor {data} names its tasks, got {excerpt(task)}"
                )
    return pool, read_examples(data, task=task or pool.task, **options)
