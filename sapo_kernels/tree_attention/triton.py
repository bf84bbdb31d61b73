"""Triton backend of tree_attention: one flash-style forward pass over the spans of a trie plan.

A program owns a tile of rows of one plan block and one kv head; a row is one (query, q head of that kv head) pair, so
every K/V tile that is loaded serves all its q heads. The program walks the block's ancestor spans and then the
block's own keys. Softmax statistics and the accumulator are float32; the key order is fixed by the plan, so the same
plan gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_backward import tree_attention_backward_triton
from .triton_common import (
    LN2,
    LOG2E,
    capability,
    check,
    load_rows,
    on_device,
    scalars,
    specialise,
    store_rows,
    stored_as,
)
from .triton_config import careful_config, config

__all__ = ["tree_attention_backward_triton", "tree_attention_triton"]


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
    HEAD_K: tl.constexpr,
    HEAD_V: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Fold keys o_n [BLOCK_N] below `stop` into the running softmax: acc [M, V], m_i (log2 units), l_i [M].

    CAREFUL takes value rows that are not finite out of the product and makes l_i NaN in the rows that see them.
    """
    m_n = o_n < stop
    k = load_rows(k_ptr, o_n.to(tl.int64) * stride_k_token, m_n, HEAD_K, BLOCK_K, UPCAST)
    v = load_rows(v_ptr, o_n.to(tl.int64) * stride_v_token, m_n, HEAD_V, BLOCK_V, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * logit_scale
    if HAS_SOFTCAP:
        # tanh(s) = 1 - 2 / (1 + exp(2 s)): exp runs to inf or to 0, both with the right limit. cap_scale is in log2.
        s = cap_scale * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * s)))
    # Ancestor spans satisfy the rule anyway. One body for spans and own keys costs two compares a logit and keeps
    # register use below the point of spilling; keys past `stop` get end 0, so the rule hides them too.
    end = tl.load(subtree_end_ptr + o_n, mask=m_n, other=0)
    visible = (o_n[None, :] <= i_query[:, None]) & (i_query[:, None] < end[None, :])
    if HAS_WINDOW:
        p_key = tl.load(position_ptr + o_n, mask=m_n, other=0)
        visible = visible & (p_query[:, None] - p_key[None, :] < window)
    s = tl.where(visible, s, float("-inf"))

    if CAREFUL:
        bad = tl.max(tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0, 1), 1)
        v = tl.where(bad[:, None] > 0, 0.0, v).to(v.dtype)
        touched = tl.max(tl.where(visible & (bad[None, :] > 0), 1, 0), 1)
        l_i = tl.where(touched > 0, float("nan"), l_i)

    m_new = tl.maximum(m_i, tl.max(s, 1))
    # A row that has seen nothing yet has m_new = -inf; subtracting 0 instead keeps its weights at 0, not NaN.
    m_use = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_use[:, None])
    alpha = tl.exp2(m_i - m_use)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l_i


@triton.jit(do_not_specialize=["carried", "tiles_per_block", "window"])
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
    lse_ptr,
    sick_ptr,
    carried,
    tiles_per_block,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_out_token,
    stride_out_head,
    stride_sinks,
    logit_scale,
    cap_scale,
    window,
    GROUP: tl.constexpr,
    HEAD_K: tl.constexpr,
    HEAD_V: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
    WHILE: tl.constexpr,
    CAREFUL: tl.constexpr,
    SICK_M: tl.constexpr,
):
    """One tile of rows. sick_ptr [blocks, ceil(block rows / SICK_M), kv heads] int32 tells which tiles of SICK_M rows
    came out non-finite: the plain kernel (BLOCK_M = SICK_M) writes it, the CAREFUL one works on those rows only.
    """
    i_block = tl.program_id(0) // tiles_per_block
    i_tile = tl.program_id(0) % tiles_per_block
    i_head = tl.program_id(1).to(tl.int64)
    first = tl.load(block_start_ptr + i_block)
    stop = tl.load(block_start_ptr + i_block + 1)

    i_sick = i_block * tiles_per_block + i_tile
    todo = i_tile * BLOCK_M < (stop - first) * GROUP
    if CAREFUL:
        i_sick = i_block * ((tiles_per_block * BLOCK_M) // SICK_M) + (i_tile * BLOCK_M) // SICK_M
    p_sick = sick_ptr + i_sick.to(tl.int64) * tl.num_programs(1) + i_head
    if CAREFUL:
        todo = todo & (tl.load(p_sick, mask=todo, other=0) > 0)
    if todo:
        # Rows are (token, q head) pairs flattened, so a group of any size fills the tile.
        o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < (stop - first) * GROUP
        i_query = first + o_m // GROUP
        i_q_head = i_head * GROUP + o_m % GROUP
        i_token = (i_query - carried).to(tl.int64)
        q = load_rows(q_ptr, i_token * stride_q_token + i_q_head * stride_q_head, m_m, HEAD_K, BLOCK_K, UPCAST)
        k_ptr += i_head * stride_k_head
        v_ptr += i_head * stride_v_head

        acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
        m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
        if HAS_SINKS:
            # The sink is one more logit of the denominator, without a value: start the softmax from it.
            sink = tl.load(sinks_ptr + i_q_head * stride_sinks, mask=m_m, other=0.0)
            m_i = sink.to(tl.float32) * LOG2E
            l_i = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
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
                    # A span is a piece of one root path: positions rise by one per key, so jump over the hidden head.
                    p_begin = tl.load(position_ptr + begin, mask=begin < end, other=0)
                    begin = begin + tl.maximum(lowest - p_begin, 0)
            else:
                # Own keys come last, up to the last query of this tile.
                begin = first
                end = tl.minimum(stop, first + (i_tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
            if WHILE:
                while begin < end:
                    acc, m_i, l_i = _attend(
                        q, acc, m_i, l_i, begin + tl.arange(0, BLOCK_N), end, i_query, p_query, k_ptr, v_ptr,
                        position_ptr, subtree_end_ptr, stride_k_token, stride_v_token, logit_scale, cap_scale,
                        window, HEAD_K, HEAD_V, HAS_WINDOW, HAS_SOFTCAP, BLOCK_K, BLOCK_V, UPCAST, CAREFUL,
                    )  # fmt: skip
                    begin += BLOCK_N
            else:
                for n in tl.range(begin, end, BLOCK_N):
                    acc, m_i, l_i = _attend(
                        q, acc, m_i, l_i, n + tl.arange(0, BLOCK_N), end, i_query, p_query, k_ptr, v_ptr,
                        position_ptr, subtree_end_ptr, stride_k_token, stride_v_token, logit_scale, cap_scale,
                        window, HEAD_K, HEAD_V, HAS_WINDOW, HAS_SOFTCAP, BLOCK_K, BLOCK_V, UPCAST, CAREFUL,
                    )  # fmt: skip
            i_span += 1

        if not CAREFUL:
            # A hidden key has weight 0, and 0 * NaN is NaN: a sick sequence would spoil its neighbours in the block.
            tl.store(p_sick, tl.max(tl.max(tl.where(tl.abs(acc) < float("inf"), 0, 1), 1), 0))
        if WITH_LSE:
            p_lse = lse_ptr + (i_token * tl.num_programs(1) * GROUP + i_q_head)
            tl.store(p_lse, (m_i + tl.log2(l_i)) * LN2, mask=m_m)
        # l_i is 0 only where every logit was -inf: 0 / 0 gives the NaN that a plain softmax gives.
        i_out = i_token * stride_out_token + i_q_head * stride_out_head
        store_rows(out_ptr, i_out, acc / l_i[:, None], m_m, HEAD_V, BLOCK_V)


def tree_attention_triton(
    q, k, v, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap, block_tokens, with_lse
):
    """Same arguments and results as the reference; float32, bfloat16 or float16, head dimensions up to 512."""
    tokens, q_heads, head_k = q.shape
    keys, kv_heads, head_v = v.shape
    check(q, k, v)
    out = torch.empty(tokens, q_heads, head_v, dtype=stored_as(q), device=q.device)
    lse = torch.empty((tokens, q_heads) if with_lse else 0, dtype=torch.float32, device=q.device)
    blocks = block_start.shape[0] - 1
    if out.numel() == 0 or blocks == 0:
        return out.to(q.dtype), lse

    group = q_heads // kv_heads
    wide = max(head_k, head_v)
    part = capability(q.device)
    plain = config(wide, q.dtype, part, block_tokens * group)
    sick_m = plain["BLOCK_M"]
    careful = careful_config(wide, q.dtype, part, sick_m)
    tiles = triton.cdiv(block_tokens * group, sick_m)
    sick = torch.empty(blocks * tiles * kv_heads, dtype=torch.int32, device=q.device)
    with on_device(q):
        for is_careful, options in ((False, plain), (True, careful)):
            tiles_per_block = tiles * (sick_m // options["BLOCK_M"])
            _tree_attention_kernel[(blocks * tiles_per_block, kv_heads)](
                q,
                k,
                v,
                position,
                subtree_end,
                block_start,
                span_ptr,
                span,
                sinks,
                out,
                lse if with_lse else None,
                sick,
                keys - tokens,
                tiles_per_block,
                q.stride(0),
                q.stride(1),
                k.stride(0),
                k.stride(1),
                v.stride(0),
                v.stride(1),
                out.stride(0),
                out.stride(1),
                sinks.stride(0) if sinks is not None else 0,
                *scalars(scale, window, softcap),
                **specialise(head_k, head_v, group, window, softcap),
                HAS_SINKS=sinks is not None,
                WITH_LSE=with_lse,
                CAREFUL=is_careful,
                SICK_M=sick_m,
                **options,
                enable_fp_fusion=True,
            )
    return out.to(q.dtype), lse
