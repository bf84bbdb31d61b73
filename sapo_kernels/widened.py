"""Computing in a wider precision than the tensors and casts of a model's own code ask for."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

LOW = (torch.bfloat16, torch.float16)


class Widened(TorchDispatchMode):
    """Every operation on tensors of the `narrow` dtypes, and every cast to one of them, happens in `wide` instead."""

    def __init__(self, wide: torch.dtype, narrow: tuple[torch.dtype, ...]):
        super().__init__()
        self.wide, self.narrow = wide, narrow
        # Whether there was anything to widen.
        self.met = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*tree_map(self._widened, args), **tree_map(self._widened, kwargs or {}))

    def _widened(self, value):
        if (value.dtype if isinstance(value, torch.Tensor) else value) not in self.narrow:
            return value
        self.met = True
        return value.to(self.wide) if isinstance(value, torch.Tensor) else self.wide


def in_float32() -> Widened:
    """Low precision becomes float32."""
    return Widened(torch.float32, LOW)


def in_float64() -> Widened:
    """Every precision becomes float64."""
    return Widened(torch.float64, (torch.float32, *LOW))
