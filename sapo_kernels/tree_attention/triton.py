"""Triton backend of tree_attention: one flash-style forward pass over the tiles of a pass (trie/tiles.py).

A program owns rows of one tile and one kv head; a row is one (query, q head of that kv head) pair, so every key that is
loaded serves all its q heads. It walks the tile's list: first chunks of keys that all its queries see, side by side in
memory and without a mask, then single keys through their indices. Softmax statistics and the accumulator are float32;
the key order is fixed by the plan, so the same plan gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_tools import capability, on_device
from .triton_backward import tree_attention_backward_triton
from .triton_common import (
    LN2,
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
from .triton_config import careful_config, config

__all__ = ["tree_attention_backward_triton", "tree_attention_triton"]


@triton.jit
def _attend(
    q, acc, m_i, l_i, k, v, visible, logit_scale, cap_scale,
    HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Fold keys into the running softmax: acc [M, V], m_i (log2 units), l_i [M].

    CAREFUL takes value rows that are not finite out of the product and makes l_i NaN in the rows that see them.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * logit_scale
    if HAS_SOFTCAP:
        # tanh(s) = 1 - 2 / (1 + exp(2 s)): exp runs to inf or to 0, both with the right limit. cap_scale is in log2.
        s = cap_scale * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * s)))
    if MASKED:
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


@triton.jit(do_not_specialize=["num_past", "tokens", "kv_heads", "tile_tokens", "parts", "sick_parts", "window"])
def _tree_attention_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, subtree_end_ptr, begin_ptr, chunks_ptr, seen_from_ptr, entry_ptr, sinks_ptr,
    out_ptr, lse_ptr, sick_ptr, num_past, tokens, kv_heads, tile_tokens, parts, sick_parts, stride_q_token,
    stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head, offset_past_k, offset_past_v,
    stride_past_k_token, stride_past_k_head, stride_past_v_token, stride_past_v_head, stride_out_token,
    stride_out_head, stride_sinks, logit_scale, cap_scale, window,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, HEAD_K: tl.constexpr, HEAD_V: tl.constexpr, HAS_PAST: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, WITH_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr, CAREFUL: tl.constexpr, SICK_M: tl.constexpr,
):  # fmt: skip
    """One of the `parts` of a tile: BLOCK_M rows. Kv heads run fastest: neighbours share the list.

    sick_ptr [tiles, sick_parts, kv_heads] int32 tells which SICK_M rows came out non-finite: the plain kernel
    (BLOCK_M = SICK_M) writes it, the CAREFUL one works on those rows only.
    """
    i_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    i_part = tl.program_id(0) // kv_heads % parts
    i_tile = tl.program_id(0) // kv_heads // parts
    p_sick = sick_ptr + (i_tile * sick_parts + i_part * BLOCK_M // SICK_M).to(tl.int64) * kv_heads + i_head
    todo = True
    if CAREFUL:
        todo = tl.load(p_sick) > 0
    if todo:
        i_token, i_group, m_m = rows_of(i_tile, i_part, tile_tokens, tokens, GROUP, BLOCK_M)
        i_query = num_past + i_token
        i_q_head = i_head * GROUP + i_group
        i_token = i_token.to(tl.int64)
        p_q = q_ptr + i_token * stride_q_token + i_q_head * stride_q_head
        q = load_rows(p_q, m_m, HEAD_K, BLOCK_K, True, UPCAST)
        k_ptr += i_head * stride_k_head
        v_ptr += i_head * stride_v_head
        if HAS_PAST:
            offset_past_k += i_head * (stride_past_k_head - stride_k_head)
            offset_past_v += i_head * (stride_past_v_head - stride_v_head)
        acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
        m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
        if HAS_SINKS:
            # The sink is one more logit of the denominator, without a value: start the softmax from it.
            sink = tl.load(sinks_ptr + i_q_head * stride_sinks, mask=m_m, other=0.0)
            m_i = sink.to(tl.float32) * LOG2E
            l_i = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
        p_query = i_query
        if HAS_WINDOW:
            p_query = tl.load(position_ptr + i_query, mask=m_m, other=2147483647)
        entry_ptr, chunks, skip, count = entries_of(
            entry_ptr, begin_ptr, chunks_ptr, i_tile, p_query, window, CHUNK, HAS_WINDOW
        )  # fmt: skip
        for n in tl.range(skip, chunks, BLOCK_N):
            p_k, p_v, m_n, visible = key_rows(
                n, count, entry_ptr, i_query, p_query, k_ptr, v_ptr, seen_from_ptr, subtree_end_ptr, position_ptr,
                num_past, window, stride_k_token, stride_v_token, offset_past_k, offset_past_v, stride_past_k_token,
                stride_past_v_token, True, CHUNK, HAS_PAST, HAS_WINDOW, BLOCK_N,
            )  # fmt: skip
            k = load_rows(p_k, m_n, HEAD_K, BLOCK_K, False, UPCAST)
            v = load_rows(p_v, m_n, HEAD_V, BLOCK_V, False, UPCAST)
            acc, m_i, l_i = _attend(
                q, acc, m_i, l_i, k, v, visible, logit_scale, cap_scale, HAS_SOFTCAP, HAS_WINDOW, CAREFUL
            )
        for n in tl.range(chunks // CHUNK, count, BLOCK_N):
            p_k, p_v, m_n, visible = key_rows(
                n, count, entry_ptr, i_query, p_query, k_ptr, v_ptr, seen_from_ptr, subtree_end_ptr, position_ptr,
                num_past, window, stride_k_token, stride_v_token, offset_past_k, offset_past_v, stride_past_k_token,
                stride_past_v_token, False, CHUNK, HAS_PAST, HAS_WINDOW, BLOCK_N,
            )  # fmt: skip
            k = load_rows(p_k, m_n, HEAD_K, BLOCK_K, True, UPCAST)
            v = load_rows(p_v, m_n, HEAD_V, BLOCK_V, True, UPCAST)
            acc, m_i, l_i = _attend(q, acc, m_i, l_i, k, v, visible, logit_scale, cap_scale, HAS_SOFTCAP, True, CAREFUL)
        if not CAREFUL:
            # A hidden key has weight 0, and 0 * NaN is NaN: a sick sequence would spoil its neighbours in the tile.
            tl.store(p_sick, tl.max(tl.max(tl.where(tl.abs(acc) < float("inf"), 0, 1), 1), 0))
        if WITH_LSE:
            p_lse = lse_ptr + i_token * kv_heads * GROUP + i_q_head
            tl.store(p_lse, (m_i + tl.log2(l_i)) * LN2, mask=m_m)
        # l_i is 0 only where every logit was -inf: 0 / 0 gives the NaN that a plain softmax gives.
        p_out = out_ptr + i_token * stride_out_token + i_q_head * stride_out_head
        store_rows(p_out, acc / l_i[:, None], m_m, HEAD_V, BLOCK_V)


def tree_attention_triton(
    q, k, v, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap, block_tokens, with_lse,
    tiles=None, tokens=0, past_k=None, past_v=None,
):  # fmt: skip
    """Same arguments and results as the reference; float32, bfloat16 or float16, head dimensions up to 512.

    tiles, tokens: what `build_tiles` made of the pass and how many queries a tile has, or None. With past_k and past_v
    [num_past, Hkv, D], k and v are those of the pass alone.
    """
    (queries, q_heads, head_k), (_, kv_heads, head_v), keys = q.shape, v.shape, position.shape[0]
    check(q, k, v, past_k, past_v)
    out = torch.empty(queries, q_heads, head_v, dtype=stored_as(q), device=q.device)
    lse = torch.empty((queries, q_heads) if with_lse else 0, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out.to(q.dtype), lse

    group = q_heads // kv_heads
    walk, tokens = tiles_for(tiles, tokens, q, keys, group, subtree_end, block_start, span_ptr, span)
    shape = (max(head_k, head_v), q.dtype, capability(q.device))
    plain = config(*shape)
    careful = careful_config(*shape, plain["BLOCK_M"])
    rows, count = tokens * group, walk[1].shape[0]
    sick_parts = triton.cdiv(rows, plain["BLOCK_M"])
    sick = torch.empty(count * sick_parts * kv_heads, dtype=torch.int32, device=q.device)
    past = ((k, k), (v, v)) if past_k is None else ((k, past_k), (v, past_v))
    offsets = [(old.data_ptr() - new.data_ptr()) // new.element_size() for new, old in past]
    with on_device(q):
        for is_careful, options in ((False, plain), (True, careful)):
            parts = triton.cdiv(rows, options["BLOCK_M"])
            _tree_attention_kernel[(count * parts * kv_heads,)](
                q, k, v, position, subtree_end, *walk, sinks, out, lse if with_lse else None, sick,
                keys - queries, queries, kv_heads, tokens, parts, sick_parts, *q.stride()[:2], *k.stride()[:2],
                *v.stride()[:2], *offsets, *past[0][1].stride()[:2], *past[1][1].stride()[:2], *out.stride()[:2],
                sinks.stride(0) if sinks is not None else 0, *scalars(scale, window, softcap),
                **specialise(head_k, head_v, group, window, softcap), HAS_PAST=past_k is not None,
                HAS_SINKS=sinks is not None, WITH_LSE=with_lse, CAREFUL=is_careful, SICK_M=plain["BLOCK_M"], **options,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out.to(q.dtype), lse
