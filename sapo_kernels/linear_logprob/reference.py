"""The oracle of linear_logprob and of its gradients: the whole logits matrix."""

from __future__ import annotations

import torch


def _logits(hidden, weight, target_ptr, bias, scale, softcap):
    """(logits [R, V] in fp32 or fp64, slope of the soft cap at each, row of each target)."""
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(compute) @ weight.to(compute).T
    if bias is not None:
        logits = logits + bias.to(compute)
    logits = logits * scale
    slope = torch.ones_like(logits)
    if softcap is not None:
        slope = 1 / torch.cosh(logits / softcap) ** 2
        logits = softcap * torch.tanh(logits / softcap)
    return logits, slope, torch.repeat_interleave(torch.arange(len(hidden), device=hidden.device), target_ptr.diff())


def linear_logprob_reference(hidden, weight, targets, target_ptr, bias, scale, softcap, with_mean=False):
    """Same arguments and result as the other backends; needs ``[R, V]`` memory, computes in fp32 or fp64."""
    logits, slope, row = _logits(hidden, weight, target_ptr, bias, scale, softcap)
    logprob = torch.log_softmax(logits, dim=-1)
    mean = hidden.new_empty(0, hidden.shape[1])
    if with_mean:
        others = torch.softmax(logits, dim=-1).index_put((row, targets), logits.new_zeros(()))
        mean = ((others * slope) @ weight.to(logits.dtype)).to(hidden.dtype)
    return logprob[row, targets], torch.logsumexp(logits, dim=-1), mean


def linear_logprob_backward_reference(grad_logprob, grad_lse, logprob, lse, mean, hidden, weight, targets, target_ptr,
                                      bias, scale, softcap, output_mask):  # fmt: skip
    """Gradients of (hidden, weight, bias), None where not `output_mask`; the saved values are computed again."""
    logits, slope, row = _logits(hidden, weight, target_ptr, bias, scale, softcap)
    d = torch.zeros_like(logits)
    if grad_logprob is not None:
        d.index_put_((row, targets), grad_logprob.to(d.dtype), accumulate=True)
    of_lse = -d.sum(-1) + (0 if grad_lse is None else grad_lse)
    d = (d + torch.softmax(logits, -1) * of_lse[:, None]) * slope * scale
    found = d @ weight.to(d.dtype), d.T @ hidden.to(d.dtype), d.sum(0)
    return tuple(t.to(hidden.dtype) if want else None for t, want in zip(found, output_mask, strict=True))
