"""linear_logprob in plain PyTorch, any device: one matrix product per chunk of rows, softmax in place."""

from __future__ import annotations

import torch

# fp32 logits of one chunk of rows. With fewer rows the product waits for the weights (docs/measured.md).
CHUNK_BYTES = 256 << 20


def chunk_rows(vocabulary: int) -> int:
    """Rows whose fp32 logits fill one chunk."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def logprob_of_logits(logits, targets, target_ptr, scale=1.0, softcap=None):
    """logits [R, V] (overwritten if fp32 or fp64) -> logprob [P], lse [R] in fp32, or fp64 for fp64."""
    part = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if scale != 1.0:
        part.mul_(scale)
    if softcap is not None:
        part.div_(softcap).tanh_().mul_(softcap)
    row = torch.arange(len(part), device=part.device).repeat_interleave(target_ptr.diff(), output_size=len(targets))
    chosen = part[row, targets]
    top = part.amax(dim=-1)
    # A row whose largest logit is infinite has no softmax: inf - inf makes it NaN, which callers report.
    lse = part.sub_(top[:, None]).exp_().sum(dim=-1).log_().add_(top)
    return chosen - lse[row], lse


def linear_logprob_torch(hidden, weight, targets, target_ptr, bias, scale, softcap):
    """Arguments and result as in `sapo_kernels.ops`: -> logprob [P], lse [R], fp32 (fp64 for fp64 inputs)."""
    step = chunk_rows(weight.shape[0])
    edges = [*range(0, hidden.shape[0], step), hidden.shape[0]]
    cuts = target_ptr[torch.tensor(edges, device=target_ptr.device)].tolist()
    parts = []
    for i, (first, stop) in enumerate(zip(edges, edges[1:])):  # noqa: B905 (pairs of neighbours)
        # Low-precision heads round their logits here as the model itself does.
        logits = torch.nn.functional.linear(hidden[first:stop], weight, bias)
        pointer = target_ptr[first : stop + 1] - cuts[i]
        parts.append(logprob_of_logits(logits, targets[cuts[i] : cuts[i + 1]], pointer, scale, softcap))
    return torch.cat([p for p, _ in parts]), torch.cat([s for _, s in parts])
