"""Several processes that train one model: they get the same, decide the same, and one of them logs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch.distributed as dist

logger = logging.getLogger("sapo_peft")
Value = TypeVar("Value")


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()


def leave() -> None:
    """Take down the process group, for a command whose work is done on this rank; nothing in a single process.

    A process that ends with one may be aborted although all went well: gloo's threads outlive the interpreter. Not for
    a rank that failed: the others may be waiting for it.
    """
    if several():
        dist.destroy_process_group()


def wait() -> None:
    """Until every rank is here."""
    if several():
        dist.barrier()


def gathered(value: Value) -> list[Value]:
    """Every rank's value, in the order of the ranks."""
    if not several():
        return [value]
    found = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def first_of(value: Value) -> Value:
    """Rank 0's value on every rank: rounding may differ between devices, a choice must not."""
    if not several():
        return value
    found = [value]
    dist.broadcast_object_list(found, 0)
    return found[0]


def check_same(given: Mapping[str, Any]) -> None:
    """Every rank must have been given what rank 0 was; `given` by name.

    Raises:
        ValueError: on every rank, naming the first rank that has others, and what differs.
    """
    first, *others = gathered(given)
    for rank, other in enumerate(others, 1):
        if names := [name for name in first if first[name] != other[name]]:
            raise ValueError(f"rank {rank}: expected the {' and '.join(names)} of rank 0, got others")


def say(line: str) -> None:
    """Show a line where the user looks: in the log if "sapo_peft" is shown at level INFO, else on stdout.

    Whoever gives that logger another level wants it quiet, and it is.
    """
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", line)
    elif logger.level == logging.NOTSET:
        # Between the progress bars of the trainer, not through them.
        from tqdm import tqdm

        tqdm.write(line)
