"""TokenTrie: every sequence of a scoring job in one token trie, cut into passes that a decoder can run.

The trie stores each distinct prefix once, in depth-first (preorder) order, so "j is an ancestor of i" is the
interval test ``j <= i < subtree_end[j]``. A *pass* is a contiguous piece of that order under a token budget. The
keys and values of the ancestors of its first token are carried over from the passes before, so no token is ever
computed twice, however small the budget is, and memory is bounded by the budget plus the longest sequence.

`plan_trie` is the one function behind it. It plans on the host with the compiled planner (``csrc/trie.cpp``), or
without it in numpy (`planner.plan_numpy`), slower, with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from . import native
from .planner import plan_numpy

DEFAULT_BLOCK_TOKENS = 64


@dataclass(frozen=True)
class TriePass:
    """A contiguous piece ``[start, stop)`` of a trie's depth-first order, ready to run as one forward.

    Key indices: ``0..carried-1`` are the carried ancestors (position id = index), ``carried + i`` is token
    ``start + i``. All tensors live on the CPU unless `to` moved them; index tensors of the attention are int32.

    Attributes:
        input_ids: [T] int64 tokens of this pass.
        position: [carried + T] int32, depth of every key.
        subtree_end: [carried + T] int32; key j is visible to query i iff ``j <= i < subtree_end[j]``.
        block_start: [B + 1] int32 key indices; query block b is ``[block_start[b], block_start[b + 1])``.
        span_ptr, span: [B + 1] and [S, 2] int32; the key ranges outside block b that all its queries see whole.
        block_tokens: the largest length of a block.
        carry_index: [C] int64 key indices that the next pass carries.
        rows: [R] int64 rows of this pass (0..T-1) whose hidden state predicts a response token.
        target_ptr, targets: [R + 1] and [P] int64; row r predicts ``targets[target_ptr[r]:target_ptr[r + 1]]``.
        target_start: index of this pass's first target among the targets of the whole trie.
        cells_done: cells whose last row lies before ``stop``.
        last: ``stop`` is the end of the trie.
    """

    start: int
    stop: int
    carried: int
    block_tokens: int
    target_start: int
    cells_done: int
    last: bool
    input_ids: torch.Tensor
    position: torch.Tensor
    subtree_end: torch.Tensor
    block_start: torch.Tensor
    span_ptr: torch.Tensor
    span: torch.Tensor
    carry_index: torch.Tensor
    rows: torch.Tensor
    target_ptr: torch.Tensor
    targets: torch.Tensor
    _on_device: dict = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device | str) -> TriePass:
        """This pass with its tensors on `device`; the copy is made once and remembered."""
        device = torch.device(device)
        if device == self.input_ids.device:
            return self
        if device not in self._on_device:
            moved = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, torch.Tensor)}
            kept = {n: v for n, v in vars(self).items() if n not in moved and n != "_on_device"}
            self._on_device[device] = TriePass(**moved, **kept)
        return self._on_device[device]


@dataclass(frozen=True, eq=False)
class TokenTrie:
    """All sequences of a job as unique tokens in depth-first order. Arrays are numpy int64.

    A cell's sequence is its context and response without the last response token (nothing is predicted from it).

    Attributes:
        tokens, depth: [U] token ids and position ids.
        node_start, node_stop, node_parent, node_end: [N] runs of tokens without a branch: their token range, their
            parent node (-1 for roots) and the end of their subtree.
        row_token: [R] trie tokens whose hidden state predicts something, ascending.
        target_ptr, targets: [R + 1], [P]; the distinct tokens that each row predicts.
        cell_ptr, cell_target: [C + 1], [sum of response lengths]; the targets of each cell in response order.
        leaf: [C] last trie token of each cell.
        dense_tokens: tokens that C separate forwards without padding would compute.
    """

    tokens: np.ndarray
    depth: np.ndarray
    node_start: np.ndarray
    node_stop: np.ndarray
    node_parent: np.ndarray
    node_end: np.ndarray
    row_token: np.ndarray
    target_ptr: np.ndarray
    targets: np.ndarray
    cell_ptr: np.ndarray
    cell_target: np.ndarray
    leaf: np.ndarray
    dense_tokens: int

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def node_depth(self) -> np.ndarray:
        """[N] depth of the first token of each node."""
        return self.depth[self.node_start]

    @cached_property
    def subtree_end(self) -> np.ndarray:
        """[U] end of the subtree of each token in depth-first order."""
        return np.repeat(self.node_end, self.node_stop - self.node_start)

    @cached_property
    def _leaf_sorted(self) -> np.ndarray:
        return np.sort(self.leaf)

    @cached_property
    def _node_of(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.node_start)), self.node_stop - self.node_start)

    def path_spans(self, token: int) -> list[tuple[int, int]]:
        """Token ranges, ascending, of the proper ancestors of `token` (adjacent ranges are merged)."""
        # `item` is the fast way to one Python number.
        node = self._node_of.item(token)
        stop, spans = token, []
        while node >= 0:
            first = self.node_start.item(node)
            if stop > first:
                if spans and spans[-1][0] == stop:
                    spans[-1] = (first, spans[-1][1])
                else:
                    spans.append((first, stop))
            node = self.node_parent.item(node)
            if node >= 0:
                stop = self.node_stop.item(node)
        return spans[::-1]

    def passes(self, max_tokens: int | None = None, block_tokens: int = DEFAULT_BLOCK_TOKENS) -> list[TriePass]:
        """Cut the depth-first order into passes of at most `max_tokens` new tokens each (None: one pass)."""
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens: wanted at least 1, got {max_tokens}")
        if block_tokens < 1:
            raise ValueError(f"block_tokens: wanted at least 1, got {block_tokens}")
        total, start, result = len(self), 0, []
        while start < total:
            limit = total if max_tokens is None else min(total, start + max_tokens)
            # Ending at a shallow boundary keeps the carried path short and siblings together.
            stop = limit if limit == total else self._cut(start + (3 * (limit - start)) // 4, limit)
            result.append(self.make_pass(start, stop, block_tokens))
            start = stop
        return result

    def make_pass(self, start: int, stop: int, block_tokens: int = DEFAULT_BLOCK_TOKENS) -> TriePass:
        """The pass over the depth-first range ``[start, stop)``."""
        carried, fresh = int(self.depth[start]), stop - start
        path = self.path_spans(start)
        on_path = np.concatenate([np.arange(a, b) for a, b in path]) if path else np.zeros(0, np.int64)
        keys = np.concatenate([on_path, np.arange(start, stop)])
        subtree_end = carried + np.clip(self.subtree_end[keys] - start, 0, fresh)
        block_start, span_ptr, spans = self._blocks(start, stop, block_tokens)
        carry = np.zeros(0, np.int64)
        if stop < len(self):
            carry = np.concatenate(
                [np.arange(a, b) for a, b in self._to_keys(self.path_spans(stop), start, carried)] or [carry]
            )
        row_lo, row_hi = np.searchsorted(self.row_token, [start, stop])
        target_lo, target_hi = int(self.target_ptr[row_lo]), int(self.target_ptr[row_hi])

        def int32(values):
            return torch.from_numpy(np.asarray(values, dtype=np.int32))

        return TriePass(
            start=start,
            stop=stop,
            carried=carried,
            block_tokens=block_tokens,
            target_start=target_lo,
            cells_done=int(np.searchsorted(self._leaf_sorted, stop)),
            last=stop == len(self),
            input_ids=torch.from_numpy(self.tokens[start:stop].copy()),
            position=int32(self.depth[keys]),
            subtree_end=int32(subtree_end),
            block_start=int32(block_start),
            span_ptr=int32(span_ptr),
            span=int32(np.asarray(spans, dtype=np.int32).reshape(-1, 2)),
            carry_index=torch.from_numpy(carry),
            rows=torch.from_numpy(self.row_token[row_lo:row_hi] - start),
            target_ptr=torch.from_numpy(self.target_ptr[row_lo : row_hi + 1] - target_lo),
            targets=torch.from_numpy(self.targets[target_lo:target_hi].copy()),
        )

    def _to_keys(self, path: list[tuple[int, int]], start: int, carried: int) -> list[tuple[int, int]]:
        """Token ranges of a path as key ranges of the pass that begins at `start`.

        The part of the path before `start` is a prefix of the carried path, and a carried key's index is its depth.
        """
        keys, depth = [], 0
        for first, stop in path:
            if first < start:
                inside = max(stop - start, 0)
                depth += stop - first - inside
                if inside:
                    keys.append((carried, carried + inside))
            else:
                keys.append((carried + first - start, carried + stop - start))
        if depth:
            keys.insert(0, (0, depth))
        merged: list[tuple[int, int]] = []
        for first, stop in keys:
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((first, stop))
        return merged

    def _cut(self, after: int, limit: int) -> int:
        """The shallowest node start in ``(after, limit]``, the last one of equals; `limit` if there is none."""
        lo, hi = self.node_start.searchsorted((after + 1, limit + 1)).tolist()
        if lo == hi:
            return limit
        return self.node_start.item(hi - 1 - int(self.node_depth[lo:hi][::-1].argmin()))

    def _blocks(self, start: int, stop: int, block_tokens: int):
        """Query blocks of a pass and, for each, the key ranges outside it that all its queries see.

        A block ends where an ancestor from outside the block ends its subtree, so those keys need no mask.
        """
        carried = int(self.depth[start])
        block_start, span_ptr, spans = [carried], [0], []
        at = start
        while at < stop:
            node = self._node_of.item(at)
            holder = node if at > self.node_start.item(node) else self.node_parent.item(node)
            common_end = self.node_end.item(holder) if holder >= 0 else len(self)
            hard = min(common_end, stop)
            end = hard if hard <= at + block_tokens else self._cut(at + block_tokens // 2, at + block_tokens)
            spans.extend(self._to_keys(self.path_spans(at), start, carried))
            block_start.append(carried + end - start)
            span_ptr.append(len(spans))
            at = end
        return block_start, span_ptr, spans


def plan_trie(ids: np.ndarray, offsets: np.ndarray, context_lengths: np.ndarray) -> TokenTrie:
    """Plan the token trie of C sequences.

    Args:
        ids: [L] integer token ids of all sequences (context and response) end to end; not negative.
        offsets: [C + 1] integer; sequence c is ``ids[offsets[c]:offsets[c + 1]]``.
        context_lengths: [C] integer; sequence c's response begins at that token. At least one token of context and
            one of response each.

    Returns:
        The trie. Children stand in the order of their token ids, so the plan does not depend on the order of cells.

    Raises:
        ValueError, TypeError: naming the sequence that is too short or has a negative id, or the array that does not
            fit.
    """
    arrays = []
    for name, values in (("ids", ids), ("offsets", offsets), ("context_lengths", context_lengths)):
        array = np.asarray(values)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError(f"{name}: wanted a flat array of integers, got {array.dtype} {list(array.shape)}")
        # The one layout that the compiled planner reads in place; both planners check the values.
        arrays.append(np.require(array, np.int64, "CAE"))
    compiled = native.planner()
    return TokenTrie(**(compiled.plan if compiled else plan_numpy)(*arrays))
