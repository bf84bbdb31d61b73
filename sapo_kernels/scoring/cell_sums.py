"""From log-probabilities that arrive piece by piece to the loss of every cell."""

from __future__ import annotations

import numpy as np
import torch

from .. import native
from ..trie.trie import copied

# Where the sums are kept beside the log-probabilities; elsewhere these wait and are summed on the host.
_COMPILED = {"cpu": "_C", "cuda": "_C_cuda"}


class CellSums:
    """The summed loss of C cells, each made of some of a job's P targets; see `accumulate_`.

    cell_target: [E] int64, the targets of all cells end to end. cell_ptr: [C + 1] int64, where each cell's begin.
    """

    def __init__(self, cell_target: np.ndarray, cell_ptr: np.ndarray):
        self._lists = [torch.from_numpy(np.ascontiguousarray(values)) for values in (cell_target, cell_ptr)]
        self._sums: tuple[torch.Tensor, torch.Tensor] | None = None
        self._start = 0
        self._waiting: list[torch.Tensor] = []

    def add(self, logprob: torch.Tensor) -> None:
        """The next targets' log-probabilities, [N] float32 or float64, nats. Does not wait for the device."""
        module = _COMPILED.get(logprob.device.type)
        if module is not None and native.load(module) == "loaded":
            self._accumulate(logprob)
        else:
            self._waiting.append(logprob)

    def nll(self) -> np.ndarray:
        """[C] float64, the negative log-likelihoods, after the last piece."""
        if self._waiting:
            self._accumulate(torch.cat([part.cpu() for part in self._waiting]))
            self._waiting = []
        if self._sums is None:
            return np.zeros(len(self._lists[1]) - 1)
        nll, tokens = (values.cpu() for values in self._sums)
        expected = self._lists[1].diff()
        if not torch.equal(tokens, expected):
            cell = int((tokens != expected).nonzero()[0])
            raise RuntimeError(
                f"cell {cell}: expected {int(expected[cell])} log-probabilities, got {int(tokens[cell])}"
            )
        # Surplus ones would have moved all that came after them to other cells.
        total = int(self._lists[0].max()) + 1
        if self._start != total:
            raise RuntimeError(f"cells: expected {total} log-probabilities, got {self._start}")
        return nll.numpy()

    def _accumulate(self, logprob: torch.Tensor) -> None:
        if self._sums is None:
            self._there, cells = copied(self._lists, logprob.device), len(self._lists[1]) - 1
            self._sums = tuple(
                torch.zeros(cells, dtype=dtype, device=logprob.device) for dtype in (torch.float64, torch.int64)
            )
        torch.ops.sapo_kernels.accumulate_(*self._sums, logprob.contiguous(), *self._there, self._start)
        self._start += len(logprob)
