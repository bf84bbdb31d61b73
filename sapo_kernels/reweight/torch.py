"""reweight_ in plain torch, for where nothing is compiled."""

from __future__ import annotations

import math
import sys

import torch

from ..arguments import Arguments


def reweight_torch(mean, weight, probs, best, effective, live, nll, tokens, decay, temperature, floor) -> None:
    """See `reweight.api.reweight_`."""
    if mean.dim() != 2:
        raise RuntimeError(f"reweight_: mean: expected [pools, prompts], got {mean.dim()} dimensions")
    check = Arguments("reweight_")
    for name, value in (("mean", mean), ("weight", weight), ("probs", probs)):
        check.tensor(name, value, torch.float64, mean.shape, written=True)
    check.tensor("best", best, torch.int64, mean.shape[:1], written=True)
    check.tensor("effective", effective, torch.float64, mean.shape[:1], written=True)
    check.tensor("live", live, torch.bool, mean.shape)
    check.tensor("nll", nll, torch.float64, mean.shape)
    check.tensor("tokens", tokens, torch.int64, mean.shape)
    check.number("decay", decay, 0.0, 1.0)
    check.number("temperature", temperature, 0.0, sys.float_info.max)
    check.number("floor", floor, 0.0, 1.0)
    if not mean.numel():
        best.fill_(-1)
        return

    count, aged, finite = tokens.double(), decay * weight, nll.isfinite()
    # The first evidence, or the first after a loss that was not finite, stands alone.
    kept = (aged > 0) & mean.isfinite()
    total = torch.where(kept, aged + count, count)
    moved = torch.where(kept, mean + (nll - count * mean) / total, nll / total)
    valid = (count > 0) & finite
    moved = torch.where(valid, moved, torch.where(finite, math.nan, nll))
    mean.copy_(torch.where(count == 0, mean, moved))
    weight.copy_(torch.where(count == 0, aged, torch.where(valid, total, 0.0)))

    usable = live & mean.isfinite()
    some = usable.any(1)
    candidate = torch.where(usable, mean, math.inf)
    low = candidate.amin(1, keepdim=True)
    # torch.argmin promises no order among ties.
    chosen = (usable & (mean == low)).to(torch.uint8).argmax(1)
    if temperature == 0:
        soft = torch.zeros_like(mean).scatter_(1, chosen[:, None], 1.0)
    else:
        inverse = max(min(1.0 / temperature, sys.float_info.max), sys.float_info.min)
        soft = ((low - candidate) * inverse).exp()
    new = (1.0 - floor) / soft.sum(1, keepdim=True) * soft + floor / usable.sum(1, keepdim=True).double()
    new = torch.where(usable, new, 0.0)
    best.copy_(torch.where(some, chosen, -1))
    probs.copy_(torch.where(some[:, None], new, probs))
    effective.copy_(torch.where(some, 1.0 / new.square().sum(1), effective))
