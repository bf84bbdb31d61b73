"""accumulate_ in plain torch, for where nothing is compiled: the same bits as csrc/accumulate.cpp."""

from __future__ import annotations

import torch

from ..arguments import Arguments


def accumulate_torch(nll, tokens, logprob, cell_target, cell_ptr, start: int) -> None:
    """See `accumulate.api.accumulate_`."""
    for name, value in (("nll", nll), ("logprob", logprob), ("cell_target", cell_target)):
        if value.dim() != 1:
            raise RuntimeError(f"accumulate_: {name}: expected 1 dimension, got {value.dim()}")
    cells, entries, count = len(nll), len(cell_target), len(logprob)
    check = Arguments("accumulate_")
    check.tensor("nll", nll, torch.float64, [cells], written=True)
    check.tensor("tokens", tokens, torch.int64, [cells], written=True)
    check.tensor("logprob", logprob, torch.float64 if logprob.dtype == torch.float64 else torch.float32, [count])
    check.tensor("cell_target", cell_target, torch.int64, [entries])
    check.tensor("cell_ptr", cell_ptr, torch.int64, [cells + 1])
    if start < 0:
        raise RuntimeError(f"accumulate_: start: expected at least 0, got {start}")

    begin, end = cell_ptr[:-1], cell_ptr[1:]
    bad = (begin < 0) | (begin > end) | (end > entries)
    if bad.any():
        c = int(bad.nonzero()[0])
        raise RuntimeError(
            f"accumulate_: cell_ptr: cell {c}: expected an ascending range inside {entries} entries, got "
            f"{int(begin[c])} to {int(end[c])}"
        )
    bad = (tokens < 0) | (tokens > end - begin)
    if bad.any():
        c = int(bad.nonzero()[0])
        raise RuntimeError(
            f"accumulate_: tokens: cell {c}: expected from 0 to its {int(end[c] - begin[c])} entries, got "
            f"{int(tokens[c])}"
        )
    total, cursor, values = nll.clone(), begin + tokens, logprob.double()
    # Every round adds one row to each cell that still has one here, so a cell's rows are added in their own order.
    waiting = torch.arange(cells, device=nll.device)
    while True:
        waiting = waiting[cursor[waiting] < end[waiting]]
        target = cell_target[cursor[waiting]]
        if (target < start).any():
            at = int((target < start).nonzero()[0])
            raise RuntimeError(
                f"accumulate_: cell_target: cell {int(waiting[at])}: expected its next target in this piece, which "
                f"begins at {start}, or after it, got {int(target[at])}: a piece was left out"
            )
        here = target - start < count
        waiting, target = waiting[here], target[here]
        if not len(waiting):
            break
        total[waiting] -= values[target - start]
        cursor[waiting] += 1
    nll.copy_(total)
    tokens.copy_(cursor - begin)
