"""Backward pass of the Triton backend of tree_attention: one kernel for dQ, one for dK and dV, no atomics.

Weights are computed again from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691, section 3.1.2). The kernel
for dQ walks the keys of a tile of rows as the forward does. The kernel for dK and dV walks the queries of a tile of
keys: subtrees are contiguous, so these are one range. Every sum has one owner and a fixed order: the same bits again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..trie.tiles import KEY_TILE, build_pieces
from ..triton_tools import INTERPRET, capability, on_device
from .triton_common import (
    LOG2E,
    check,
    entries_of,
    key_rows,
    load_rows,
    rows_of,
    scalars,
    specialise,
    store_rows,
    stored_as,
    tiles_for,
)
from .triton_config import keys_config, queries_config

SUM = {"BLOCK": 4096 if INTERPRET else 1024, "num_warps": 4}


@triton.jit
def _weights(s, d, lse, delta, visible, logit_scale, cap_scale, HAS_SOFTCAP: tl.constexpr):
    """(softmax weights, gradient of the logits before `scale`) from products s = q.k and d = grad.v.

    lse is in log2 units; lse, delta and visible broadcast against s.
    """
    s = s * logit_scale
    slope = 1.0
    if HAS_SOFTCAP:
        t = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * s))
        slope = 1.0 - t * t
        s = cap_scale * t
    p = tl.where(visible, tl.exp2(s - lse), 0.0)
    return p, p * (d - delta) * slope


@triton.jit
def _of_keys(
    q, grad, dq, p_q, p_grad, m_m, lse, delta, p_k, p_v, m_n, visible, logit_scale, cap_scale, HEAD_K: tl.constexpr,
    HEAD_V: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    RELOAD: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq [M, K] and what keys add to it. RELOAD reads q and grad again, each when it is needed."""
    if RELOAD:
        q = load_rows(p_q, m_m, HEAD_K, BLOCK_K, True, UPCAST)
    k = load_rows(p_k, m_n, HEAD_K, BLOCK_K, MASKED, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if RELOAD:
        grad = load_rows(p_grad, m_m, HEAD_V, BLOCK_V, True, UPCAST)
    v = load_rows(p_v, m_n, HEAD_V, BLOCK_V, MASKED, UPCAST)
    d = tl.dot(grad, tl.trans(v), input_precision="ieee")
    _, ds = _weights(s, d, lse[:, None], delta[:, None], visible, logit_scale, cap_scale, HAS_SOFTCAP)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["num_past", "tokens", "kv_heads", "tile_tokens", "parts", "window"])
def _queries_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, position_ptr, subtree_end_ptr, begin_ptr, chunks_ptr,
    seen_from_ptr, entry_ptr, dq_ptr, delta_ptr, num_past, tokens, kv_heads, tile_tokens, parts, stride_q_token,
    stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head, logit_scale, cap_scale, window, scale,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, HEAD_K: tl.constexpr, HEAD_V: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, RELOAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of one of the `parts` of a tile, BLOCK_M rows, and their delta [Tq, Hq] = sum of grad * out."""
    i_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    i_part = tl.program_id(0) // kv_heads % parts
    i_tile = tl.program_id(0) // kv_heads // parts
    i_token, i_group, m_m = rows_of(i_tile, i_part, tile_tokens, tokens, GROUP, BLOCK_M)
    i_query = num_past + i_token
    i_q_head = i_head * GROUP + i_group
    i_row = i_token.to(tl.int64) * kv_heads * GROUP + i_q_head
    p_grad = grad_ptr + i_row * HEAD_V
    grad = load_rows(p_grad, m_m, HEAD_V, BLOCK_V, True, UPCAST)
    out = load_rows(out_ptr + i_row * HEAD_V, m_m, HEAD_V, BLOCK_V, True, UPCAST)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + i_row, delta, mask=m_m)
    lse = tl.load(lse_ptr + i_row, mask=m_m, other=0.0) * LOG2E
    p_q = q_ptr + i_token.to(tl.int64) * stride_q_token + i_q_head * stride_q_head
    q = load_rows(p_q, m_m, HEAD_K, BLOCK_K, True, UPCAST)
    k_ptr += i_head * stride_k_head
    v_ptr += i_head * stride_v_head
    dq = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    p_query = i_query
    if HAS_WINDOW:
        p_query = tl.load(position_ptr + i_query, mask=m_m, other=2147483647)
    entry_ptr, chunks, skip, count = entries_of(
        entry_ptr, begin_ptr, chunks_ptr, i_tile, p_query, window, CHUNK, HAS_WINDOW
    )
    for n in tl.range(skip, chunks, BLOCK_N, disable_licm=RELOAD):
        p_k, p_v, m_n, visible = key_rows(
            n, count, entry_ptr, i_query, p_query, k_ptr, v_ptr, seen_from_ptr, subtree_end_ptr, position_ptr, num_past,
            window, stride_k_token, stride_v_token, 0, 0, 0, 0, True, CHUNK, False, HAS_WINDOW, BLOCK_N,
        )  # fmt: skip
        dq = _of_keys(
            q, grad, dq, p_q, p_grad, m_m, lse, delta, p_k, p_v, m_n, visible, logit_scale, cap_scale, HEAD_K, HEAD_V,
            HAS_SOFTCAP, BLOCK_K, BLOCK_V, RELOAD, False, UPCAST,
        )  # fmt: skip
    for n in tl.range(chunks // CHUNK, count, BLOCK_N, disable_licm=RELOAD):
        p_k, p_v, m_n, visible = key_rows(
            n, count, entry_ptr, i_query, p_query, k_ptr, v_ptr, seen_from_ptr, subtree_end_ptr, position_ptr, num_past,
            window, stride_k_token, stride_v_token, 0, 0, 0, 0, False, CHUNK, False, HAS_WINDOW, BLOCK_N,
        )  # fmt: skip
        dq = _of_keys(
            q, grad, dq, p_q, p_grad, m_m, lse, delta, p_k, p_v, m_n, visible, logit_scale, cap_scale, HEAD_K, HEAD_V,
            HAS_SOFTCAP, BLOCK_K, BLOCK_V, RELOAD, True, UPCAST,
        )  # fmt: skip
    store_rows(dq_ptr + i_row * HEAD_K, dq * scale, m_m, HEAD_K, BLOCK_K)


@triton.jit
def _of_queries(
    k, v, dk, dv, row, last_row, i_head, o_n, begin, end, p_key, grad_ptr, q_ptr, lse_ptr, delta_ptr, position_ptr,
    num_past, heads, stride_q_token, stride_q_head, logit_scale, cap_scale, window,
    GROUP: tl.constexpr, HEAD_K: tl.constexpr, HEAD_V: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dk [N, K], dv [N, V] and what BLOCK_M (token, q head) rows from `row` on add to them."""
    o_m = row + tl.arange(0, BLOCK_M).to(tl.int64)
    m_m = o_m < last_row
    i_token = o_m // GROUP
    i_q_head = i_head * GROUP + o_m % GROUP
    i_row = i_token * heads + i_q_head
    p_q = q_ptr + i_token * stride_q_token + i_q_head * stride_q_head
    q = load_rows(p_q, m_m, HEAD_K, BLOCK_K, True, UPCAST)
    grad = load_rows(grad_ptr + i_row * HEAD_V, m_m, HEAD_V, BLOCK_V, True, UPCAST)
    lse = tl.load(lse_ptr + i_row, mask=m_m, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + i_row, mask=m_m, other=0.0)
    # Rows past the last one are zeros and add nothing.
    i_query = (num_past + i_token).to(tl.int32)
    visible = (begin[:, None] <= i_query[None, :]) & (i_query[None, :] < end[:, None])
    if HAS_WINDOW:
        p_query = tl.load(position_ptr + i_query, mask=m_m, other=0)
        visible = visible & (p_query[None, :] - p_key[:, None] < window)
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    d = tl.dot(v, tl.trans(grad), input_precision="ieee")
    p, ds = _weights(s, d, lse[None, :], delta[None, :], visible, logit_scale, cap_scale, HAS_SOFTCAP)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["num_past", "keys", "kv_heads", "window"])
def _keys_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, position_ptr, subtree_end_ptr, seen_from_ptr, piece_ptr, dk_ptr,
    dv_ptr, part_k_ptr, part_v_ptr, num_past, keys, kv_heads, stride_q_token, stride_q_head, stride_k_token,
    stride_k_head, stride_v_token, stride_v_head, logit_scale, cap_scale, window, scale,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, HEAD_K: tl.constexpr, HEAD_V: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, KEY_TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one kv head, or what the queries of one piece (trie/tiles.py) bring to them."""
    i_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    i_part = tl.program_id(0) // kv_heads % (KEY_TILE // BLOCK_N)
    piece_ptr += tl.program_id(0) // kv_heads // (KEY_TILE // BLOCK_N) * 4
    slot = tl.load(piece_ptr + 3).to(tl.int64)
    o_t = i_part * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n = tl.load(piece_ptr) * KEY_TILE + o_t
    m_n = o_n < keys
    end = tl.load(subtree_end_ptr + o_n, mask=m_n, other=0)
    begin = tl.load(seen_from_ptr + o_n, mask=m_n, other=2147483647)
    p_key = o_n
    if HAS_WINDOW:
        p_key = tl.load(position_ptr + o_n, mask=m_n, other=0)
    p_k = k_ptr + o_n.to(tl.int64) * stride_k_token + i_head * stride_k_head
    p_v = v_ptr + o_n.to(tl.int64) * stride_v_token + i_head * stride_v_head
    k = load_rows(p_k, m_n, HEAD_K, BLOCK_K, True, UPCAST)
    v = load_rows(p_v, m_n, HEAD_V, BLOCK_V, True, UPCAST)
    dk = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    row = (tl.maximum(tl.min(begin, 0), tl.load(piece_ptr + 1)) - num_past).to(tl.int64) * GROUP
    last_row = (tl.minimum(tl.max(end, 0), tl.load(piece_ptr + 2)) - num_past).to(tl.int64) * GROUP
    for m in tl.range(row, last_row, BLOCK_M):
        dk, dv = _of_queries(
            k, v, dk, dv, m, last_row, i_head, o_n, begin, end, p_key, grad_ptr, q_ptr, lse_ptr, delta_ptr,
            position_ptr, num_past, kv_heads * GROUP, stride_q_token, stride_q_head, logit_scale, cap_scale, window,
            GROUP, HEAD_K, HEAD_V, HAS_WINDOW, HAS_SOFTCAP, BLOCK_M, BLOCK_K, BLOCK_V, UPCAST,
        )  # fmt: skip
    dk = dk * scale
    if slot < 0:
        i_row = o_n.to(tl.int64) * kv_heads + i_head
        store_rows(dk_ptr + i_row * HEAD_K, dk, m_n, HEAD_K, BLOCK_K)
        store_rows(dv_ptr + i_row * HEAD_V, dv, m_n, HEAD_V, BLOCK_V)
    else:
        i_row = (slot * KEY_TILE + o_t) * kv_heads + i_head
        store_rows(part_k_ptr + i_row * HEAD_K, dk, m_n, HEAD_K, BLOCK_K)
        store_rows(part_v_ptr + i_row * HEAD_V, dv, m_n, HEAD_V, BLOCK_V)


@triton.jit(do_not_specialize=["pieces", "size", "width"])
def _sum_kernel(piece_ptr, part_ptr, sum_ptr, pieces, size, width, KEY_TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the slots of each key tile, in their order. `width`: numbers a key has; `size`: all of them."""
    i_piece = tl.program_id(0)
    tile = tl.load(piece_ptr + 4 * i_piece)
    before = tl.load(piece_ptr + 4 * i_piece - 4, mask=i_piece > 0, other=-1)
    slot = tl.load(piece_ptr + 4 * i_piece + 3).to(tl.int64)
    if (slot >= 0) & (before != tile):
        o = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        o_sum = tile.to(tl.int64) * KEY_TILE * width + o
        m = (o < KEY_TILE * width) & (o_sum < size)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        more = True
        while more:
            total += tl.load(part_ptr + slot * KEY_TILE * width + o, mask=m, other=0.0)
            slot += 1
            i_piece += 1
            more = tl.load(piece_ptr + 4 * i_piece, mask=i_piece < pieces, other=-1) == tile
        tl.store(sum_ptr + o_sum, total.to(sum_ptr.dtype.element_ty), mask=m)


def tree_attention_backward_triton(
    grad, q, k, v, out, lse, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap,
    block_tokens, tiles=None, tokens=0, pieces=None,
):  # fmt: skip
    """Same arguments and results as the reference, from the saved result and log-sum-exp; tiles as for the forward.

    Products, weights and sums are float32; weights and their gradients are rounded to q's dtype before the products
    that sum them up, as in the forward pass.
    """
    check(q, k, v)
    (queries, q_heads, head_k), (keys, kv_heads, head_v) = q.shape, v.shape
    group, wide, num_past = q_heads // kv_heads, max(head_k, head_v), keys - queries
    part = capability(q.device)
    grad, out, lse = (t.contiguous() for t in (grad, out, lse))
    dq, dk, dv = (torch.empty(t.shape, dtype=stored_as(q), device=q.device) for t in (q, k, v))
    delta = torch.empty(queries, q_heads, dtype=torch.float32, device=q.device)
    layout = (subtree_end, block_start, span_ptr, span)
    walk, tokens = tiles_for(tiles, tokens, q, keys, group, *layout)
    if pieces is None:
        pieces = torch.from_numpy(build_pieces(*(t.cpu() for t in layout), group)).to(q.device)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    rest = (*strides, *scalars(scale, window, softcap), scale)
    constants = specialise(head_k, head_v, group, window, softcap)
    with on_device(q):
        options = queries_config(wide, q.dtype, part)
        parts = triton.cdiv(tokens * group, options["BLOCK_M"])
        _queries_kernel[(walk[1].shape[0] * parts * kv_heads,)](
            grad, q, k, v, out, lse, position, subtree_end, *walk, dq, delta, num_past, queries, kv_heads, tokens,
            parts, *rest, **constants, **options, enable_fp_fusion=True,
        )  # fmt: skip
        options = keys_config(wide, q.dtype, part)
        slots = 2 * (len(pieces) - triton.cdiv(keys, KEY_TILE))
        parts = [torch.empty(slots * KEY_TILE * t.shape[1:].numel(), device=q.device) for t in (k, v)]
        _keys_kernel[(len(pieces) * (KEY_TILE // options["BLOCK_N"]) * kv_heads,)](
            grad, q, k, v, lse, delta, position, subtree_end, walk[2], pieces, dk, dv, *parts, num_past, keys, kv_heads,
            *rest, **constants, **options, KEY_TILE=KEY_TILE, enable_fp_fusion=True,
        )  # fmt: skip
        for partial, total in zip(parts, (dk, dv) if slots else (), strict=False):
            width = total.shape[1:].numel()
            _sum_kernel[(len(pieces), triton.cdiv(KEY_TILE * width, SUM["BLOCK"]))](
                pieces, partial, total, len(pieces), total.numel(), width, KEY_TILE=KEY_TILE, **SUM
            )
    dsinks = None
    if sinks is not None:
        dsinks = -(torch.exp(sinks.float() - lse) * delta).sum(0).to(sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks
