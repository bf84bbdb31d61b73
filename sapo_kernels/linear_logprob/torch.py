"""linear_logprob in plain PyTorch, any device: one matrix product per chunk of rows, softmax in place."""

from __future__ import annotations

import torch

from . import gradient


def _exponentials(logits, row, targets, scale, softcap, slope_wanted=False):
    """logits [R, V] (overwritten if fp32 or fp64) -> (exp(logits - largest) [R, V], slope of the soft cap or None,
    chosen - largest [P], largest [R], log of the sums [R])."""
    part, slope = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32), None
    if scale != 1.0:
        part.mul_(scale)
    if softcap is not None:
        part.div_(softcap).tanh_()
        slope = part.square().neg_().add_(1) if slope_wanted else None
        part.mul_(softcap)
    # A row whose largest logit is infinite has no softmax: inf - inf makes it NaN, which callers report.
    top = part.amax(dim=-1)
    part.sub_(top[:, None])
    chosen = part[row, targets]
    return part.exp_(), slope, chosen, top, part.sum(dim=-1).log_()


def logprob_of_logits(logits, targets, target_ptr, scale=1.0, softcap=None):
    """logits [R, V] (overwritten if fp32 or fp64) -> logprob [P], lse [R] in fp32, or fp64 for fp64.

    Logits that want gradients stay, and so does a chunk of float32 for the backward pass.
    """
    row = gradient.row_of_target(target_ptr, targets)
    if torch.is_grad_enabled() and logits.requires_grad:
        part = (logits if logits.dtype == torch.float64 else logits.float()) * scale
        part = part if softcap is None else softcap * torch.tanh(part / softcap)
        lse = torch.logsumexp(part, -1)
        return part[row, targets] - lse[row], lse
    _, _, chosen, top, log_sum = _exponentials(logits, row, targets, scale, softcap)
    return chosen - log_sum[row], top + log_sum


def linear_logprob_torch(hidden, weight, targets, target_ptr, bias, scale, softcap, with_mean):
    """Arguments and result as in `sapo_kernels.ops`: -> logprob [P], lse [R], mean [R, D] or [0, D]."""
    logprobs, lses, means = [], [], [hidden.new_empty(0, hidden.shape[1])]
    for rows, mine, pointer in gradient.chunks(target_ptr, weight.shape[0]):
        # Low-precision heads round their logits here as the model itself does.
        logits = torch.nn.functional.linear(hidden[rows], weight, bias)
        row, ids = gradient.row_of_target(pointer, targets[mine]), targets[mine]
        p, slope, chosen, top, log_sum = _exponentials(logits, row, ids, scale, softcap, with_mean)
        logprobs.append(chosen - log_sum[row])
        lses.append(top + log_sum)
        if with_mean:
            p[row, ids] = 0
            if slope is not None:
                p.mul_(slope)
            # The largest p is 1, so that a low precision rounds none of weight away.
            mean = p.to(weight.dtype) @ weight
            means.append((mean / log_sum.exp()[:, None]).to(weight.dtype))
        del logits, p, slope
    return torch.cat(logprobs), torch.cat(lses), torch.cat(means)


def linear_logprob_backward_torch(grad_logprob, grad_lse, logprob, lse, mean, hidden, weight, targets, target_ptr,
                                  bias, scale, softcap, output_mask):  # fmt: skip
    """Gradients of (hidden, weight, bias), None where not `output_mask`."""

    def coefficients(rows, a, g, lse, ids, pointer):
        part, slope = torch.nn.functional.linear(rows, weight, bias).to(lse.dtype).mul_(scale), None
        if softcap is not None:
            part.div_(softcap).tanh_()
            slope = part.square().neg_().add_(1)
            part.mul_(softcap)
        part.sub_(lse[:, None]).exp_().mul_(a[:, None])
        part.index_put_((gradient.row_of_target(pointer, ids), ids), g, accumulate=True)
        if slope is not None:
            part.mul_(slope)
        return part.mul_(scale).to(rows.dtype)

    return gradient.gradients(coefficients, grad_logprob, grad_lse, logprob, lse, mean, hidden, weight, targets,
                              target_ptr, bias, scale, softcap, output_mask)  # fmt: skip
