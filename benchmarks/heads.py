"""linear_logprob and the other ways from hidden rows to the log-probability of one token: providers, oracle, work."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

import sapo_kernels as sk

from .timing import Case, Provider

FORMULA = "2*R*V*D"


def _log_softmax(hidden, weight, targets):
    return torch.log_softmax(F.linear(hidden, weight).float(), -1).gather(-1, targets[:, None])[:, 0]


def _cross_entropy(hidden, weight, targets):
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def _torch_fused(hidden, weight, targets):
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none")


def _trl(hidden, weight, targets):
    from trl.trainer.utils import _ChunkedLogProbFunction

    return _ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs",))[0]


def _liger(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def _cce(hidden, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce")


# name: (function, why it may not run here)
PEERS = {
    "log_softmax": (_log_softmax, lambda device: ""),
    "cross_entropy": (_cross_entropy, lambda device: ""),
    "torch_linear_ce": (_torch_fused, lambda device: "" if hasattr(F, "linear_cross_entropy") else "torch < 2.13"),
    "trl": (_trl, lambda device: _lacking("trl")),
    "liger": (_liger, lambda device: _lacking("liger_kernel") or _gpu_only(device)),
    "cce": (_cce, lambda device: _lacking("cut_cross_entropy") or _gpu_only(device)),
}


def _lacking(package: str) -> str:
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def _gpu_only(device: str) -> str:
    return "" if device == "cuda" else "runs on a GPU only"


def left_out(device: str) -> dict[str, str]:
    """The peers that cannot run on `device`, and why."""
    return {name: why(device) for name, (_, why) in PEERS.items() if why(device)}


def oracle(hidden, weight, targets) -> torch.Tensor:
    """[R] float64 log-probabilities of all rows: float64 where rows are fp32.

    Products of bf16 or fp16 are exact in fp32, and sums there err a thousand times less than rounded logits; float64
    would take minutes on a GPU that has little of it.
    """
    wide = torch.float64 if hidden.dtype == torch.float32 else torch.float32
    weight, precision = weight.to(wide), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        # At most 256 MiB of float64 logits at once.
        pieces = zip(*(t.split(max(1, 2**25 // len(weight))) for t in (hidden, targets)), strict=True)
        return torch.cat([
            torch.log_softmax(F.linear(rows.to(wide), weight).double(), -1).gather(-1, wanted[:, None])[:, 0]
            for rows, wanted in pieces
        ])  # fmt: skip
    finally:
        torch.set_float32_matmul_precision(precision)


def make_case(
    name: str, rows: int, vocabulary: int, hidden: int, dtype=torch.float32, device="cpu", rounds=5, impl="auto"
) -> Case:
    """R rows with one target each on a [V, D] head; impl: of ours."""
    draw = torch.Generator(device).manual_seed(0)
    h = torch.randn(rows, hidden, generator=draw, device=device).to(dtype)
    weight = torch.randn(vocabulary, hidden, generator=draw, device=device).mul_(hidden**-0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=draw, device=device)
    low, exact = dtype != torch.float32, oracle(h, weight, targets)

    def check(logprob: torch.Tensor) -> float:
        if logprob.shape != (rows,):
            return float("inf")
        return float((logprob.double() - exact).abs().max())

    with torch.no_grad():
        tolerance = (
            2 * check(_log_softmax(h, weight, targets)) + 1e-3 if low else 2e-5 + 1e-6 * float(exact.abs().max())
        )
    providers = {"ours": Provider(lambda: sk.linear_logprob(h, weight, targets, impl=impl)[0], tokens=rows)}
    for peer, (function, why) in PEERS.items():
        if not why(device):
            providers[peer] = Provider(_without_gradient(function, h, weight, targets), tokens=rows)
    name_of = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return Case(
        "linear_logprob", name, providers, check, tolerance, shape=f"R={rows} V={vocabulary} D={hidden}",
        dtype=name_of[dtype], work=2.0 * rows * vocabulary * hidden, formula=FORMULA, rounds=rounds,
    )  # fmt: skip


def _without_gradient(function, *arguments):
    @torch.no_grad()
    def run():
        return function(*arguments)

    return run
