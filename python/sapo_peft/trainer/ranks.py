"""Several processes that train one model: that all were given the same, that all decide the same, and who speaks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime

import torch

logger = logging.getLogger("sapo_peft")


def several() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave() -> None:
    """Take down the process group, for a command whose work is done on this rank; nothing in a single process.

    A process that ends with one may be aborted although all went well: gloo's threads outlive the interpreter. Not for
    a rank that failed: the others may be waiting for it.
    """
    if several():
        torch.distributed.destroy_process_group()


def wait() -> None:
    """Until every rank is here."""
    if several():
        torch.distributed.barrier()


def first_of(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rank 0's `values` on every rank: rounding may differ between devices, a choice must not."""
    if not several():
        return values
    sent = values.to(device)
    torch.distributed.broadcast(sent, 0)
    return sent.to(values.device)


def moment_of_first(moment: datetime, device: torch.device) -> datetime:
    """Rank 0's moment, to the second, on every rank: they need not begin on the same day."""
    if not several():
        return moment
    return datetime.fromtimestamp(int(first_of(torch.tensor([int(moment.timestamp())]), device)))


def summed(values: list[float], device: torch.device) -> tuple[list[float], int]:
    """(the sums of `values` over all ranks, the number of ranks). float32 on devices that have nothing longer."""
    if not several():
        return values, 1
    kind = torch.float32 if device.type == "mps" else torch.float64
    sent = torch.tensor(values, dtype=kind, device=device)
    torch.distributed.all_reduce(sent)
    return sent.tolist(), torch.distributed.get_world_size()


def check_same(digests: Mapping[str, str], device: torch.device) -> None:
    """Every rank must have been given what rank 0 was.

    digests: 64 hexadecimal digits by the name of what they are of; the same names on every rank.

    Raises:
        ValueError: on every rank, naming the first rank that has others, and what differs.
    """
    if not several():
        return
    own = torch.tensor([list(bytes.fromhex(digest)) for digest in digests.values()], dtype=torch.uint8, device=device)
    found = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, own)
    for rank, other in enumerate(found):
        names = [name for name, a, b in zip(digests, found[0].tolist(), other.tolist(), strict=True) if a != b]
        if names:
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
