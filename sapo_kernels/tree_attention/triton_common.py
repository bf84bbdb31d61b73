"""What the Triton kernels of tree_attention share: rows, the walk over a tile's keys, what their launchers check."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..trie.tiles import CHUNK, build_tiles, split_tiles, tile_tokens
from ..triton_tools import DTYPES, INTERPRET

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MAX_HEAD = 512


@triton.jit
def load_rows(ptr, m_row, HEAD: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """[R, BLOCK] of rows that begin at ptr [R]; 0 from HEAD on and, if MASKED, where m_row is false."""
    o_d = tl.arange(0, BLOCK)[None, :]
    p = ptr[:, None] + o_d
    if MASKED:
        m = m_row[:, None]
        if HEAD != BLOCK:
            m = m & (o_d < HEAD)
        rows = tl.load(p, mask=m, other=0.0)
    elif HEAD != BLOCK:
        rows = tl.load(p, mask=o_d < HEAD, other=0.0)
    else:
        rows = tl.load(p)
    if UPCAST:
        rows = rows.to(tl.float32)
    return rows


@triton.jit
def store_rows(ptr, rows, m_row, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """The counterpart of `load_rows`, rounded to the type that ptr points to."""
    o_d = tl.arange(0, BLOCK)[None, :]
    m = m_row[:, None]
    if HEAD != BLOCK:
        m = m & (o_d < HEAD)
    tl.store(ptr[:, None] + o_d, rows.to(ptr.dtype.element_ty), mask=m)


@triton.jit
def rows_of(i_tile, i_part, tile_tokens, tokens, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(token, q head of the kv head, whether there is one) of the rows of part i_part of a tile."""
    o_m = i_part * BLOCK_M + tl.arange(0, BLOCK_M)
    i_token = i_tile * tile_tokens + o_m // GROUP
    return i_token, o_m % GROUP, (o_m < tile_tokens * GROUP) & (i_token < tokens)


@triton.jit
def entries_of(
    entry_ptr, begin_ptr, chunks_ptr, i_tile, p_query, window, CHUNK: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """(first entry of a tile's list, its keys in chunks, those that no window reaches, entries) of tiles.py."""
    begin = tl.load(begin_ptr + i_tile)
    count = tl.load(begin_ptr + i_tile + 1) - begin
    chunks = tl.load(chunks_ptr + i_tile)
    skip = 0
    if HAS_WINDOW:
        # The first key of chunk c is at position CHUNK * c or behind it by no more than the entries that are single.
        lowest = tl.min(p_query, 0) - window + 1
        skip = tl.maximum(lowest - (count - chunks), 0) // CHUNK * CHUNK
    return entry_ptr + begin, chunks * CHUNK, skip, count


@triton.jit
def _in_memory(ptr, o_n, num_past, stride, offset_past, stride_past, HAS_PAST: tl.constexpr):
    """Where the rows of keys o_n begin: in the memory at ptr, or those from before the pass offset_past behind it.

    A product and no `where`: of that the compiler would not know that it is aligned, and loads would be small and
    waited for.
    """
    o_n = o_n.to(tl.int64)
    if HAS_PAST:
        row = (o_n - num_past) * stride
        return ptr + row + (o_n < num_past).to(tl.int64) * (offset_past + o_n * stride_past - row)
    return ptr + o_n * stride


@triton.jit
def key_rows(
    n, count, entry_ptr, i_query, p_query, k_ptr, v_ptr, seen_from_ptr, subtree_end_ptr, position_ptr, num_past, window,
    stride_k, stride_v, offset_past_k, offset_past_v, stride_past_k, stride_past_v,
    CHUNKED: tl.constexpr, CHUNK: tl.constexpr, HAS_PAST: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N keys from n on, of a tile's chunks or of its single entries: where the rows of k and v begin and
    whether there are any [N], visible [M, N]. All queries of a tile see the keys of its chunks but for a window.
    """
    if CHUNKED:
        o_n = tl.load(entry_ptr + n // CHUNK) + n % CHUNK + tl.arange(0, BLOCK_N)
        m_n = o_n >= 0
        visible = (i_query >= 0)[:, None] & m_n[None, :]
    else:
        m_n = n + tl.arange(0, BLOCK_N) < count
        o_n = tl.load(entry_ptr + n + tl.arange(0, BLOCK_N), mask=m_n, other=0)
        seen_from = tl.load(seen_from_ptr + o_n, mask=m_n, other=0)
        end = tl.load(subtree_end_ptr + o_n, mask=m_n, other=0)
        visible = (seen_from[None, :] <= i_query[:, None]) & (i_query[:, None] < end[None, :])
    if HAS_WINDOW:
        p_key = tl.load(position_ptr + o_n, mask=m_n, other=0)
        visible = visible & (p_query[:, None] - p_key[None, :] < window)
    p_k = _in_memory(k_ptr, o_n, num_past, stride_k, offset_past_k, stride_past_k, HAS_PAST)
    p_v = _in_memory(v_ptr, o_n, num_past, stride_v, offset_past_v, stride_past_v, HAS_PAST)
    return p_k, p_v, m_n, visible


def specialise(head_k: int, head_v: int, group: int, window, softcap) -> dict[str, object]:
    """The compile-time arguments that follow from shapes and options."""
    return {
        "GROUP": group,
        "CHUNK": CHUNK,
        "HEAD_K": head_k,
        "HEAD_V": head_v,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK_K": max(16, triton.next_power_of_2(head_k)),
        "BLOCK_V": max(16, triton.next_power_of_2(head_v)),
        "UPCAST": INTERPRET,
    }


def scalars(scale: float, window: int | None, softcap: float | None) -> tuple[float, float, int]:
    """logit_scale, cap_scale and window as the kernels take them. Logits are kept in units of log 2."""
    log2e = LOG2E.value
    return (
        scale * log2e if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * log2e,
        0 if window is None else min(window, 2**31 - 1),
    )


def tiles_for(tiles, tokens, q, keys: int, group: int, subtree_end, block_start, span_ptr, span):
    """((begin, chunks, seen_from, entries) of tiles.py, queries a tile), made here if the caller has none."""
    if tiles is None:
        tokens = tile_tokens(group)
        layout = (t.cpu() for t in (subtree_end, block_start, span_ptr, span))
        tiles = torch.from_numpy(build_tiles(*layout, tokens)).to(q.device)
    return split_tiles(tiles, keys, q.shape[0], tokens), tokens


def check(q, k, v, *past) -> None:
    if q.dtype not in DTYPES:
        raise TypeError(f"tree_attention: impl='triton': expected one of {DTYPES}, got {q.dtype}")
    wide = max(q.shape[2], v.shape[2])
    if wide > MAX_HEAD:
        raise ValueError(f"tree_attention: impl='triton': expected head_dim up to {MAX_HEAD}, got {wide}")
    for name, t in zip(("q", "k", "v", "past k", "past v"), (q, k, v, *past)):  # noqa: B905 (there may be no past)
        if t is not None and t.stride(-1) != 1:
            raise ValueError(f"tree_attention: {name}: expected stride 1 in the last dimension, got {t.stride(-1)}")


def stored_as(q: torch.Tensor) -> torch.dtype:
    """The dtype that kernels store: the interpreter truncates to bfloat16, so there it stores float32."""
    return torch.float32 if INTERPRET else q.dtype
