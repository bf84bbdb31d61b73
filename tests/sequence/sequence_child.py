"""A three-task sequence for `test_sequence_resume`: started as a process, killed, and started again.

``python -m tests.sequence.sequence_child FOLDER METHOD`` goes on where the folder says.
"""

from __future__ import annotations

import sys

import torch

from tests.sequence.sequence_helpers import run_small, small_tasks

TASKS = 3
OPTIONS = {"policy": "sapo", "every_steps": 3, "max_steps": 6}


def run(folder, method: str) -> None:
    torch.set_num_threads(1)
    run_small(folder, tasks=small_tasks(TASKS), method=method, **OPTIONS)


if __name__ == "__main__":
    run(*sys.argv[1:])
