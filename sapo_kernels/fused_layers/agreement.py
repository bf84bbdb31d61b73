"""Whether a fused function computes what a module's own forward does: decided on values, never by a name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves

from ..widened import in_float64

# The error against float64 may be that of the own forward, up to what another order of a sum makes of it.
SLACK = 1.1
# How often an element may be off by a rounding more: the largest of few errors is a matter of luck.
LARGEST = 2.0


def agrees(fused: Callable, own: Callable, *inputs: torch.Tensor) -> bool:
    """Whether `fused` gives tensors of the shapes and dtypes of `own`, as close to float64 as `own`'s are."""
    try:
        plain, found = tree_leaves(own(*inputs)), tree_leaves(fused(*inputs))
        with torch.autocast(inputs[0].device.type, enabled=False), in_float64():
            exact = tree_leaves(own(*inputs))
    except Exception:  # what a compiler or a stand-in refuses is not fused
        return False
    return len(found) == len(plain) and all(map(_as_close, found, plain, exact))


def _as_close(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> bool:
    if (found.shape, found.dtype) != (plain.shape, plain.dtype):
        return False
    scale = exact.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    error, usual = (((t.double() - exact) / scale).abs() for t in (found, plain))
    # A module that errs by nothing leaves room for the last bits.
    ground = torch.finfo(found.dtype).eps / 8
    close = error.square().mean().sqrt() <= SLACK * usual.square().mean().sqrt() + ground
    return bool(close & (error.max() <= LARGEST * usual.max() + ground))


def numbers(*shape: int, like: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal numbers of like's dtype and device, the same each time; torch's own generators are not touched."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(like.device, like.dtype)
