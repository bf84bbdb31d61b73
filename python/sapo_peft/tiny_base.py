"""The tiny base: a decoder of about a million parameters that follows simple instructions, shipped with the package.

    from sapo_peft.tiny_base import load_tiny_base
    model, tokenizer = load_tiny_base()          # or --model tiny-base on the command line

It prefers some wordings of an instruction to others, so that choosing a prompt means something on it. Results measured
on it need the very same weights, so these ship (bfloat16, 2 MB). `tools/tiny_base` trained them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from .assets import BUNDLED_DIR, tiny_base_folder
from .loading import load
from .sequence import SequenceTask, read_tasks

# Training rows of each task of the sequences that the base has met; no sequence trains on them.
TASTE_ROWS = 200


def load_tiny_base() -> tuple[Any, Any]:
    """(model in float32 on the CPU in eval mode, tokenizer)."""
    return load(str(tiny_base_folder()), None, "float32", "cpu")


def sequence_tasks(names: Sequence[str], seed: int, test_examples: int | None = None) -> list[SequenceTask]:
    """Bundled tasks with the training rows in an order drawn by the seed, without those the base has met.

    The answer-format line is left out: it is not paraphrased and names the task whatever the instruction says.
    """
    found = []
    for task in read_tasks(BUNDLED_DIR, names):
        train = list(task.train[:-TASTE_ROWS])
        random.Random(f"{seed}/{task.name}").shuffle(train)
        pool = task.pool.model_copy(update={"suffix": ""})
        found.append(SequenceTask.build(task.name, train, list(task.test[:test_examples]), pool))
    return found
