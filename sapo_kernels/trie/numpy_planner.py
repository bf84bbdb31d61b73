"""The numpy planner of the token trie: what runs where nothing is compiled, and the oracle of the compiled one.

``csrc/trie.cpp`` gives the same arrays bit for bit and refuses the same inputs with the same words. Which of the two
runs is decided in `trie.plan_trie`.
"""

from __future__ import annotations

import numpy as np

from .tiles import ranges


def plan_numpy(ids: np.ndarray, offsets: np.ndarray, context_lengths: np.ndarray) -> dict[str, np.ndarray | int]:
    """The fields of a `TokenTrie`, by name, from flat int64 arrays; see `trie.plan_trie`.

    Raises:
        ValueError: naming the sequence that is too short or has a negative id, or offsets that do not fit.
    """
    full = _checked_lengths(ids, offsets, context_lengths)
    lengths = full - 1
    order = _sorted_order(ids, offsets[:-1], lengths)
    first, length = offsets[:-1][order], lengths[order]
    shared = _shared_with_previous(ids, first, length)
    fresh = length - shared
    token_start = np.cumsum(fresh) - fresh
    depth = ranges(shared, fresh)
    tokens = ids[ranges(first + shared, fresh)]
    node_start, node_stop, node_parent, node_end = _nodes(shared.tolist(), length.tolist())

    path, path_offset = _paths(shared, length, token_start)
    responses = (full - context_lengths)[order]
    row_of = path[ranges(path_offset + context_lengths[order] - 1, responses)]
    target_of = ids[ranges(first + context_lengths[order], responses)]
    row_token, target_ptr, targets, inverse = _distinct_targets(row_of, target_of)
    leaf = path[path_offset + length - 1]

    # Back from sorted order to the caller's order of cells.
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    sorted_ptr = np.cumsum(responses) - responses
    count = responses[back]
    cell_ptr = np.concatenate([[0], np.cumsum(count)])
    return {
        "tokens": tokens,
        "depth": depth,
        "node_start": node_start,
        "node_stop": node_stop,
        "node_parent": node_parent,
        "node_end": node_end,
        "row_token": row_token,
        "target_ptr": target_ptr,
        "targets": targets,
        "cell_ptr": cell_ptr,
        "cell_target": inverse[ranges(sorted_ptr[back], count)],
        "leaf": leaf[back],
        "dense_tokens": int(lengths.sum()),
    }


def _checked_lengths(ids: np.ndarray, offsets: np.ndarray, context_lengths: np.ndarray) -> np.ndarray:
    """[C] tokens of each sequence, after everything that could be wrong with the values has been refused."""
    if len(offsets) != len(context_lengths) + 1 or offsets[0] != 0 or offsets[-1] != len(ids):
        raise ValueError(
            f"offsets: expected [{len(context_lengths) + 1}] from 0 to {len(ids)}, got {offsets[:1]} to {offsets[-1:]} "
            f"in {list(offsets.shape)}"
        )
    full = np.diff(offsets)
    bad = np.flatnonzero((context_lengths < 1) | (context_lengths >= full))
    if len(bad):
        c = int(bad[0])
        raise ValueError(
            f"sequence {c}: expected at least 1 context and 1 response token, got a context of "
            f"{int(context_lengths[c])} in {int(full[c])} tokens"
        )
    # Only differences that wrapped around get here with offsets that do not ascend.
    outside = np.flatnonzero((offsets[1:] < 0) | (offsets[1:] > len(ids)))
    if len(outside):
        raise ValueError(f"sequence {int(outside[0])}: its offsets are not within the {len(ids)} ids")
    if len(ids) and ids.min() < 0:
        at = int(np.argmin(ids))
        c = int(np.searchsorted(offsets, at, side="right")) - 1
        raise ValueError(f"sequence {c}: token ids must not be negative, got {int(ids[at])}")
    return full


def _sorted_order(ids: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Stable lexicographic order of the sequences; big-endian bytes compare as the numbers they spell."""
    wide = len(ids) and ids.max() >= 2**32
    width, raw = (8, ids.astype(">u8")) if wide else (4, ids.astype(">u4"))
    raw = raw.tobytes()
    keys = [raw[a * width : (a + n) * width] for a, n in zip(first.tolist(), length.tolist(), strict=True)]
    return np.asarray(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def _shared_with_previous(ids: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Length of the longest common prefix of each sorted sequence with the one before it."""
    shared = np.zeros(len(first), dtype=np.int64)
    if len(first) < 2:
        return shared
    both = np.minimum(length[1:], length[:-1])
    differ = np.flatnonzero(ids[ranges(first[1:], both)] != ids[ranges(first[:-1], both)])
    begin = np.cumsum(both) - both
    differ = np.append(differ, int(both.sum()))
    shared[1:] = np.minimum(differ[np.searchsorted(differ, begin)] - begin, both)
    return shared


def _nodes(shared: list[int], length: list[int]):
    """Runs without a branch, in depth-first order, with parents and subtree ends."""
    done: list[tuple[int, int, int]] = []  # first token, tokens, subtree end
    open_nodes: list[list[int]] = []  # first token, first depth, depth after the last token
    total = 0
    for common, n in zip(shared, length, strict=True):
        if n == common:  # the same sequence again
            continue
        while open_nodes and open_nodes[-1][1] >= common:
            token, lo, hi = open_nodes.pop()
            done.append((token, hi - lo, total))
        if open_nodes and open_nodes[-1][2] > common:
            token, lo, hi = open_nodes[-1]
            done.append((token + common - lo, hi - common, total))
            open_nodes[-1][2] = common
        open_nodes.append([total, common, n])
        total += n - common
    done.extend((token, hi - lo, total) for token, lo, hi in open_nodes)
    done.sort()
    parent, ancestors = [], []
    for i, (token, _, end) in enumerate(done):
        while ancestors and ancestors[-1][1] <= token:
            ancestors.pop()
        parent.append(ancestors[-1][0] if ancestors else -1)
        ancestors.append((i, end))
    first, tokens, end = np.ascontiguousarray(np.asarray(done, dtype=np.int64).reshape(-1, 3).T)
    return first, first + tokens, np.asarray(parent, dtype=np.int64), end


def _paths(shared: np.ndarray, length: np.ndarray, token_start: np.ndarray):
    """For each sorted sequence the trie tokens it walks through, end to end, and where each walk begins."""
    offset = np.cumsum(length) - length
    path = np.empty(int(length.sum()), dtype=np.int64)
    path[ranges(offset + shared, length - shared)] = ranges(token_start, length - shared)
    walk = offset.tolist()
    for i in np.flatnonzero(shared).tolist():
        a, b, n = walk[i], walk[i - 1], int(shared[i])
        path[a : a + n] = path[b : b + n]
    return path, offset


def _distinct_targets(row: np.ndarray, target: np.ndarray):
    """Distinct (row, target) pairs ordered by row then target, and where each given pair went."""
    order = np.lexsort((target, row))
    row, target = row[order], target[order]
    new = np.ones(len(row), dtype=bool)
    new[1:] = (row[1:] != row[:-1]) | (target[1:] != target[:-1])
    inverse = np.empty(len(row), dtype=np.int64)
    inverse[order] = np.cumsum(new) - 1
    row, target = row[new], target[new]
    row_token, begin = np.unique(row, return_index=True)
    return row_token, np.append(begin, len(row)), target, inverse
