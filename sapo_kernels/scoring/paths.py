"""The ways to score the cells of a cache on a model, fastest first; verified_paths.py chooses.

tree:   one token trie through the model, its attention replaced by `tree_attention`.
padded: whole sequences of similar length in right-padded batches, by the model's own attention.
equal:  the same with batches of equal length only, so nothing is padded.
alone:  one sequence at a time, by the model's own logits; right whatever the model does.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from ..ops import resolve_impl
from ..trie.trie import TokenTrie, TriePass
from . import model_support
from .attention import TrieAttention
from .cell_sums import CellSums
from .decoder import TreeRunner, run_padded
from .head import OP_IMPL, HeadReader, padded_batch
from .model_state import is_out_of_memory
from .prefix_cache import PrefixCache
from .progress import Progress
from .response_cache import ResponseCache
from .verification import Check, PlainModel

logger = logging.getLogger("sapo_kernels")

TREE, PADDED, EQUAL, ALONE = PATHS = ("tree", "padded", "equal", "alone")
# Logits that a head which must run through the model may write at once.
MODEL_LOGITS_BYTES = 1 << 30


class Paths:
    """The cells of one cache on one model, and each way to score them."""

    # What the rounds of a race have in common.
    prefixes: PrefixCache | None = None
    # Read the model's own logits, because its head does more than `model_support.head_transform` knows.
    through_model = False

    def __init__(
        self, model, cache: ResponseCache, impl: str, max_tokens: int, progress: bool | Callable | None,
        fuse: str | bool = "auto",
    ):  # fmt: skip
        self.model, self.inner = model_support.unwrap(model)
        self.cache, self.progress, self.max_tokens, self.fuse = cache, progress, max_tokens, fuse
        self.op_impl = impl if impl in OP_IMPL else "auto"
        self.device = model_support.input_device(self.inner)
        self.put_back: Callable[[], None] = lambda: None
        self.look_up()

    def look_up(self) -> None:
        """What of the model every pass needs: once a call, and again if it changes between the rounds of a race."""
        self.attention = TrieAttention(self.inner)
        self._reader = HeadReader(self.inner, OP_IMPL[self.op_impl])
        self._counterparts = functools.cache(functools.partial(_counterparts, self.inner))

    def run(self, path: str, checks: Sequence[Check], plain: PlainModel) -> tuple[np.ndarray, int]:
        """([cells] nll in nats, computed tokens) by one path.

        Raises:
            Disagreement: a check's cell is not what the plain model makes of it.
            torch.OutOfMemoryError: naming the cell that does not fit even alone.
        """
        for check in checks:
            check.begin()
        if path == TREE:
            nll, computed = self._tree(checks)
        elif path == ALONE:
            nll, computed = self._alone(checks, plain)
        else:
            nll, computed = self._padded(checks, equal=path == EQUAL)
        for check in checks:
            if not check.complete:
                raise RuntimeError(f"cell {self.cache.cell_name(check.cell)}: expected all of its rows to be compared")
            check.judge()
            check.judge_sum(float(nll[check.cell]))
        return nll, computed

    def reader(self) -> HeadReader:
        self._reader.through_model = self.through_model
        return self._reader

    def _fused(self):
        """Fused layers for the passes of a path; the plain model, which they are verified against, has none."""
        if not self.fuse or resolve_impl("tree_attention", "auto", self.device) != "triton":
            return contextlib.nullcontext()
        from ..fused_layers.swap import swapped_in  # needs triton

        return swapped_in(self._counterparts())

    def _budget(self) -> int:
        if not self.through_model:
            return self.max_tokens
        vocabulary = model_support.vocabulary_size(self.inner)
        return max(1, min(self.max_tokens, MODEL_LOGITS_BYTES // (4 * vocabulary)))

    def _tree(self, checks: Sequence[Check]) -> tuple[np.ndarray, int]:
        while True:
            found = self._tree_unless_prefixes_cost_memory(checks)
            if found is not None:
                return found

    def _tree_unless_prefixes_cost_memory(self, checks: Sequence[Check]) -> tuple[np.ndarray, int] | None:
        """As `run`; None if memory ran out and giving up the kept prefixes freed some."""
        budget, prefixes = self._budget(), self.prefixes
        plan = self.cache.plan(budget) if prefixes is None else prefixes.begin(self.cache, budget)
        trie, total, done = plan.trie, sum(len(step.input_ids) for step in plan.passes), 0
        sums, rows = CellSums(trie.cell_target, trie.cell_ptr), [_rows_of(trie, check) for check in checks]
        with (
            Progress(len(trie.leaf), trie.dense_tokens, total, self.progress) as bar,
            self.attention.installed(),
            self._fused(),
            self.reader().installed() as reader,
        ):
            runner = TreeRunner(self.model, reader, self.op_impl, self.device, prefixes)
            waiting = list(reversed(plan.passes))
            while waiting:
                step = waiting.pop()
                here = _in_pass(trie, step, rows)
                logprob = _unless_out_of_memory(lambda step=step, here=here: runner.run(step, here))
                if logprob is not None:
                    _judge(here)
                    sums.add(logprob)
                    done += len(step.input_ids)
                    bar.update(step.cells_done, done)
                    continue
                if prefixes is not None and prefixes.give_up():
                    return None
                waiting += self._halves(trie, step)
        if prefixes is not None and _unless_out_of_memory(prefixes.end) is None:
            prefixes.give_up()
        return sums.nll(), total

    def _halves(self, trie: TokenTrie, step: TriePass) -> list[TriePass]:
        size = step.stop - step.start
        if size == 1:
            ends = (trie.leaf >= step.start) & (trie.leaf < trie.subtree_end[step.start])
            cell = self.cache.cell_name(int(np.flatnonzero(ends)[0]))
            raise torch.OutOfMemoryError(f"cell {cell}: does not fit in memory, even at one token a pass")
        logger.warning("out of memory in a pass of %d tokens; halving it", size)
        middle = step.start + size // 2
        return [trie.make_pass(middle, step.stop), trie.make_pass(step.start, middle)]

    def _padded(self, checks: Sequence[Check], equal: bool) -> tuple[np.ndarray, int]:
        lengths, count = self.cache.lengths + 1, self.cache.response_lengths
        # Rounding depends on a batch's shape, so equal cells are computed once: ties stay ties.
        first = self.cache.first_equal
        nll, computed, done = np.full(len(lengths), np.nan), 0, 0
        with (
            Progress(len(lengths), int(lengths.sum()), None, self.progress) as bar,
            self._fused(),
            self.reader().installed() as reader,
        ):
            waiting = _similar_lengths(np.unique(first), lengths, self._budget(), equal)[::-1]
            while waiting:
                cells = waiting.pop()
                batch = padded_batch(self.cache, cells, checks)
                self.put_back()
                logprob = _unless_out_of_memory(lambda batch=batch: run_padded(self.model, reader, batch, self.device))
                if logprob is None:
                    if len(cells) == 1:
                        name = self.cache.cell_name(cells[0])
                        raise torch.OutOfMemoryError(f"cell {name}: does not fit in memory, even in a batch of its own")
                    logger.warning("out of memory in a batch of %d sequences; halving it", len(cells))
                    waiting += [cells[len(cells) // 2 :], cells[: len(cells) // 2]]
                    continue
                _judge(batch.checks)
                sums = CellSums(np.arange(len(logprob)), np.concatenate([[0], np.cumsum(count[cells])]))
                sums.add(logprob)
                nll[cells] = sums.nll()
                computed, done = computed + batch.input_ids.numel(), done + int(np.isin(first, cells).sum())
                bar.update(done, computed)
        return nll[first], computed

    def _alone(self, checks: Sequence[Check], plain: PlainModel) -> tuple[np.ndarray, int]:
        lengths, first = self.cache.lengths + 1, self.cache.first_equal
        nll, computed, done = np.full(len(lengths), np.nan), 0, 0
        by_cell = {check.cell: check for check in checks}
        # Those that are verified come first: a model that does not repeat itself is found out at once.
        cells = [*by_cell, *(cell for cell in np.unique(first).tolist() if cell not in by_cell)]
        with Progress(len(lengths), int(lengths.sum()), None, self.progress) as bar:
            for cell in cells:
                self.put_back()
                found = _unless_out_of_memory(lambda cell=cell: plain.score(self.cache, cell))
                if found is None:
                    name = self.cache.cell_name(cell)
                    raise torch.OutOfMemoryError(f"cell {name}: does not fit in memory, even in a batch of its own")
                logits, nll[cell] = found
                if check := by_cell.get(cell):
                    check.compare(torch.arange(len(logits)), logits)
                    check.judge()
                computed, done = computed + int(lengths[cell]), done + int((first == cell).sum())
                bar.update(done, computed)
        return nll[first], computed


def _counterparts(inner: nn.Module) -> list:
    from ..fused_layers.swap import counterparts  # needs triton

    return counterparts(inner)


def _rows_of(trie: TokenTrie, check: Check) -> tuple[Check, np.ndarray, list[int]]:
    """[n] the rows of the trie (places in `row_token`) that predict a cell's response, and their tokens, in order."""
    targets = trie.cell_target[trie.cell_ptr[check.cell] : trie.cell_ptr[check.cell + 1]]
    rows = np.searchsorted(trie.target_ptr, targets, side="right") - 1
    return check, rows, trie.row_token[rows].tolist()


def _in_pass(trie: TokenTrie, step: TriePass, rows: list[tuple[Check, np.ndarray, list[int]]]) -> list[tuple]:
    """The checks that have rows in a pass, as `Batch.checks` has them."""
    found = []
    for check, places, tokens in rows:
        own = np.arange(bisect_left(tokens, step.start), bisect_left(tokens, step.stop))
        if len(own):
            before = trie.row_token.searchsorted(step.start)
            found.append((check, torch.from_numpy(places[own] - before), torch.from_numpy(own)))
    return found


def _judge(checks: Sequence[tuple]) -> None:
    for check, *_ in checks:
        if check.complete:
            check.judge()


def _unless_out_of_memory(call):
    """``call()``, or None if memory ran out; the failed frames are gone when this returns."""
    try:
        return call()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def most_batched(cache: ResponseCache, budget: int, equal: bool) -> int:
    """The cell that a batch changes most: by padding; without any, the shortest of the largest batch."""
    lengths = cache.lengths + 1
    found = [
        (int(lengths[batch[0]] - lengths[cell]), len(batch), -int(lengths[cell]), cell)
        for batch in _similar_lengths(np.unique(cache.first_equal), lengths, budget, equal)
        for cell in batch
    ]
    return max(found)[-1]


def _similar_lengths(cells: np.ndarray, lengths: np.ndarray, budget: int, equal: bool) -> list[list[int]]:
    """The cells in batches of at most `budget` padded tokens, longest first; with `equal`, of exactly one length."""
    order = cells[np.argsort(-lengths[cells], kind="stable")].tolist()
    batches: list[list[int]] = []
    for cell in order:
        batch = batches[-1] if batches else None
        fits = batch is not None and (len(batch) + 1) * lengths[batch[0]] <= budget
        if fits and (not equal or lengths[batch[0]] == lengths[cell]):
            batch.append(cell)
        else:
            batches.append([cell])
    return batches
