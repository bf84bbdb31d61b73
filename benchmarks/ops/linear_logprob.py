"""linear_logprob, alone and with the backward pass, against log-softmax and the fused heads that are installed."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import sapo_kernels as sk

from ..registry import DTYPE_NAMES, Op, Setting, gradients
from ..timing import Case


def oracle(hidden, weight, targets) -> torch.Tensor:
    """[R] float64 log-probabilities of all rows: float64 where rows are fp32.

    Products of bf16 or fp16 are exact in fp32, and sums there err a thousand times less than rounded logits; float64
    would take minutes on a GPU that has little of it.
    """
    wide = torch.float64 if weight.dtype == torch.float32 else torch.float32
    weight, precision = weight.to(wide), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        # At most 256 MiB of float64 logits at once.
        pieces = zip(*(t.split(max(1, 2**25 // len(weight))) for t in (hidden, targets)), strict=True)
        return torch.cat([
            torch.log_softmax(F.linear(rows.to(wide), weight).double(), -1).gather(-1, own[:, None])[:, 0]
            for rows, own in pieces
        ])  # fmt: skip
    finally:
        torch.set_float32_matmul_precision(precision)


def make(setting: Setting, name: str, rows: int, vocabulary: int, hidden: int):
    """R rows with one target each on a [V, D] head."""
    device, dtype = setting.device, setting.dtype
    draw = torch.Generator(device).manual_seed(0)
    h = torch.randn(rows, hidden, generator=draw, device=device).to(dtype)
    weight = torch.randn(vocabulary, hidden, generator=draw, device=device).mul_(hidden**-0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=draw, device=device)
    exact = oracle(h, weight, targets)

    def check(logprob: torch.Tensor) -> float:
        return float((logprob.double() - exact).abs().max()) if logprob.shape == (rows,) else float("inf")

    made = SimpleNamespace(hidden=h, weight=weight, targets=targets, impl=setting.impl)
    if dtype == torch.float32:
        tolerance = 2e-5 + 1e-6 * float(exact.abs().max())
    else:
        tolerance = 2 * check(log_softmax(made)()) + 1e-3
    case = Case(
        "linear_logprob", name, check=check, tolerance=tolerance, shape=f"R={rows} V={vocabulary} D={hidden}",
        dtype=DTYPE_NAMES[dtype], work=2.0 * rows * vocabulary * hidden, formula="2*R*V*D", tokens=rows,
    )  # fmt: skip
    return case, made


# Rows, vocabulary, hidden. On a CPU as many rows as wait for each other, and few.
linear_logprob = Op(
    "linear_logprob", make, toy=(8, 100, 16), share=0.06,
    cpu={
        "V 32k": (512, 32000, 512), "V 50k": (512, 50257, 512), "V 152k": (256, 151936, 512),
        "V 256k": (256, 256000, 512), "few rows": (32, 50257, 512),
    },
    gpu={
        "0.6B 4k rows": (4096, 151936, 1024), "8B 512 rows": (512, 151936, 4096), "8B 4k rows": (4096, 151936, 4096),
        "8B 16k rows": (16384, 151936, 4096), "V 256k": (4096, 256000, 2304), "V 32k": (4096, 32000, 4096),
    },
)  # fmt: skip


@linear_logprob.provider("ours")
def ours(x):
    return lambda: sk.linear_logprob(x.hidden, x.weight, x.targets, impl=x.impl)[0]


@linear_logprob.provider("log_softmax")
def log_softmax(x):
    def run():
        logits = F.linear(x.hidden, x.weight).float()
        return torch.log_softmax(logits, -1).gather(-1, x.targets[:, None])[:, 0]

    return run


@linear_logprob.provider("cross_entropy")
def cross_entropy(x):
    return lambda: -F.cross_entropy(F.linear(x.hidden, x.weight).float(), x.targets, reduction="none")


if hasattr(F, "linear_cross_entropy"):  # torch 2.13

    @linear_logprob.provider("torch_linear_ce")
    def torch_linear_ce(x):
        return lambda: -F.linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="none")


@linear_logprob.provider("trl", needs="trl")
def trl(x):
    from trl.trainer.utils import _ChunkedLogProbFunction as head

    return lambda: head.apply(x.hidden, x.weight, None, x.targets, 1.0, 32768, None, 1.0, ("log_probs",))[0]


@linear_logprob.provider("liger", needs="liger_kernel", on="cuda")
def liger(x):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as head

    return lambda: -head(x.hidden, x.weight, x.targets, reduction="none")


@linear_logprob.provider("cce", needs="cut_cross_entropy", on="cuda")
def cce(x):
    from cut_cross_entropy import linear_cross_entropy as head

    return lambda: -head(x.hidden, x.weight, x.targets, reduction="none", impl="cce")


def make_backward(setting: Setting, name: str, rows: int, vocabulary: int, hidden: int):
    """Forward and backward of a frozen head: the gradient of the hidden rows, as training with LoRA wants it."""
    case, x = make(setting, name, rows, vocabulary, hidden)
    x.upstream = torch.linspace(0.5, 1.5, rows, device=x.hidden.device)
    wide = x.hidden.double().requires_grad_()
    (exact,) = torch.autograd.grad(oracle(wide, x.weight, x.targets), wide, x.upstream.double())
    exact = exact.flatten()
    x.hidden.requires_grad_()
    case.check = lambda found: float((found.double() - exact).abs().max()) if found.shape == exact.shape else math.inf
    own = case.check(gradients(log_softmax(x), [x.hidden], x.upstream)())
    case.op, case.work, case.formula = "linear_logprob_backward", 2 * case.work, "4*R*V*D"
    case.tolerance = 2 * own + 1e-5
    return case, x


linear_logprob_backward = Op(
    "linear_logprob_backward", make_backward, toy=(8, 100, 16), share=0.03, cpu={"V 50k": (256, 50257, 512)},
    gpu={"0.6B 4k rows": (4096, 151936, 1024), "8B 4k rows": (4096, 151936, 4096)},
)  # fmt: skip
for provider, entry in linear_logprob.providers.items():
    linear_logprob_backward.providers[provider] = dataclasses.replace(
        entry, prepare=lambda x, forward=entry.prepare: gradients(forward(x), [x.hidden], x.upstream)
    )
