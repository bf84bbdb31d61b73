"""reweight_ in plain torch, for where nothing is compiled: the same bits as csrc/reweight.cpp and its CUDA kernel.

Every line mirrors one of csrc/reweight_args.h and csrc/portable_math.h; only IEEE +, -, *, / in the same order.
"""

from __future__ import annotations

import math
import sys

import torch

from ..arguments import Arguments

LANES = 32
LARGEST = sys.float_info.max


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
    check.number("temperature", temperature, 0.0, LARGEST)
    check.number("floor", floor, 0.0, 1.0)
    if not mean.numel():
        best.fill_(-1)
        return

    _update(mean, weight, nll, tokens, decay)
    usable = live & mean.isfinite()
    live_count = usable.sum(1, dtype=torch.float64)
    some = live_count > 0
    candidate = torch.where(usable, mean, math.inf)
    low = candidate.amin(1, keepdim=True)
    chosen = (usable & (mean == low)).to(torch.uint8).argmax(1)
    index = torch.arange(mean.shape[1], device=mean.device)
    if temperature == 0:
        soft = (index == chosen[:, None]).double()
    else:
        soft = torch.where(
            usable, _exp_nonpositive((low - candidate) * max(min(1.0 / temperature, LARGEST), sys.float_info.min)), 0.0
        )
    inverse, base = _divided(1.0, _lane_sum(soft)), _divided(floor, live_count)
    mixed = (1.0 - floor) * (soft * inverse[:, None]) + base[:, None]
    new = torch.where(usable, mixed, 0.0)
    best.copy_(torch.where(some, chosen, -1))
    probs.copy_(torch.where(some[:, None], new, probs))
    effective.copy_(torch.where(some, _divided(1.0, _lane_sum(new * new)), effective))


def _update(mean, weight, nll, tokens, decay) -> None:
    count = tokens.double()
    aged = decay * weight
    scored = count != 0
    valid = (count > 0) & nll.isfinite()
    fresh = ~((aged > 0) & mean.isfinite())
    total = torch.where(fresh, count, aged + count)
    moved = torch.where(fresh, 0.0, mean) + torch.where(fresh, nll, nll - count * mean) / total
    broken = torch.where(nll.isfinite(), math.nan, nll)
    mean.copy_(torch.where(scored, torch.where(valid, moved, broken), mean))
    weight.copy_(torch.where(scored, torch.where(valid, total, 0.0), aged))


def _divided(number: float, values: torch.Tensor) -> torch.Tensor:
    # A Python number on the left would become a product with a rounded reciprocal.
    return torch.full_like(values, number) / values


def _lane_sum(values: torch.Tensor) -> torch.Tensor:
    """[P] sums of [P, K] in the order that csrc/portable_math.h fixes."""
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % LANES)).unflatten(1, (-1, LANES))
    lanes = torch.zeros_like(values[:, 0])
    for chunk in values.unbind(1):
        lanes = lanes + chunk
    half = LANES // 2
    while half:
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
        half //= 2
    return lanes[:, 0]


def _exp_nonpositive(x: torch.Tensor) -> torch.Tensor:
    n = (x.clamp(min=-709.0) * 1.4426950408889634).round()
    r = (x.clamp(min=-709.0) - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10
    p = torch.full_like(r, 1.0 / math.factorial(13))
    for k in range(12, -1, -1):
        p = p * r + 1.0 / math.factorial(k)
    power = ((n.to(torch.int64) + 1023) << 52).view(torch.float64)
    return torch.where(x < -708.0, 0.0, p * power)
