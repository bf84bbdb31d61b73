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


def make_case(
    name: str, rows: int, vocabulary: int, hidden: int, dtype=torch.float32, device="cpu", rounds=5, impl="auto"
) -> Case:
    """R rows with one target each on a [V, D] head; impl: of ours."""
    draw = torch.Generator(device).manual_seed(0)
    h = torch.randn(rows, hidden, generator=draw, device=device).to(dtype)
    weight = torch.randn(vocabulary, hidden, generator=draw, device=device).mul_(hidden**-0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=draw, device=device)
    chosen = torch.linspace(0, rows - 1, min(rows, 32), device=device).long()
    # Float64 on a few rows: exact, and small enough at any vocabulary.
    logits = h[chosen].double() @ weight.double().T
    exact = torch.log_softmax(logits, -1).gather(-1, targets[chosen, None])[:, 0].cpu()
    del logits

    def check(logprob: torch.Tensor) -> float:
        if logprob.shape != (rows,):
            return float("inf")
        return float((logprob[chosen].double().cpu() - exact).abs().max())

    with torch.no_grad():
        low = dtype != torch.float32
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
