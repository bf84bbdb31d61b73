"""tree_attention in plain PyTorch, any device: one dense attention per query block over its own few keys.

Sibling leaves share a block, a block's ancestors are a handful of slices, and nothing of size T x T exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def tree_attention_sdpa(
    q, k, v, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap, block_tokens
):
    """Arguments and result as in `sapo_kernels.ops`: q [Tq, Hq, Dk] -> [Tq, Hq, Dv] in q's dtype."""
    carried = k.shape[0] - q.shape[0]
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    starts, pointers, spans = block_start.tolist(), span_ptr.tolist(), span.tolist()
    # A masked NaN still spreads through a matrix product: 0 * NaN is NaN. A sum is the cheapest test for one.
    sound = bool(torch.isfinite(k.sum(dtype=torch.float32) + v.sum(dtype=torch.float32)))
    attend = _fused if sound and softcap is None and sinks is None else _written_out
    hidden_inside = _hidden_inside(block_start, subtree_end, block_tokens)

    for b, (first, stop) in enumerate(zip(starts, starts[1:])):  # noqa: B905 (pairs of neighbours)
        pieces = [*spans[pointers[b] : pointers[b + 1]], [first, stop]]
        if len(pieces) == 2 and pieces[0][1] == first:  # one run of keys, nothing to copy
            pieces = [[pieces[0][0], stop]]
        keys, values = (_gather(t, pieces).transpose(0, 1) for t in (k, v))
        size = stop - first
        hidden = torch.zeros(size, keys.shape[1], dtype=torch.bool, device=q.device)
        hidden[:, keys.shape[1] - size :] = hidden_inside[b, :size, :size]
        if window is not None:
            hidden |= position[first:stop, None] - _gather(position, pieces) >= window
        block = q[first - carried : stop - carried].transpose(0, 1)
        out[first - carried : stop - carried] = attend(block, keys, values, hidden, sinks, scale, softcap).transpose(
            0, 1
        )
    return out


def _gather(rows: torch.Tensor, pieces: list[list[int]]) -> torch.Tensor:
    first, stop = pieces[0]
    return rows[first:stop] if len(pieces) == 1 else torch.cat([rows[i:j] for i, j in pieces])


def _hidden_inside(block_start, subtree_end, block_tokens: int) -> torch.Tensor:
    """[B, n, n] bool for all blocks at once: which of a block's own keys each of its queries does not see."""
    own = block_start[:-1, None] + torch.arange(block_tokens, device=block_start.device)
    end = subtree_end[own.clamp(max=len(subtree_end) - 1)]
    query, key = own[:, :, None], own[:, None, :]
    return (key > query) | (query >= end[:, None, :])


def _fused(block, keys, values, hidden, sinks, scale, softcap):
    """[Hq, n, Dk] x [Hkv, m, Dk] -> [Hq, n, Dv] through scaled_dot_product_attention."""
    bias = torch.zeros(hidden.shape, dtype=block.dtype, device=block.device).masked_fill_(hidden, float("-inf"))
    grouped = block.shape[0] != keys.shape[0]
    return F.scaled_dot_product_attention(
        block[None], keys[None], values[None], attn_mask=bias, scale=scale, enable_gqa=grouped
    )[0]


def _written_out(block, keys, values, hidden, sinks, scale, softcap):
    """The same with what scaled_dot_product_attention does not have: softcap, sinks, and non-finite keys and values
    that touch the queries that see them and no other. Softmax in fp32."""
    q_heads, size, width = block.shape
    kv_heads, groups = keys.shape[0], block.shape[0] // keys.shape[0]
    compute = torch.float64 if block.dtype == torch.float64 else torch.float32
    # The query heads of one kv head are folded into the rows of one product.
    rows = block.reshape(kv_heads, groups * size, width).to(compute)
    logits = torch.matmul(rows, keys.to(compute).transpose(1, 2)).mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits = logits.view(kv_heads, groups, size, -1).masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        # The sink is one more logit whose value is never read.
        sink = sinks.to(compute).view(kv_heads, groups, 1, 1).expand(-1, -1, size, 1)
        weights = torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(logits, -1)
    values = values.to(compute)
    bad = ~values.isfinite().all(-1)
    values = values.masked_fill(bad[..., None], 0.0)
    result = torch.matmul(weights.reshape(kv_heads, groups * size, -1), values).view(kv_heads, groups, size, -1)
    touched = (bad[:, None, :] & ~hidden).any(-1)
    result = result.masked_fill_(touched[:, None, :, None], float("nan"))
    return result.view(q_heads, size, -1).to(block.dtype)
