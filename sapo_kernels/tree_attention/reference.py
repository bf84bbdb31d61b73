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


def tree_attention_reference(
    q, k, v, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap, block_tokens
):
    """Same arguments and result as the other backends; needs ``[Hq, Tq, Tk]`` memory, computes in fp32 or fp64."""
    del block_start, span_ptr, span, block_tokens  # the layout's shortcuts are what this checks
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    carried, groups = k.shape[0] - q.shape[0], q.shape[1] // k.shape[1]
    seen = visible_keys(position.cpu(), subtree_end.cpu(), window)[carried:].to(q.device)
    key = k.to(compute).repeat_interleave(groups, dim=1)
    value = v.to(compute).repeat_interleave(groups, dim=1)
    logits = torch.einsum("ihd,jhd->hij", q.to(compute), key) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, float("-inf"))
    top = logits.amax(-1, keepdim=True) if q.shape[0] else logits[..., :1]
    if sinks is not None:
        top = torch.maximum(top, sinks.to(compute)[:, None, None])
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.to(compute)[:, None, None] - top)
    weights = weights / total
    # A hidden value must not matter, even where it is NaN (0 * NaN is NaN), and a visible one must.
    bad = ~value.isfinite().all(-1)  # [Tk, Hq]
    out = torch.einsum("hij,jhd->ihd", weights, value.masked_fill(bad[..., None], 0.0))
    touched = (seen[:, :, None] & bad).any(1)
    return out.masked_fill(touched[..., None], float("nan")).to(q.dtype)
