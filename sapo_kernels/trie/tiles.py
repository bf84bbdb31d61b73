"""Tiles of the queries of a pass, and for each the keys that a kernel walks. On the host.

Tiles are uniform pieces of the depth-first order. Their keys are the path to the first query, then the queries
themselves. Subtrees end in the order of the path from its bottom up, so the ancestors that outlive the tile, which all
of its queries see, are the beginning of the path: where CHUNK of them stand side by side, the list has the first alone,
and a kernel loads them without indices and without a mask.
"""

from __future__ import annotations

import numpy as np

from .. import native

# Rows (query, q head) that the queries of a tile have with the heads of one kv head; a multiple of every kernel's.
TILE_ROWS = 64
# Keys of a chunk; a multiple of what any kernel takes at once.
CHUNK = 32
# Keys of a piece of dK and dV, a multiple of what any kernel owns, and the rows from which on their queries are split.
KEY_TILE = 64
SPLIT_ROWS = 8192
# Pieces more than key tiles at most: the longest is then a small part of the whole.
MORE_PIECES = 256
NEVER = np.iinfo(np.int32).max


def tile_tokens(group: int) -> int:
    """Queries of a tile where `group` q heads read one kv head."""
    return max(1, TILE_ROWS // group)


def build_tiles(subtree_end, block_start, span_ptr, span, tokens: int) -> np.ndarray:
    """The tiles of `tokens` queries each of a pass (its arrays as in `TriePass`), as one int32 array of four parts:

    * [n + 1] where the entries of each of the n tiles begin,
    * [n] how many of a tile's entries, the first ones, are chunks: a key and the CHUNK - 1 after it, seen by all,
    * [Tk] the first query that may see each key, so that query i sees key j of its list iff
      ``seen_from[j] <= i < subtree_end[j]``,
    * the entries, keys; those of one tile in the order of the path, chunks first.
    """
    compiled = native.planner()
    if not compiled:
        return tiles_numpy(subtree_end, block_start, span_ptr, span, tokens)
    layout = (np.ascontiguousarray(a, np.int32).ravel() for a in (subtree_end, block_start, span_ptr, span))
    return compiled.tiles(*layout, tokens, CHUNK)


def tiles_numpy(subtree_end, block_start, span_ptr, span, tokens: int) -> np.ndarray:
    """`build_tiles` where nothing is compiled, and the oracle of the compiled one, bit for bit."""
    end, block_start, span_ptr = (np.asarray(a, np.int64) for a in (subtree_end, block_start, span_ptr))
    span = np.asarray(span, np.int64).reshape(-1, 2)
    keys, num_past = len(end), int(block_start[0])
    first = np.arange(num_past, keys, tokens)
    stop = np.minimum(first + tokens, keys)
    tile = np.arange(len(first))
    seen_from = _seen_from(keys, block_start, span_ptr, span)

    # The path to a tile's first query in runs [low, high): the spans of its block, then ancestors inside the block.
    block = np.searchsorted(block_start, first, "right") - 1
    spans = np.diff(span_ptr)[block]
    of_span, inside = np.repeat(tile, spans), np.repeat(tile, first - block_start[block])
    low, high = span[ranges(span_ptr[block], spans)].T
    own = ranges(block_start[block], first - block_start[block])
    above = end[own] > first[inside]
    own, inside = own[above], inside[above]
    owner = np.concatenate([of_span, inside])
    order = np.argsort(owner, kind="stable")
    owner, low, high = owner[order], np.concatenate([low, own])[order], np.concatenate([high, own + 1])[order]
    begins = np.ones(len(owner), bool)  # a run that continues the one before is its end
    begins[1:] = (owner[1:] != owner[:-1]) | (low[1:] != high[:-1])
    owner, low, high = owner[begins], low[begins], high[np.roll(begins, -1)]
    # Keys from before the pass may lie in a memory of their own.
    middle = np.clip(num_past, low, high)
    owner, low, high = np.repeat(owner, 2), np.stack([low, middle], 1).ravel(), np.stack([middle, high], 1).ravel()

    chunks = (_outliving(end, low, high, stop[owner]) - low) // CHUNK
    rest = low + CHUNK * chunks
    # Keys before the pass that are seen from the middle of a tile on.
    early = seen_from[:num_past]
    late, last = np.searchsorted(early, first, "right"), np.searchsorted(early, stop, "left")
    pieces = [  # (tile, start, count, step) of what stands in a tile's list, in this order
        (owner, low, chunks, CHUNK), (owner, rest, high - rest, 1), (tile, late, np.maximum(last - late, 0), 1),
        (tile, first, stop - first, 1),
    ]  # fmt: skip
    owner, start, count = (np.concatenate([piece[i] for piece in pieces]) for i in range(3))
    step = np.concatenate([np.full(len(piece[0]), piece[3]) for piece in pieces])
    order = np.argsort(owner, kind="stable")
    owner, start, count, step = owner[order], start[order], count[order], step[order]
    begin = np.concatenate([[0], np.cumsum(np.bincount(owner, count, len(first)))]).astype(np.int64)
    of_chunks = np.bincount(pieces[0][0], chunks, len(first))
    packed = np.concatenate([begin, of_chunks, seen_from, ranges(start, count, step)])
    if len(packed) and packed.size > NEVER:
        raise ValueError(f"trie: expected lists of keys below 2**31 entries, got {packed.size}")
    return packed.astype(np.int32)


def build_pieces(subtree_end, block_start, span_ptr, span, group: int) -> np.ndarray:
    """[P, 4] int32: the work of dK and dV in pieces, in order: (tile of KEY_TILE keys, first query, one past the last,
    slot). A tile whose queries are many has several pieces one after the other, each with a slot for its partial sums,
    slots in order; one alone has slot -1. There are at most ``2 * (P - tiles)`` slots.
    """
    end, block_start, span_ptr = (np.asarray(a, np.int64) for a in (subtree_end, block_start, span_ptr))
    edges = np.arange(0, len(end), KEY_TILE)
    first = np.minimum.reduceat(_seen_from(len(end), block_start, span_ptr, np.asarray(span, np.int64)), edges)
    count = np.maximum(np.maximum.reduceat(end, edges) - first, 0)
    limit = max(1, SPLIT_ROWS // group, -(-count.sum() // MORE_PIECES))
    pieces = np.maximum(-(-count // limit), 1)
    tile = np.repeat(np.arange(len(edges)), pieces)
    start = ranges(first, pieces, limit)
    several = pieces[tile] > 1
    slot = np.where(several, np.cumsum(several) - 1, -1)
    return np.stack([tile, start, np.minimum(start + limit, (first + count)[tile]), slot], 1).astype(np.int32)


def split_tiles(packed, keys: int, queries: int, tokens: int):
    """The four parts of `build_tiles`' array."""
    n = -(-queries // tokens)
    return packed[: n + 1], packed[n + 1 : 2 * n + 1], packed[2 * n + 1 : 2 * n + 1 + keys], packed[2 * n + 1 + keys :]


def ranges(start, count, step=1) -> np.ndarray:
    """start, start + step, ... (count of them) for each piece, end to end."""
    step = np.broadcast_to(step, count.shape)
    return np.repeat(start - (np.cumsum(count) - count) * step, count) + np.arange(count.sum()) * np.repeat(step, count)


def _seen_from(keys: int, block_start, span_ptr, span) -> np.ndarray:
    """[keys] int64, rising: a key that the pass computes is seen from its own query on, others from the first block on
    that has them in a span (one that no query sees from where the next is seen)."""
    num_past, found = int(block_start[0]), np.arange(keys)
    if num_past and np.diff(span[: span_ptr[1]]).sum() == num_past:  # the first query sees them all
        found[:num_past] = num_past
    elif num_past:
        low, high = np.minimum(span, num_past).T
        key = ranges(low, high - low)
        query = np.repeat(np.repeat(block_start[:-1], np.diff(span_ptr)), high - low)
        found[:num_past] = NEVER
        found[key[::-1]] = query[::-1]  # of a key's blocks the first is written last
        found[:num_past] = np.minimum.accumulate(found[:num_past][::-1])[::-1]
    return found


def _outliving(end, low, high, stop) -> np.ndarray:
    """Where in each run [low, high) of a path the keys stop whose subtree reaches to `stop`: by bisection."""
    low, high = low.copy(), high.copy()
    while (todo := low < high).any():
        middle = (low + high) // 2
        outlives = todo & (end[np.minimum(middle, len(end) - 1)] >= stop)
        high = np.where(todo & ~outlives, middle, high)
        low = np.where(outlives, middle + 1, low)
    return low
