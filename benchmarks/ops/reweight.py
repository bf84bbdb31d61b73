"""reweight_ against what runs where nothing is compiled; a call with no pools says what the call itself costs."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import sapo_kernels as sk
from sapo_kernels.reweight.reference import reweight_reference
from sapo_kernels.reweight.torch import reweight_torch

from ..registry import Op, Setting
from ..timing import Case, Provider

NUMBERS = (0.9, 0.1, 0.05)  # decay, temperature, floor
UPDATES = 200


def losses(pools: int, prompts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(nll, tokens), both [P, K]; a fifth of the prompts were not scored."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 400, (pools, prompts), generator=draw)
    nll = tokens * (0.5 + torch.rand(pools, prompts, generator=draw, dtype=torch.float64))
    return nll, torch.where(torch.rand(pools, prompts, generator=draw) < 0.2, 0, tokens)


def tensors(state: sk.PromptState) -> tuple[torch.Tensor, ...]:
    return state.mean, state.weight, state.probs, state.best, state.effective, state.live


def make(setting: Setting, name: str, pools: int, prompts: int):
    """One run is `UPDATES` updates of a fresh state, so that its end can be checked."""
    given, fresh = losses(pools, prompts), tensors(sk.PromptState(pools, prompts))
    expected = [t.clone() for t in fresh]
    for _ in range(UPDATES):
        reweight_reference(*expected, *given, *NUMBERS)

    def check(state) -> float:
        pairs = [(a.cpu().double(), b.double()) for a, b in zip(state, expected, strict=True)]
        gaps = [torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()) for a, b in pairs]
        return float(torch.stack([gap.nan_to_num(nan=torch.inf).max() for gap in gaps]).max())

    case = Case(
        "reweight", name, check=check, tolerance=1e-9, shape=f"pools={pools} K={prompts}", dtype="fp64",
        work=pools * prompts * 61.0, work_unit="B", formula="61 bytes a prompt, read and written", rounds=60,
        tokens=pools * prompts,
    )  # fmt: skip
    there = [t.to(setting.device) for t in fresh]
    made = SimpleNamespace(fresh=there, state=[t.clone() for t in there], given=[t.to(setting.device) for t in given])
    return case, made


reweight = Op(
    "reweight", make, toy=(1, 3), cpu={"8x32": (8, 32), "1x21": (1, 21), "64x64": (64, 64)}, gpu={"8x32": (8, 32)}
)


def _updates(x, update, *given) -> Provider:
    def run():
        for tensor, value in zip(x.state, x.fresh, strict=True):
            tensor.copy_(value)
        for _ in range(UPDATES):
            update(*given)
        return x.state

    return Provider(run, repeats=UPDATES)


@reweight.provider("ours")
def ours(x):
    return _updates(x, torch.ops.sapo_kernels.reweight_, *x.state, *x.given, *NUMBERS)


@reweight.provider("torch")
def in_eager_torch(x):
    return _updates(x, reweight_torch, *x.state, *x.given, *NUMBERS)


@reweight.provider("empty")
def empty(x):
    none = [t[:0] for t in (*x.state, *x.given)]
    made = _updates(x, torch.ops.sapo_kernels.reweight_, *none, *NUMBERS)
    made.check, made.note = lambda _: 0.0, "0 pools: what a call costs"
    return made
