"""The oracle of tree_attention: a dense visibility matrix from parent pointers, softmax written out."""

from __future__ import annotations

import torch


def visible_keys(position: torch.Tensor, subtree_end: torch.Tensor, window: int | None) -> torch.Tensor:
    """[Tk, Tk] bool, ``[i, j]`` true where query i sees key j, by walking from each token to its root.

    The parent of a token is the nearest earlier token one level up whose subtree still contains it, which is another
    way to read the layout than the kernels' interval test.
    """
    depth, end = position.tolist(), subtree_end.tolist()
    size = len(depth)
    last_at: dict[int, int] = {}
    parent = [-1] * size
    for i in range(size):
        above = last_at.get(depth[i] - 1, -1)
        if above >= 0 and end[above] > i:
            parent[i] = above
        last_at[depth[i]] = i
    seen = torch.zeros(size, size, dtype=torch.bool)
    for i in range(size):
        j = i
        while j >= 0 and (window is None or depth[i] - depth[j] < window):
            seen[i, j] = True
            j = parent[j]
    return seen


def _weights(q, k, seen, sinks, scale, softcap):
    """(softmax weights [Hq, Tq, Tk], of the sinks [Hq, Tq], log-sum-exp [Hq, Tq], slope of the soft cap) in fp32/64."""
    key = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("ihd,jhd->hij", q, key) * scale
    slope = torch.ones_like(logits)
    if softcap is not None:
        slope = 1 / torch.cosh(logits / softcap) ** 2
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, float("-inf"))
    top = logits.amax(-1, keepdim=True) if q.shape[0] else logits[..., :1]
    of_sink = torch.zeros_like(top)
    if sinks is not None:
        top = torch.maximum(top, sinks.to(q.dtype)[:, None, None])
        of_sink = torch.exp(sinks.to(q.dtype)[:, None, None] - top)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True) + of_sink
    return weights / total, (of_sink / total)[..., 0], (top + total.log())[..., 0], slope


def tree_attention_reference(
    q, k, v, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap, block_tokens, with_lse
):
    """Same arguments and result as the other backends; needs ``[Hq, Tq, Tk]`` memory, computes in fp32 or fp64."""
    del block_start, span_ptr, span, block_tokens  # the layout's shortcuts are what this checks
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    seen = visible_keys(position.cpu(), subtree_end.cpu(), window)[len(k) - len(q) :].to(q.device)
    weights, _, lse, _ = _weights(q.to(compute), k.to(compute), seen, sinks, scale, softcap)
    value = v.to(compute).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    # A hidden value must not matter, even where it is NaN (0 * NaN is NaN), and a visible one must.
    bad = ~value.isfinite().all(-1)  # [Tk, Hq]
    out = torch.einsum("hij,jhd->ihd", weights, value.masked_fill(bad[..., None], 0.0))
    touched = (seen[:, :, None] & bad).any(1)
    out = out.masked_fill(touched[..., None], float("nan")).to(q.dtype)
    return out, lse.T.contiguous() if with_lse else lse.new_empty(0)


def tree_attention_backward_reference(
    grad, q, k, v, out, lse, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap,
    block_tokens,
):  # fmt: skip
    """Gradients of q, k, v and the sinks (or None): the chain rule over the dense weights, all computed again."""
    del out, lse, block_start, span_ptr, span, block_tokens
    compute, groups = torch.float64 if q.dtype == torch.float64 else torch.float32, q.shape[1] // k.shape[1]
    seen = visible_keys(position.cpu(), subtree_end.cpu(), window)[len(k) - len(q) :].to(q.device)
    grad, q_, k_, v_ = (t.to(compute) for t in (grad, q, k, v))
    weights, of_sink, _, slope = _weights(q_, k_, seen, sinks, scale, softcap)
    key, value = (t.repeat_interleave(groups, dim=1) for t in (k_, v_))
    of_weights = torch.einsum("ihd,jhd->hij", grad, value)
    mean = (weights * of_weights).sum(-1, keepdim=True)
    of_logits = weights * (of_weights - mean) * slope * scale
    dk, dv = torch.einsum("hij,ihd->jhd", of_logits, q_), torch.einsum("hij,ihd->jhd", weights, grad)
    dk, dv = (t.unflatten(1, (-1, groups)).sum(2) for t in (dk, dv))
    dsinks = None if sinks is None else -(of_sink * mean[..., 0]).sum(-1).to(sinks.dtype)
    return torch.einsum("hij,jhd->ihd", of_logits, key).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks
