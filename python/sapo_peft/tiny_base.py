"""The tiny base: a decoder of about a million parameters that follows simple instructions, shipped with the package.

    from sapo_peft.tiny_base import load_tiny_base
    model, tokenizer = load_tiny_base()          # or --model tiny-base on the command line

It prefers some wordings of an instruction to others, so that choosing a prompt means something on it. Results measured
on it need the very same weights, so these ship (bfloat16, 2 MB). `tools/tiny_base` trained them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError, read_bytes, read_json

from .assets import BUNDLED_DIR, TINY_BASE_DIR
from .sequence import SequenceTask, read_tasks

MANIFEST = "made_by.json"
# Training rows of each task of the sequences that the base has met; no sequence trains on them.
TASTE_ROWS = 200


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    return hashlib.sha256(read_bytes(path, max_bytes=2**31)).hexdigest()


def faults(folder: Path) -> list[str]:
    """What is wrong with a stored base, one line each: no manifest, a file that is missing, torn or changed."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = manifest["files"]
        if manifest["version"] != 1 or "model.safetensors" not in files:
            return [f"{folder / MANIFEST}: expected version 1 with model.safetensors"]
        named = {str(name): str(digest) for name, digest in files.items()}
    except (OSError, DataError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / MANIFEST}: {error}"]
    found = []
    for name, digest in named.items():
        try:
            # Names come from a file: one that leads out of the folder is no name of a part of the base.
            got = None if Path(name).name != name else file_digest(folder / name)
        except (OSError, DataError):
            got = None
        if got != digest:
            found.append(f"{folder / name}: expected the file named in {MANIFEST}, got {'another' if got else 'none'}")
    return found


def tiny_base_folder() -> Path:
    """The folder of the shipped base, readable by `from_pretrained`; `DataError` if a file of it is damaged."""
    if wrong := faults(TINY_BASE_DIR):
        raise DataError(f"the tiny base that ships with the package is damaged: {wrong[0]}")
    return TINY_BASE_DIR


def load_tiny_base() -> tuple[Any, Any]:
    """(model in float32 on the CPU in eval mode, tokenizer)."""
    from .loading import load

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
