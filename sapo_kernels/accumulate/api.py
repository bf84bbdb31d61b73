"""The public accumulate_: one call of the operator, which checks its arguments itself."""

from __future__ import annotations

import torch


def accumulate_(
    nll: torch.Tensor,
    tokens: torch.Tensor,
    logprob: torch.Tensor,
    cell_target: torch.Tensor,
    cell_ptr: torch.Tensor,
    start: int = 0,
) -> None:
    """Add one piece of a job's log-probabilities to the sums of its cells, in place.

    A job has P targets in an order of its own; cell c is made of the targets
    ``cell_target[cell_ptr[c]:cell_ptr[c + 1]]``, ascending; cells may share targets. The targets may arrive in any
    number of pieces, one call for each. With all pieces in, this equals::

        nll[c] -= logprob[cell_target[cell_ptr[c]:cell_ptr[c + 1]]].double().sum()
        tokens[c] += cell_ptr[c + 1] - cell_ptr[c]

    Args:
        nll: [C] float64, the sums so far in nats; zeros at first. Written.
        tokens: [C] int64, how many of its targets each cell has so far; zeros at first. Written.
        logprob: [N] float32 or float64, nats, of the targets ``start, ..., start + N - 1``.
        cell_target: [E] int64. cell_ptr: [C + 1] int64.
        start: the first target of this piece.

    All tensors are dense, on one device and without gradient (there is no backward), and the written ones share memory
    with none.

    Raises:
        RuntimeError: before any write, naming the argument: dtype, shape, strides, device, shared memory; also lists
            that do not fit together, such as a piece left out. On CUDA the lists are not read on the host: such a
            cell becomes NaN instead.

    Numerics: a cell is summed in float64 strictly in the order of its targets, so its bits depend on its own rows
    alone, whatever else is in the batch and however the job was cut; the same on every device, compiled or not.
    A piece that was already added changes nothing.
    Source: SAPO, arXiv 2606.01967.
    """
    torch.ops.sapo_kernels.accumulate_(nll, tokens, logprob, cell_target, cell_ptr, start)
