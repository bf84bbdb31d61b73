"""What the in-place operators share in Python: the checks of csrc/arguments.h with the same messages."""

from __future__ import annotations

import math

import torch


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Arguments:
    """The arguments of one call of `op`. The first tensor fixes the device; everything is checked before any write."""

    def __init__(self, op: str):
        self.op = op
        self.device: torch.device | None = None
        self._seen: list[tuple[str, int, int, bool]] = []

    def tensor(self, name: str, value: torch.Tensor, dtype: torch.dtype, shape, written: bool = False) -> None:
        """A dense tensor of that dtype and shape; `written` ones share no memory with any other argument."""
        head = f"{self.op}: {name}: wanted"
        if value.dtype != dtype:
            raise RuntimeError(f"{head} {_name(dtype)}, got {_name(value.dtype)}")
        if tuple(value.shape) != tuple(shape):
            raise RuntimeError(f"{head} shape {list(shape)}, got {list(value.shape)}")
        if not value.is_contiguous():
            raise RuntimeError(f"{head} contiguous strides, got {list(value.stride())}")
        if self.device is not None and value.device != self.device:
            raise RuntimeError(f"{head} it on the device of the other arguments, {self.device}, got {value.device}")
        self.device = value.device
        first = value.data_ptr()
        if first % value.element_size():
            raise RuntimeError(f"{head} memory aligned to its elements, got an address that is not")
        last = first + value.numel() * value.element_size()
        for other, begin, end, other_written in self._seen:
            if not (first >= end or last <= begin) and (written or other_written):
                raise RuntimeError(f"{head} memory of its own, got some of {other}'s")
        self._seen.append((name, first, last, written))

    def number(self, name: str, value: float, low: float, high: float) -> None:
        """A finite number from `low` to `high`."""
        if not (math.isfinite(value) and low <= value <= high):
            raise RuntimeError(f"{self.op}: {name}: expected a number from {low:g} to {high:g}, got {value:g}")
