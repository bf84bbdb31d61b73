"""From log-probabilities that arrive piece by piece to the loss of every cell."""

from __future__ import annotations

import numpy as np
import torch


class CellSums:
    """The summed loss of C cells, each made of some of a job's P targets; see `accumulate_`.

    cell_target: [E] int64, the targets of all cells end to end. cell_ptr: [C + 1] int64, where each cell's begin.
    """

    def __init__(self, cell_target: np.ndarray, cell_ptr: np.ndarray):
        self._lists = [torch.from_numpy(np.ascontiguousarray(values)) for values in (cell_target, cell_ptr)]
        self._pieces: list[torch.Tensor] = []

    def add(self, logprob: torch.Tensor) -> None:
        """The next targets' log-probabilities, [N] float32 or float64, nats. Does not wait for the device."""
        self._pieces.append(logprob)

    def nll(self) -> np.ndarray:
        """[C] float64, the negative log-likelihoods, after the last piece."""
        target, pointer = self._lists
        wanted = pointer.diff()
        nll, tokens = torch.zeros(wanted.shape, dtype=torch.float64, device="cpu"), torch.zeros_like(wanted)
        # Four bytes a target in one copy; to sum every piece where it is would take a launch for each.
        logprob = torch.cat(self._pieces).cpu()
        torch.ops.sapo_kernels.accumulate_(nll, tokens, logprob, target, pointer, 0)
        if not torch.equal(tokens, wanted):
            cell = int((tokens != wanted).nonzero()[0])
            raise RuntimeError(f"cell {cell}: expected {int(wanted[cell])} log-probabilities, got {int(tokens[cell])}")
        # Surplus ones would have moved all that came after them to other cells.
        total = int(target.max()) + 1
        if len(logprob) != total:
            raise RuntimeError(f"cells: expected {total} log-probabilities, got {len(logprob)}")
        return nll.numpy()
