"""The public linear_logprob: checks, then one call of the operator."""

from __future__ import annotations

import math

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
    *,
    target_ptr: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (nats) of target tokens under a linear head, without keeping the logits.

    ``logits = (hidden @ weight.T + bias) * scale``, soft-capped to ``softcap * tanh(logits / softcap)`` if given;
    ``lse = logsumexp(logits)``, ``logprob = logits[target] - lse``. Equals::

        torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0]

    Args:
        hidden: [R, D] float32, bfloat16, float16 or float64.
        weight: [V, D], same dtype and device.
        targets: [P] int64 in ``[0, V)``; without ``target_ptr`` one per row (P = R).
        bias: [V] or None.
        scale: factor on the logits, finite.
        softcap: positive, or None for off.
        impl: "auto", "triton", "torch" or "reference".
        target_ptr: [R + 1] int64, not decreasing, from 0 to P: row r owns ``targets[target_ptr[r]:target_ptr[r + 1]]``,
            none, one or many. Many targets cost one row of the product.

    Returns:
        (logprob [P], lse [R]) in float32 (float64 for float64 inputs). A row with a NaN or +inf logit gives
        non-finite results, never a plausible number.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was got; nothing was computed. Target ids
            are checked on the host, which waits for the device once; `torch.ops.sapo_kernels.linear_logprob` does not.
        RuntimeError: an explicit ``impl`` that cannot run here.

    Gradients flow from both results to hidden, weight and bias, each computed only if it is wanted; double backward is
    refused. Memory beside results and gradients: logits of one chunk of rows, and [R, D] for the backward pass of a
    frozen head, whose work is done in the forward pass while the logits are there. The gradient of a weight takes the
    logits once more.

    Numerics: log-sum-exp in float32 (float64 for float64 inputs); deterministic, gradients too.
    Source: SAPO, arXiv 2606.01967; the online form as in arXiv 1805.02867.
    """
    if target_ptr is None:
        if targets.shape != hidden.shape[:1]:
            raise ValueError(
                f"linear_logprob: targets: expected [{hidden.shape[0]}], one per row, got {list(targets.shape)}"
            )
        target_ptr = torch.arange(hidden.shape[0] + 1, device=hidden.device)
    _check(hidden, weight, targets, target_ptr, bias, scale, softcap)
    hidden, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (hidden, weight))
    logprob, lse, _ = torch.ops.sapo_kernels.linear_logprob(
        hidden, weight, targets.contiguous(), target_ptr.contiguous(), bias, float(scale), softcap, impl,
        wants_mean(hidden, weight, bias),
    )  # fmt: skip
    return logprob, lse


def wants_mean(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the backward pass will be of a frozen head: with the operator's mean it needs no logits."""
    head_wanted = weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and hidden.requires_grad and not head_wanted


def _check(hidden, weight, targets, target_ptr, bias, scale, softcap) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.numel():
        raise ValueError(
            f"linear_logprob: expected hidden [R, D] and weight [V, D], got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, t in tensors.items():
        if t is not None and (t.dtype not in DTYPES or t.dtype != hidden.dtype):
            raise TypeError(f"linear_logprob: {name}: expected one of {DTYPES}, the same as hidden, got {t.dtype}")
    for name, t in {**tensors, "targets": targets, "target_ptr": target_ptr}.items():
        if t is not None and t.device != hidden.device:
            raise ValueError(f"linear_logprob: {name}: expected hidden's device {hidden.device}, got {t.device}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_logprob: bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    for name, t, size in (("targets", targets, None), ("target_ptr", target_ptr, hidden.shape[0] + 1)):
        if t.dtype != torch.int64 or t.dim() != 1 or (size is not None and t.shape[0] != size):
            what = "1-D" if size is None else f"[{size}]"
            raise ValueError(f"linear_logprob: {name}: expected int64 {what}, got {t.dtype} {list(t.shape)}")
    if not math.isfinite(scale):
        raise ValueError(f"linear_logprob: scale: expected a finite number, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"linear_logprob: softcap: expected a positive number or None, got {softcap}")
    steps = target_ptr.diff()
    if int(target_ptr[0]) != 0 or int(target_ptr[-1]) != len(targets) or (len(steps) and int(steps.min()) < 0):
        raise ValueError(f"linear_logprob: target_ptr: expected ascending offsets from 0 to {len(targets)}")
    if len(targets):
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"linear_logprob: targets: expected ids in [0, {weight.shape[0]}), got {low if low < 0 else high}"
            )
