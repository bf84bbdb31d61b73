"""Triton backend of tree_attention: one flash-style forward pass over the spans of a trie plan.

One program owns a tile of rows, a row being one (query, q head of the kv head) pair of one plan block, so the
K/V tiles it loads serve all q heads of the kv head. It walks the block's ancestor spans without any tree mask
(every query of the block sees all of them), then the block's own keys with `j <= i < subtree_end[j]`.
Softmax statistics and the output accumulator are fp32.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def _attend(
    q,
    acc,
    m_i,
    l_i,
    o_n,
    stop,
    i_query,
    p_query,
    k_ptr,
    v_ptr,
    position_ptr,
    subtree_end_ptr,
    stride_k_token,
    stride_v_token,
    logit_scale,
    cap_scale,
    window,
    OWN: tl.constexpr,
    HEAD_K: tl.constexpr,
    HEAD_V: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Fold the keys o_n [BLOCK_N] below `stop` into the running softmax (acc, m_i, l_i); logits are in log2 units."""
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.arange(0, BLOCK_V)
    m_n = o_n < stop
    m_k = m_n[:, None]
    if HEAD_K != BLOCK_K:
        m_k = m_k & (o_k < HEAD_K)[None, :]
    m_v = m_n[:, None]
    if HEAD_V != BLOCK_V:
        m_v = m_v & (o_v < HEAD_V)[None, :]
    row = o_n.to(tl.int64)[:, None]
    k = tl.load(k_ptr + row * stride_k_token + o_k[None, :], mask=m_k, other=0.0)
    v = tl.load(v_ptr + row * stride_v_token + o_v[None, :], mask=m_v, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)

    s = tl.dot(q, tl.trans(k), input_precision="ieee") * logit_scale
    if HAS_SOFTCAP:
        # tanh(s) = 1 - 2 / (1 + exp(2 s)): exp overflows to inf and underflows to 0, both with the right limit.
        s = cap_scale * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * s)))
    visible = m_n[None, :]
    if OWN:
        end = tl.load(subtree_end_ptr + o_n, mask=m_n, other=0)
        visible = visible & (o_n[None, :] <= i_query[:, None]) & (i_query[:, None] < end[None, :])
    if HAS_WINDOW:
        p_key = tl.load(position_ptr + o_n, mask=m_n, other=0)
        visible = visible & (p_query[:, None] - p_key[None, :] < window)
    s = tl.where(visible, s, float("-inf"))

    m_new = tl.maximum(m_i, tl.max(s, 1))
    # A row that sees nothing yet has m_new = -inf; subtracting 0 instead keeps its weights at 0, not NaN.
    m_use = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_use[:, None])
    alpha = tl.exp2(m_i - m_use)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l_i


@triton.jit
def _tree_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    subtree_end_ptr,
    block_start_ptr,
    span_ptr_ptr,
    span_ptr,
    sinks_ptr,
    out_ptr,
    path,
    tiles_per_block,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_o_token,
    stride_o_head,
    logit_scale,
    cap_scale,
    window,
    GROUP: tl.constexpr,
    HEAD_K: tl.constexpr,
    HEAD_V: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
    WHILE: tl.constexpr,
):
    i_block = tl.program_id(0) // tiles_per_block
    i_tile = tl.program_id(0) % tiles_per_block
    i_head = tl.program_id(1).to(tl.int64)
    first = tl.load(block_start_ptr + i_block)
    stop = tl.load(block_start_ptr + i_block + 1)

    # Rows of a block are (token, group) pairs flattened, so a group of any size fills the tile.
    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < (stop - first) * GROUP
    i_query = first + o_m // GROUP
    if i_tile * BLOCK_M < (stop - first) * GROUP:
        i_q_head = i_head * GROUP + o_m % GROUP
        o_token = (i_query - path).to(tl.int64)
        o_k = tl.arange(0, BLOCK_K)
        m_q = m_m[:, None]
        if HEAD_K != BLOCK_K:
            m_q = m_q & (o_k < HEAD_K)[None, :]
        p_q = q_ptr + (o_token * stride_q_token + i_q_head * stride_q_head)[:, None] + o_k[None, :]
        q = tl.load(p_q, mask=m_q, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        k_ptr += i_head * stride_k_head
        v_ptr += i_head * stride_v_head

        acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
        if HAS_SINKS:
            # The sink is one more logit of the denominator, without a value row: start the softmax from it.
            sink = tl.load(sinks_ptr + i_q_head, mask=m_m, other=0.0).to(tl.float32)
            m_i = sink * 1.4426950408889634
            l_i = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
        else:
            m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
            l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
        p_query = i_query
        lowest = 0
        if HAS_WINDOW:
            p_query = tl.load(position_ptr + i_query, mask=m_m, other=2147483647)
            lowest = tl.min(p_query, 0) - window + 1

        i_span = tl.load(span_ptr_ptr + i_block)
        last_span = tl.load(span_ptr_ptr + i_block + 1)
        while i_span < last_span:
            begin = tl.load(span_ptr + 2 * i_span)
            end = tl.load(span_ptr + 2 * i_span + 1)
            if HAS_WINDOW:
                # A span is a piece of one root path, so positions rise by one per key: jump over the hidden head.
                p_begin = tl.load(position_ptr + begin, mask=begin < end, other=0)
                begin = begin + tl.maximum(lowest - p_begin, 0)
            if WHILE:
                while begin < end:
                    acc, m_i, l_i = _attend(
                        q, acc, m_i, l_i, begin + tl.arange(0, BLOCK_N), end, i_query, p_query, k_ptr, v_ptr,
                        position_ptr, subtree_end_ptr, stride_k_token, stride_v_token, logit_scale, cap_scale, window,
                        False, HEAD_K, HEAD_V, HAS_WINDOW, HAS_SOFTCAP, BLOCK_K, BLOCK_V, UPCAST,
                    )  # fmt: skip
                    begin += BLOCK_N
            else:
                for n in tl.range(begin, end, BLOCK_N):
                    acc, m_i, l_i = _attend(
                        q, acc, m_i, l_i, n + tl.arange(0, BLOCK_N), end, i_query, p_query, k_ptr, v_ptr,
                        position_ptr, subtree_end_ptr, stride_k_token, stride_v_token, logit_scale, cap_scale, window,
                        False, HEAD_K, HEAD_V, HAS_WINDOW, HAS_SOFTCAP, BLOCK_K, BLOCK_V, UPCAST,
                    )  # fmt: skip
            i_span += 1

        # Own keys, up to the last query of this tile.
        end = tl.minimum(stop, first + (i_tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
        while first < end:
            acc, m_i, l_i = _attend(
                q, acc, m_i, l_i, first + tl.arange(0, BLOCK_N), end, i_query, p_query, k_ptr, v_ptr,
                position_ptr, subtree_end_ptr, stride_k_token, stride_v_token, logit_scale, cap_scale, window,
                True, HEAD_K, HEAD_V, HAS_WINDOW, HAS_SOFTCAP, BLOCK_K, BLOCK_V, UPCAST,
            )  # fmt: skip
            first += BLOCK_N

        acc = acc / l_i[:, None]
        o_v = tl.arange(0, BLOCK_V)
        m_o = m_m[:, None]
        if HEAD_V != BLOCK_V:
            m_o = m_o & (o_v < HEAD_V)[None, :]
        p_o = out_ptr + (o_token * stride_o_token + i_q_head * stride_o_head)[:, None] + o_v[None, :]
        tl.store(p_o, acc.to(out_ptr.dtype.element_ty), mask=m_o)
