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
    del block_tokens
    queries, q_heads, _ = q.shape
    kv_heads = k.shape[1]
    carried, groups = k.shape[0] - queries, q_heads // kv_heads
    out = q.new_empty(queries, q_heads, v.shape[-1])
    # [Tq, Hkv, G, D]: the query heads of one kv head are folded into the rows of one product.
    q_grouped, out_grouped = q.unflatten(1, (kv_heads, groups)), out.view(queries, kv_heads, groups, -1)
    starts, pointers, spans = block_start.tolist(), span_ptr.tolist(), span.tolist()
    plain = softcap is None and sinks is None
    attend = _fused if plain else _written_out

    for b, (first, stop) in enumerate(zip(starts, starts[1:])):  # noqa: B905 (pairs of neighbours)
        pieces = [*spans[pointers[b] : pointers[b + 1]], [first, stop]]
        keys = torch.cat([k[i:j] for i, j in pieces]).transpose(0, 1)
        values = torch.cat([v[i:j] for i, j in pieces]).transpose(0, 1)
        size, outside = stop - first, keys.shape[1] - (stop - first)
        seen = torch.ones(size, outside + size, dtype=torch.bool, device=q.device)
        own = torch.arange(first, stop, device=q.device)
        seen[:, outside:] = (own <= own[:, None]) & (own[:, None] < subtree_end[first:stop])
        if window is not None:
            key_position = torch.cat([position[i:j] for i, j in pieces])
            seen &= position[first:stop, None] - key_position < window
        block = q_grouped[first - carried : stop - carried].permute(1, 2, 0, 3)  # [Hkv, G, size, D]
        result = attend(block, keys, values, seen, sinks, scale, softcap)
        out_grouped[first - carried : stop - carried] = result.permute(2, 0, 1, 3)
    return out


def _fused(block, keys, values, seen, sinks, scale, softcap):
    """[Hkv, G, n, Dk] x [Hkv, m, Dk] -> [Hkv, G, n, Dv] through scaled_dot_product_attention."""
    kv_heads, groups, size, width = block.shape
    bias = torch.zeros(seen.shape, dtype=block.dtype, device=block.device).masked_fill_(~seen, float("-inf"))
    result = F.scaled_dot_product_attention(
        block.reshape(1, kv_heads, groups * size, width),
        keys[None],
        values[None],
        attn_mask=bias.repeat(groups, 1),
        scale=scale,
    )
    return result.view(kv_heads, groups, size, -1)


def _written_out(block, keys, values, seen, sinks, scale, softcap):
    """The same with softcap and sinks, which scaled_dot_product_attention does not have; softmax in fp32."""
    kv_heads, groups, size, width = block.shape
    compute = torch.float64 if block.dtype == torch.float64 else torch.float32
    rows = block.reshape(kv_heads, groups * size, width).to(compute)
    logits = torch.matmul(rows, keys.to(compute).transpose(1, 2)).mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits = logits.view(kv_heads, groups, size, -1).masked_fill_(~seen, float("-inf"))
    if sinks is not None:
        # The sink is one more logit whose value is never read.
        sink = sinks.to(compute).view(kv_heads, groups, 1, 1).expand(-1, -1, size, 1)
        weights = torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(logits, -1)
    weights = weights.reshape(kv_heads, groups * size, -1)
    return torch.matmul(weights, values.to(compute)).to(block.dtype).view(kv_heads, groups, size, -1)
