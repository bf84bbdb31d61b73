"""The bundled tasks as sequences on the tiny base learn them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from sapo_peft.bundled import BUNDLED_DIR
from sapo_peft.sequence import SequenceTask, read_tasks

from .corpus import TASTE_ROWS


def sequence_tasks(names: Sequence[str], seed: int, test_examples: int | None = None) -> list[SequenceTask]:
    """The tasks with the training rows in an order drawn by the seed, without those the base has met.

    The answer-format line is left out: it is not paraphrased and names the task whatever the instruction says.
    """
    found = []
    for task in read_tasks(BUNDLED_DIR, names):
        train = list(task.train[:-TASTE_ROWS])
        random.Random(f"{seed}/{task.name}").shuffle(train)
        pool = replace(task.pool, suffix="")
        found.append(SequenceTask.build(task.name, train, list(task.test[:test_examples]), pool))
    return found
