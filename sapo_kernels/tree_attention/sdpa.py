"""tree_attention in plain PyTorch, any device: one dense attention per query block over its own few keys.

Sibling leaves share a block, a block's ancestors are a handful of slices, and nothing of size T x T exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def tree_attention_sdpa(
    q, k, v, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap, block_tokens, with_lse
):
    """Arguments and result as in `sapo_kernels.ops`: q [Tq, Hq, Dk] -> [Tq, Hq, Dv], and lse [Tq, Hq] or [0]."""
    num_past = k.shape[0] - q.shape[0]
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    lse = q.new_empty(q.shape[:2] if with_lse else 0, dtype=_compute(q))
    # A masked NaN still spreads through a matrix product: 0 * NaN is NaN. A sum is the cheapest test for one.
    sound = bool(torch.isfinite(k.sum(dtype=torch.float32) + v.sum(dtype=torch.float32)))
    plain = sound and softcap is None and sinks is None
    attend = _written_out if not plain else _fused if not with_lse else _fused_with_lse
    for block in _blocks(position, subtree_end, block_start, span_ptr, span, window, block_tokens):
        keys, values = (_gather(t, block.pieces).transpose(0, 1) for t in (k, v))
        rows = slice(block.first - num_past, block.stop - num_past)
        found, own_lse = attend(q[rows].transpose(0, 1), keys, values, block.hidden, sinks, scale, softcap)
        out[rows] = found.transpose(0, 1)
        if with_lse:
            lse[rows] = own_lse.transpose(0, 1)
    return out, lse


def tree_attention_backward_sdpa(
    grad, q, k, v, out, lse, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap,
    block_tokens,
):  # fmt: skip
    """Gradients of q, k, v in their dtype and of the sinks (or None), from the saved result and log-sum-exp.

    Weights are computed again block by block. A key's gradient is summed over blocks in their order, in float32.
    """
    num_past, kv_heads, groups = k.shape[0] - q.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    compute = _compute(q)
    # of the weights' softmax: what a row's gradient has in common
    delta = (grad.to(compute) * out.to(compute)).sum(-1)  # [Tq, Hq]
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(t.shape, dtype=compute, device=t.device) for t in (k, v))
    for block in _blocks(position, subtree_end, block_start, span_ptr, span, window, block_tokens):
        rows = slice(block.first - num_past, block.stop - num_past)
        size = block.stop - block.first

        def folded(t, rows=rows, size=size):
            """[n, Hq, D] -> [Hkv, G * n, D]: the query heads of one kv head are the rows of one product."""
            return t[rows].transpose(0, 1).reshape(kv_heads, groups * size, -1).to(compute)

        queries, ascent = folded(q), folded(grad)
        keys, values = (_gather(t, block.pieces).transpose(0, 1).to(compute) for t in (k, v))
        weights = torch.matmul(queries, keys.transpose(1, 2)).mul_(scale)
        slope = None
        if softcap is not None:
            weights.div_(softcap).tanh_()
            slope = 1 - weights.square()
            weights.mul_(softcap)
        weights.sub_(folded(lse[..., None])).exp_()
        weights.view(kv_heads, groups, size, -1).masked_fill_(block.hidden, 0.0)
        d = torch.matmul(ascent, values.transpose(1, 2)).sub_(folded(delta[..., None])).mul_(weights)
        if slope is not None:
            d.mul_(slope)
        d.mul_(scale)
        dq[rows] = torch.matmul(d, keys).view(kv_heads * groups, size, -1).transpose(0, 1).to(q.dtype)
        _scatter(dk, block.pieces, torch.matmul(d.transpose(1, 2), queries).transpose(0, 1))
        _scatter(dv, block.pieces, torch.matmul(weights.transpose(1, 2), ascent).transpose(0, 1))
    dsinks = None
    if sinks is not None:
        dsinks = -(torch.exp(sinks.to(compute) - lse) * delta).sum(0).to(sinks.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks


@dataclass
class _Block:
    """Queries ``[first, stop)``, the key ranges that they may see, and [n, m] bool which of those each does not."""

    first: int
    stop: int
    pieces: list[list[int]]
    hidden: torch.Tensor


def _blocks(position, subtree_end, block_start, span_ptr, span, window, block_tokens) -> Iterator[_Block]:
    starts, pointers, spans = block_start.tolist(), span_ptr.tolist(), span.tolist()
    hidden_inside = _hidden_inside(block_start, subtree_end, block_tokens)
    for b, (first, stop) in enumerate(zip(starts, starts[1:])):  # noqa: B905 (pairs of neighbours)
        pieces = [*spans[pointers[b] : pointers[b + 1]], [first, stop]]
        if len(pieces) == 2 and pieces[0][1] == first:  # one run of keys, nothing to copy
            pieces = [[pieces[0][0], stop]]
        size, count = stop - first, sum(j - i for i, j in pieces)
        hidden = torch.zeros(size, count, dtype=torch.bool, device=position.device)
        hidden[:, count - size :] = hidden_inside[b, :size, :size]
        if window is not None:
            hidden |= position[first:stop, None] - _gather(position, pieces) >= window
        yield _Block(first, stop, pieces, hidden)


def _compute(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _gather(rows: torch.Tensor, pieces: list[list[int]]) -> torch.Tensor:
    first, stop = pieces[0]
    return rows[first:stop] if len(pieces) == 1 else torch.cat([rows[i:j] for i, j in pieces])


def _scatter(total: torch.Tensor, pieces: list[list[int]], part: torch.Tensor) -> None:
    """Add rows that `_gather` would have read to where they came from."""
    done = 0
    for i, j in pieces:
        total[i:j] += part[done : done + j - i]
        done += j - i


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
    found = F.scaled_dot_product_attention(
        block[None], keys[None], values[None], attn_mask=bias, scale=scale, enable_gqa=grouped
    )
    return found[0], None


def _fused_with_lse(block, keys, values, hidden, sinks, scale, softcap):
    """The same and the log-sum-exp [Hq, n] of each row's logits, by the kernel behind it on a CPU."""
    if block.device.type != "cpu" or keys.shape[-1] != values.shape[-1]:
        return _written_out(block, keys, values, hidden, sinks, scale, softcap)
    groups = block.shape[0] // keys.shape[0]
    bias = torch.zeros(hidden.shape, dtype=block.dtype).masked_fill_(hidden, float("-inf"))
    # The query heads of one kv head as rows: the kernel knows no groups.
    rows = block.reshape(1, keys.shape[0], -1, block.shape[-1])
    found, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, keys[None], values[None], attn_mask=bias.repeat(groups, 1)[None, None], scale=scale
    )
    return found.reshape(block.shape), lse.reshape(block.shape[:2])


def _written_out(block, keys, values, hidden, sinks, scale, softcap):
    """The same with what scaled_dot_product_attention does not have: softcap, sinks, and non-finite keys and values
    that touch the queries that see them and no other. Softmax in fp32."""
    q_heads, size, width = block.shape
    kv_heads, groups, compute = keys.shape[0], block.shape[0] // keys.shape[0], _compute(block)
    # The query heads of one kv head are folded into the rows of one product.
    rows = block.reshape(kv_heads, groups * size, width).to(compute)
    logits = torch.matmul(rows, keys.to(compute).transpose(1, 2)).mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits = logits.view(kv_heads, groups, size, -1).masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        # The sink is one more logit whose value is never read.
        sink = sinks.to(compute).view(kv_heads, groups, 1, 1).expand(-1, -1, size, 1)
        logits = torch.cat([logits, sink], -1)
    lse = torch.logsumexp(logits, -1)
    weights = torch.softmax(logits, -1)[..., : keys.shape[1]]
    values = values.to(compute)
    bad = ~values.isfinite().all(-1)
    values = values.masked_fill(bad[..., None], 0.0)
    result = torch.matmul(weights.reshape(kv_heads, groups * size, -1), values).view(kv_heads, groups, size, -1)
    touched = (bad[:, None, :] & ~hidden).any(-1)
    result = result.masked_fill_(touched[:, None, :, None], float("nan"))
    return result.view(q_heads, size, -1).to(block.dtype), lse.view(q_heads, size)
