"""Backward pass of the Triton backend of tree_attention: one kernel for dQ, one for dK and dV, no atomics.

Weights are computed again from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691, section 3.1.2). The kernel
for dQ walks the keys of a tile of rows as the forward does. The kernel for dK and dV walks the queries of a tile of
keys: subtrees are contiguous, so these are one range. Every sum has one owner and a fixed order: the same bits again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_common import LOG2E, capability, check, load_rows, on_device, scalars, specialise, store_rows, stored_as
from .triton_config import keys_config, queries_config


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
    q, grad, dq, lse, delta, o_n, stop, i_query, p_query, k_ptr, v_ptr, position_ptr, subtree_end_ptr, stride_k_token,
    stride_v_token, logit_scale, cap_scale, window, HEAD_K: tl.constexpr, HEAD_V: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dq [M, K] and what the keys o_n [BLOCK_N] below `stop` add to it."""
    m_n = o_n < stop
    k = load_rows(k_ptr, o_n.to(tl.int64) * stride_k_token, m_n, HEAD_K, BLOCK_K, UPCAST)
    v = load_rows(v_ptr, o_n.to(tl.int64) * stride_v_token, m_n, HEAD_V, BLOCK_V, UPCAST)
    end = tl.load(subtree_end_ptr + o_n, mask=m_n, other=0)
    visible = (o_n[None, :] <= i_query[:, None]) & (i_query[:, None] < end[None, :])
    if HAS_WINDOW:
        p_key = tl.load(position_ptr + o_n, mask=m_n, other=0)
        visible = visible & (p_query[:, None] - p_key[None, :] < window)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    d = tl.dot(grad, tl.trans(v), input_precision="ieee")
    _, ds = _weights(s, d, lse[:, None], delta[:, None], visible, logit_scale, cap_scale, HAS_SOFTCAP)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["carried", "tiles_per_block", "window"])
def _queries_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, position_ptr, subtree_end_ptr, block_start_ptr, span_ptr_ptr,
    span_ptr, dq_ptr, delta_ptr, carried, tiles_per_block, stride_q_token, stride_q_head, stride_k_token,
    stride_k_head, stride_v_token, stride_v_head, logit_scale, cap_scale, window, scale,
    GROUP: tl.constexpr, HEAD_K: tl.constexpr, HEAD_V: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, RELOAD: tl.constexpr, UPCAST: tl.constexpr, WHILE: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of (token, q head) rows of a block and one kv head, and delta [Tq, Hq] = sum of grad * out."""
    i_block = tl.program_id(0) // tiles_per_block
    i_tile = tl.program_id(0) % tiles_per_block
    i_head = tl.program_id(1).to(tl.int64)
    first = tl.load(block_start_ptr + i_block)
    stop = tl.load(block_start_ptr + i_block + 1)
    if i_tile * BLOCK_M < (stop - first) * GROUP:
        o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < (stop - first) * GROUP
        i_query = first + o_m // GROUP
        i_q_head = i_head * GROUP + o_m % GROUP
        i_token = (i_query - carried).to(tl.int64)
        i_row = i_token * (tl.num_programs(1) * GROUP) + i_q_head
        grad = load_rows(grad_ptr, i_row * HEAD_V, m_m, HEAD_V, BLOCK_V, UPCAST)
        out = load_rows(out_ptr, i_row * HEAD_V, m_m, HEAD_V, BLOCK_V, UPCAST)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(delta_ptr + i_row, delta, mask=m_m)
        lse = tl.load(lse_ptr + i_row, mask=m_m, other=0.0) * LOG2E
        i_q = i_token * stride_q_token + i_q_head * stride_q_head
        q = load_rows(q_ptr, i_q, m_m, HEAD_K, BLOCK_K, UPCAST)
        k_ptr += i_head * stride_k_head
        v_ptr += i_head * stride_v_head
        dq = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        p_query = i_query
        lowest = 0
        if HAS_WINDOW:
            p_query = tl.load(position_ptr + i_query, mask=m_m, other=2147483647)
            lowest = tl.min(p_query, 0) - window + 1

        i_span = tl.load(span_ptr_ptr + i_block)
        last_span = tl.load(span_ptr_ptr + i_block + 1)
        while i_span <= last_span:
            if i_span < last_span:
                begin = tl.load(span_ptr + 2 * i_span)
                end = tl.load(span_ptr + 2 * i_span + 1)
                if HAS_WINDOW:
                    p_begin = tl.load(position_ptr + begin, mask=begin < end, other=0)
                    begin = begin + tl.maximum(lowest - p_begin, 0)
            else:
                begin = first
                end = tl.minimum(stop, first + (i_tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
            if WHILE:
                while begin < end:
                    dq = _of_keys(
                        q, grad, dq, lse, delta, begin + tl.arange(0, BLOCK_N), end, i_query, p_query, k_ptr, v_ptr,
                        position_ptr, subtree_end_ptr, stride_k_token, stride_v_token, logit_scale, cap_scale, window,
                        HEAD_K, HEAD_V, HAS_WINDOW, HAS_SOFTCAP, BLOCK_K, BLOCK_V, UPCAST,
                    )  # fmt: skip
                    begin += BLOCK_N
            else:
                for n in tl.range(begin, end, BLOCK_N, disable_licm=RELOAD):
                    if RELOAD:
                        q = load_rows(q_ptr, i_q, m_m, HEAD_K, BLOCK_K, UPCAST)
                        grad = load_rows(grad_ptr, i_row * HEAD_V, m_m, HEAD_V, BLOCK_V, UPCAST)
                    dq = _of_keys(
                        q, grad, dq, lse, delta, n + tl.arange(0, BLOCK_N), end, i_query, p_query, k_ptr, v_ptr,
                        position_ptr, subtree_end_ptr, stride_k_token, stride_v_token, logit_scale, cap_scale, window,
                        HEAD_K, HEAD_V, HAS_WINDOW, HAS_SOFTCAP, BLOCK_K, BLOCK_V, UPCAST,
                    )  # fmt: skip
            i_span += 1
        store_rows(dq_ptr, i_row * HEAD_K, dq * scale, m_m, HEAD_K, BLOCK_K)


@triton.jit
def _of_queries(
    k, v, dk, dv, row, last_row, i_head, o_n, begin, end, p_key, grad_ptr, q_ptr, lse_ptr, delta_ptr, position_ptr,
    carried, heads, stride_q_token, stride_q_head, logit_scale, cap_scale, window,
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
    q = load_rows(q_ptr, i_token * stride_q_token + i_q_head * stride_q_head, m_m, HEAD_K, BLOCK_K, UPCAST)
    grad = load_rows(grad_ptr, i_row * HEAD_V, m_m, HEAD_V, BLOCK_V, UPCAST)
    lse = tl.load(lse_ptr + i_row, mask=m_m, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + i_row, mask=m_m, other=0.0)
    # Rows past the last one are behind the end of every key's subtree.
    i_query = (carried + i_token).to(tl.int32)
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


@triton.jit(do_not_specialize=["carried", "keys", "spans", "window"])
def _keys_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, position_ptr, subtree_end_ptr, span_ptr, span_query_ptr, dk_ptr,
    dv_ptr, carried, keys, spans, stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_v_token,
    stride_v_head, logit_scale, cap_scale, window, scale,
    GROUP: tl.constexpr, HEAD_K: tl.constexpr, HEAD_V: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, UPCAST: tl.constexpr, WHILE: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one kv head.

    Keys near a root have the most queries and the lowest indices, so the longest programs start first. One of them
    walks every query of the pass: a short pass with one long root is as slow as that program.
    """
    i_head = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < keys
    end = tl.load(subtree_end_ptr + o_n, mask=m_n, other=0)
    # A key that this pass computed is seen from its own query on. One from before stands out of the order of the
    # queries: it is seen from the first block on that has it in a span.
    begin = tl.where(m_n & (o_n >= carried), o_n, 2147483647)
    if tl.program_id(0) * BLOCK_N < carried:
        i_span = 0
        while i_span < spans:
            o_s = i_span + tl.arange(0, BLOCK_S)
            m_s = o_s < spans
            low = tl.load(span_ptr + 2 * o_s, mask=m_s, other=0)
            high = tl.load(span_ptr + 2 * o_s + 1, mask=m_s, other=0)
            query = tl.load(span_query_ptr + o_s, mask=m_s, other=0)
            has = (low[None, :] <= o_n[:, None]) & (o_n[:, None] < high[None, :])
            begin = tl.minimum(begin, tl.min(tl.where(has, query[None, :], 2147483647), 1))
            i_span += BLOCK_S
    p_key = o_n
    if HAS_WINDOW:
        p_key = tl.load(position_ptr + o_n, mask=m_n, other=0)
    k = load_rows(k_ptr, o_n.to(tl.int64) * stride_k_token + i_head * stride_k_head, m_n, HEAD_K, BLOCK_K, UPCAST)
    v = load_rows(v_ptr, o_n.to(tl.int64) * stride_v_token + i_head * stride_v_head, m_n, HEAD_V, BLOCK_V, UPCAST)
    dk = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    heads = tl.num_programs(1) * GROUP
    row = (tl.min(begin, 0) - carried).to(tl.int64) * GROUP
    last_row = (tl.max(end, 0) - carried).to(tl.int64) * GROUP
    if WHILE:
        while row < last_row:
            dk, dv = _of_queries(
                k, v, dk, dv, row, last_row, i_head, o_n, begin, end, p_key, grad_ptr, q_ptr, lse_ptr, delta_ptr,
                position_ptr, carried, heads, stride_q_token, stride_q_head, logit_scale, cap_scale, window,
                GROUP, HEAD_K, HEAD_V, HAS_WINDOW, HAS_SOFTCAP, BLOCK_M, BLOCK_K, BLOCK_V, UPCAST,
            )  # fmt: skip
            row += BLOCK_M
    else:
        for m in tl.range(row, last_row, BLOCK_M):
            dk, dv = _of_queries(
                k, v, dk, dv, m, last_row, i_head, o_n, begin, end, p_key, grad_ptr, q_ptr, lse_ptr, delta_ptr,
                position_ptr, carried, heads, stride_q_token, stride_q_head, logit_scale, cap_scale, window,
                GROUP, HEAD_K, HEAD_V, HAS_WINDOW, HAS_SOFTCAP, BLOCK_M, BLOCK_K, BLOCK_V, UPCAST,
            )  # fmt: skip
    i_row = o_n.to(tl.int64) * tl.num_programs(1) + i_head
    store_rows(dk_ptr, i_row * HEAD_K, dk * scale, m_n, HEAD_K, BLOCK_K)
    store_rows(dv_ptr, i_row * HEAD_V, dv, m_n, HEAD_V, BLOCK_V)


def tree_attention_backward_triton(
    grad, q, k, v, out, lse, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap,
    block_tokens,
):  # fmt: skip
    """Same arguments and results as the reference, from the saved result and log-sum-exp.

    Products, weights and sums are float32; weights and their gradients are rounded to q's dtype before the products
    that sum them up, as in the forward pass.
    """
    check(q, k, v)
    (tokens, q_heads, head_k), (keys, kv_heads, head_v) = q.shape, v.shape
    group, wide, carried = q_heads // kv_heads, max(head_k, head_v), keys - tokens
    part = capability(q.device)
    grad, out, lse = (t.contiguous() for t in (grad, out, lse))
    dq, dk, dv = (torch.empty(t.shape, dtype=stored_as(q), device=q.device) for t in (q, k, v))
    delta = torch.empty(tokens, q_heads, dtype=torch.float32, device=q.device)
    # The first query of the block that each span belongs to.
    span_query = torch.repeat_interleave(block_start[:-1], span_ptr.diff(), output_size=span.shape[0])
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    rest = (*strides, *scalars(scale, window, softcap), scale)
    constants = specialise(head_k, head_v, group, window, softcap)
    with on_device(q):
        options = queries_config(wide, q.dtype, part)
        tiles = triton.cdiv(block_tokens * group, options["BLOCK_M"])
        _queries_kernel[((block_start.shape[0] - 1) * tiles, kv_heads)](
            grad, q, k, v, out, lse, position, subtree_end, block_start, span_ptr, span, dq, delta, carried, tiles,
            *rest, **constants, **options, enable_fp_fusion=True,
        )  # fmt: skip
        options = keys_config(wide, q.dtype, part)
        _keys_kernel[(triton.cdiv(keys, options["BLOCK_N"]), kv_heads)](
            grad, q, k, v, lse, delta, position, subtree_end, span, span_query, dk, dv, carried, keys, span.shape[0],
            *rest, **constants, **options, enable_fp_fusion=True,
        )  # fmt: skip
    dsinks = None
    if sinks is not None:
        dsinks = -(torch.exp(sinks.float() - lse) * delta).sum(0).to(sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks
