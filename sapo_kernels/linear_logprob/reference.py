"""The oracle of linear_logprob: the whole logits matrix, then log_softmax."""

from __future__ import annotations

import torch


def linear_logprob_reference(hidden, weight, targets, target_ptr, bias, scale, softcap):
    """Same arguments and result as the other backends; needs ``[R, V]`` memory, computes in fp32 or fp64."""
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(compute) @ weight.to(compute).T
    if bias is not None:
        logits = logits + bias.to(compute)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    row = torch.repeat_interleave(torch.arange(hidden.shape[0], device=hidden.device), target_ptr.diff())
    lse = torch.logsumexp(logits, dim=-1)
    return torch.log_softmax(logits, dim=-1)[row, targets], lse
