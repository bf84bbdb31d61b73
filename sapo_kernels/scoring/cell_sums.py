"""From log-probabilities that arrive piece by piece to the loss of every cell."""

from __future__ import annotations

import numpy as np
import torch


class CellSums:
    """The summed loss of C cells, each made of some of a job's P targets; see `accumulate_`.

    cell_target: [E] int64, the targets of all cells end to end. cell_ptr: [C + 1] int64, where each cell's begin.
    """

    def __init__(self, cell_target: np.ndarray, cell_ptr: np.ndarray):
        self._lists = cell_target, cell_ptr
        self._pieces: list[torch.Tensor] = []

    def add(self, logprob: torch.Tensor) -> None:
        """The next targets' log-probabilities, [N] float32 or float64, nats. Does not wait for the device."""
        self._pieces.append(logprob)

    def nll(self) -> np.ndarray:
        """[C] float64, the negative log-likelihoods, after the last piece."""
        # Four bytes a target in one copy; to sum every piece where it is would take a launch for each.
        logprob = torch.cat(self._pieces).cpu()
        target, pointer = map(np.ascontiguousarray, self._lists)
        expected = np.diff(pointer)
        nll, tokens = np.zeros(len(expected)), np.zeros_like(expected)
        lists = map(torch.from_numpy, (nll, tokens, target, pointer))
        torch.ops.sapo_kernels.accumulate_(next(lists), next(lists), logprob, *lists, 0)
        if (tokens != expected).any():
            cell = int((tokens != expected).argmax())
            raise RuntimeError(f"cell {cell}: expected {expected[cell]} log-probabilities, got {tokens[cell]}")
        # Surplus ones would have moved all that came after them to other cells.
        if len(logprob) != target.max() + 1:
            raise RuntimeError(f"cells: expected {target.max() + 1} log-probabilities, got {len(logprob)}")
        return nll
