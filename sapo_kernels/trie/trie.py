"""TokenTrie: every sequence of a scoring job in one token trie, cut into passes that a decoder can run.

The trie stores each distinct prefix once, in depth-first (preorder) order, so "j is an ancestor of i" is the
interval test ``j <= i < subtree_end[j]``. A *pass* is a contiguous piece of that order under a token budget. The
keys and values of the ancestors of its first token come from the passes before, so no token is ever
computed twice, however small the budget is, and memory is bounded by the budget plus the longest sequence.

`plan_trie` is the one function behind it. Planning and cutting are done on the host by the compiled planner
(``csrc/trie.cpp``, ``csrc/passes.cpp``), or without it in numpy, slower, with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from .. import native
from .numpy_planner import plan_numpy
from .tiles import build_pieces, build_tiles, ranges

DEFAULT_BLOCK_TOKENS = 64


def copied(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """int64 and int32 tensors on `device`; from the host to another device in one copy that is not waited for."""
    if device.type == "cpu" or tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return [one.to(device) for one in tensors]
    # Those of 8 bytes first, so that each begins at a multiple of its own size.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)
    parts = [tensors[i].numpy().ravel().view(np.int32) for i in order]
    packed = torch.empty(sum(map(len, parts)), dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate(parts, out=packed.numpy())
    there = packed.to(device, non_blocking=True).split([len(part) for part in parts])
    found = {i: part.view(tensors[i].dtype).view(tensors[i].shape) for i, part in zip(order, there, strict=True)}
    return [found[i] for i in range(len(tensors))]


@dataclass(frozen=True)
class TriePass:
    """A contiguous piece ``[start, stop)`` of a trie's depth-first order, ready to run as one forward.

    Key indices: first the past ones, ancestors (position id = index), then the cached tokens of this piece, which the
    caller has keys and values of, in their order; ``num_past + i`` is the i-th of the others, which the forward
    computes. All tensors live on the CPU unless `to` moved them; index tensors of the attention are int32.

    Attributes:
        num_past: keys in front of those that the forward computes, T tokens.
        num_cached: how many of these, the last ones, are cached tokens of this piece.
        input_ids: [T] int64 tokens of this pass.
        position: [num_past + T] int32, depth of every key.
        subtree_end: [num_past + T] int32; key j is visible to query i iff ``j <= i < subtree_end[j]``.
        block_start: [B + 1] int32 key indices; query block b is ``[block_start[b], block_start[b + 1])``.
        span_ptr, span: [B + 1] and [S, 2] int32; the key ranges outside block b that all its queries see whole.
        block_tokens: the largest length of a block.
        next_past: [C] int64 key indices that are past keys of the next pass.
        rows: [R] int64 rows of this pass (0..T-1) whose hidden state predicts a response token.
        target_ptr, targets: [R + 1] and [P] int64; row r predicts ``targets[target_ptr[r]:target_ptr[r + 1]]``.
        target_start: index of this pass's first target among the targets of the whole trie.
        cells_done: cells whose last row lies before ``stop``.
        last: ``stop`` is the end of the trie.
    """

    start: int
    stop: int
    num_past: int
    num_cached: int
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
    next_past: torch.Tensor
    rows: torch.Tensor
    target_ptr: torch.Tensor
    targets: torch.Tensor
    _on_device: dict = field(default_factory=dict, repr=False, compare=False)
    _lists: dict = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device | str) -> TriePass:
        """This pass with its tensors on `device`; the copy is made once and remembered."""
        device = torch.device(device)
        if device == self.input_ids.device:
            return self
        if device not in self._on_device:
            moved = {n: v for n, v in vars(self).items() if isinstance(v, torch.Tensor)}
            moved = dict(zip(moved, copied(list(moved.values()), device), strict=True))
            kept = {n: v for n, v in vars(self).items() if n not in moved and not n.startswith("_")}
            # A twin, for a way back to this very object would keep both alive.
            back = {self.input_ids.device: replace(self, _on_device={})}
            self._on_device[device] = TriePass(**moved, **kept, _on_device=back)
        return self._on_device[device]

    def tiles(self, tokens: int) -> torch.Tensor:
        """int32, what `build_tiles` makes of this pass for tiles of `tokens` queries; made once and remembered."""
        return self._listed(build_tiles, tokens)

    def pieces(self, group: int) -> torch.Tensor:
        """The same of `build_pieces`."""
        return self._listed(build_pieces, group)

    # While a model is compiled these are run, not traced.
    tiles._dynamo_marked_constant = pieces._dynamo_marked_constant = True

    def _listed(self, build, size: int) -> torch.Tensor:
        if (build, size) not in self._lists:
            host = self.to("cpu")
            if host is self:
                layout = (self.subtree_end, self.block_start, self.span_ptr, self.span)
                self._lists[build, size] = torch.from_numpy(build(*layout, size))
            else:
                (self._lists[build, size],) = copied([host._listed(build, size)], self.input_ids.device)
        return self._lists[build, size]


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

    def paths(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The first ``lengths[i]`` proper ancestors of each of some tokens, root first, end to end."""
        node, levels = self.node_start.searchsorted(tokens, "right") - 1, []
        while (node >= 0).any():
            levels.append(node)
            node = np.where(node >= 0, self.node_parent[node], -1)
        nodes = np.stack(levels[::-1], 1)
        size = np.where(nodes >= 0, (self.node_stop - self.node_start)[nodes], 0)
        count = np.clip(lengths[:, None] - self.node_depth[nodes], 0, size)
        return ranges(self.node_start[nodes].ravel(), count.ravel())

    def passes(
        self, max_tokens: int | None = None, block_tokens: int = DEFAULT_BLOCK_TOKENS, cached: np.ndarray | None = None
    ) -> list[TriePass]:
        """Cut the depth-first order into passes of at most `max_tokens` new tokens each (None: one pass).

        cached: [U] bool, tokens that need not be computed, none of them a row; None: every token is new.
        """
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
        if block_tokens < 1:
            raise ValueError(f"block_tokens: expected at least 1, got {block_tokens}")
        if cached is not None and cached[self.row_token].any():
            raise ValueError("cached: expected no token that predicts something, got some")
        compiled = native.planner()
        if compiled:
            made = compiled.passes(
                self.depth, self.node_start, self.node_stop, self.node_parent, self.node_end, self.row_token,
                None if cached is None else np.require(cached, bool, "CA"),
                max(1, min(len(self), max_tokens or len(self))), min(len(self) + 1, block_tokens),
            )  # fmt: skip
            return [self._pass(block_tokens, **one) for one in made]
        new = np.arange(len(self)) if cached is None else np.flatnonzero(~cached)
        total, start, done, result = len(self), 0, 0, []
        while start < total:
            end = len(new) if max_tokens is None else min(len(new), done + max_tokens)
            limit = total if end == len(new) else int(new[end])
            # Ending at a shallow boundary keeps the past short and siblings together.
            after = int(new[done + (3 * (end - done)) // 4])
            stop = limit if limit == total else self._cut(after, limit)
            result.append(self.make_pass(start, stop, block_tokens, cached))
            start, done = stop, int(np.searchsorted(new, stop))
        return result

    def make_pass(
        self, start: int, stop: int, block_tokens: int = DEFAULT_BLOCK_TOKENS, cached: np.ndarray | None = None
    ) -> TriePass:
        """The pass over the depth-first range ``[start, stop)``."""
        keys = _Keys(start, stop, int(self.depth[start]), cached)
        tokens = np.concatenate([self.paths(np.array([start]), self.depth[[start]]), keys.cached, keys.new])
        block_start, span_ptr, spans = self._blocks(keys, block_tokens)
        next_past = np.zeros(0, np.int64)
        if stop < len(self):
            next_past = np.concatenate([np.arange(a, b) for a, b in keys.of_path(self.path_spans(stop))] or [next_past])
        first_row, last_row = np.searchsorted(self.row_token, [start, stop])
        int32 = {
            "position": self.depth[tokens],
            "subtree_end": keys.first_new + keys.new_before(self.subtree_end[tokens]),
            "block_start": block_start,
            "span_ptr": span_ptr,
            "span": [edge for span in spans for edge in span],
        }
        return self._pass(
            block_tokens, start, stop, keys.first_new, len(keys.cached), first_row, last_row,
            keys.new if len(keys.cached) else keys.cached, next_past=next_past,
            rows=keys.new_before(self.row_token[first_row:last_row]),
            **{name: np.asarray(values, np.int32) for name, values in int32.items()},
        )  # fmt: skip

    def _pass(self, block_tokens, start, stop, num_past, num_cached, first_row, last_row, new, span, next_past,
              **arrays) -> TriePass:  # fmt: skip
        """The pass of which either planner made these arrays; `new`: the tokens it computes, empty if all of it."""
        target_ptr = self.target_ptr[first_row : last_row + 1]
        first, last = target_ptr[[0, -1]].tolist()
        arrays["span"], arrays["next_past"] = span.reshape(-1, 2), next_past
        # Copies: a model may write into the ids it is given.
        arrays["input_ids"] = self.tokens[new] if len(new) else self.tokens[start:stop].copy()
        arrays["target_ptr"], arrays["targets"] = target_ptr - first, self.targets[first:last].copy()
        return TriePass(
            start=start, stop=stop, num_past=num_past, num_cached=num_cached, block_tokens=block_tokens,
            target_start=first, cells_done=int(self._leaf_sorted.searchsorted(stop)), last=stop == len(self),
            **{name: torch.from_numpy(values) for name, values in arrays.items()},
        )  # fmt: skip

    def _cut(self, after: int, limit: int) -> int:
        """The shallowest node start in ``(after, limit]``, the last one of equals; `limit` if there is none."""
        lo, hi = self.node_start.searchsorted((after + 1, limit + 1)).tolist()
        if lo == hi:
            return limit
        return self.node_start.item(hi - 1 - int(self.node_depth[lo:hi][::-1].argmin()))

    def _blocks(self, keys: _Keys, block_tokens: int):
        """Query blocks of a pass and, for each, the key ranges outside it that all its queries see.

        A block ends where an ancestor from outside the block ends its subtree, so those keys need no mask; and before
        a cached token, which may be an ancestor of some of its queries only.
        """
        block_start, span_ptr, spans = [keys.first_new], [0], []
        for first, stop in keys.new_runs:
            at = first
            while at < stop:
                node = self._node_of.item(at)
                holder = node if at > self.node_start.item(node) else self.node_parent.item(node)
                common_end = self.node_end.item(holder) if holder >= 0 else len(self)
                hard = min(common_end, stop)
                end = hard if hard <= at + block_tokens else self._cut(at + block_tokens // 2, at + block_tokens)
                spans.extend(keys.of_path(self.path_spans(at)))
                block_start.append(block_start[-1] + end - at)
                span_ptr.append(len(spans))
                at = end
        return block_start, span_ptr, spans


class _Keys:
    """Where the tokens of a pass and of the path to it stand among its keys; see `TriePass`.

    cached, new: tokens of the pass of each kind. new_runs: the same, as ranges. first_new: key of the first new one.
    """

    def __init__(self, start: int, stop: int, depth: int, cached: np.ndarray | None):
        self.start, self.stop = start, stop
        if cached is None or not cached[start:stop].any():  # most passes: cutting them must stay cheap
            self.cached, self.new = np.zeros(0, np.int64), np.arange(start, stop)
            self.first_new, self.new_runs, self._breaks = depth, [(start, stop)], []
            return
        inside = cached[start:stop]
        self.cached, self.new = start + np.flatnonzero(inside), start + np.flatnonzero(~inside)
        self.first_new = depth + len(self.cached)
        # At each place of the pass, the new tokens before it; at each token, its key.
        self._before = np.concatenate([[0], np.cumsum(~inside)])
        place = np.arange(stop - start)
        self._key = np.where(inside, depth + place - self._before[:-1], self.first_new + self._before[:-1])
        # Tokens of which the key is not one more than that of the token before.
        self._breaks = (start + 1 + np.flatnonzero(np.diff(inside))).tolist()
        edges = [start, *self._breaks, stop]
        self.new_runs = [(a, b) for a, b in zip(edges, edges[1:]) if not inside[a - start]]  # noqa: B905

    def new_before(self, tokens: np.ndarray) -> np.ndarray:
        """How many new tokens of the pass stand before each of `tokens`."""
        place = np.clip(tokens - self.start, 0, self.stop - self.start)
        return self._before[place] if len(self.cached) else place

    def of_path(self, path: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Token ranges of a path as key ranges.

        The part of the path before the pass is a prefix of the past path, and a past key's index is its depth.
        """
        keys, depth = [], 0
        for first, stop in path:
            if first < self.start:
                depth += min(stop, self.start) - first
                first = self.start
            if first < stop and not len(self.cached):
                keys.append((self.first_new + first - self.start, self.first_new + stop - self.start))
            elif first < stop:
                edges = [first, *(edge for edge in self._breaks if first < edge < stop), stop]
                for a, b in zip(edges, edges[1:]):  # noqa: B905 (pairs of neighbours)
                    key = self._key.item(a - self.start)
                    keys.append((key, key + b - a))
        if depth:
            keys.insert(0, (0, depth))
        merged: list[tuple[int, int]] = []
        for first, stop in keys:
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((first, stop))
        return merged


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
            raise TypeError(f"{name}: expected a flat array of integers, got {array.dtype} {list(array.shape)}")
        # The one layout that the compiled planner reads in place; both planners check the values.
        arrays.append(np.require(array, np.int64, "CAE"))
    compiled = native.planner()
    return TokenTrie(**(compiled.plan if compiled else plan_numpy)(*arrays))
