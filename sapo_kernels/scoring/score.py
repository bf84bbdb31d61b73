"""score_prompts: the whole road from K prompts and M examples to their loss matrix."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from . import model_support as support
from .cell_sums import CellSums
from .compatibility import Verdict, verdict_for
from .decoder import TreeRunner, run_padded, trie_attention_installed
from .head import OP_IMPL, HeadReader, padded_batch
from .model_state import claimed, compilation_off, is_out_of_memory, rope_kept, scoring_mode
from .prefix_cache import PrefixCache
from .progress import Progress
from .prompt_scores import PromptScores
from .race import Race, RaceState
from .render import Template
from .response_cache import ResponseCache

logger = logging.getLogger("sapo_kernels")

ROADS = ("auto", "tree", "padded", "triton", "sdpa", "reference")
# New tokens in one forward. A CPU wants activations that stay in its caches, a GPU enough work to fill it.
DEFAULT_MAX_TOKENS = {"cpu": 1024, "cuda": 16384}
# Logits that a head which must run through the model may write at once.
MODEL_LOGITS_BYTES = 1 << 30


def score_prompts(
    model,
    prompts: Sequence[str] | ResponseCache,
    examples: Sequence[Mapping[str, str]] | None = None,
    *,
    tokenizer=None,
    template: Template = None,
    suffix: str = "",
    text_word: str = "Text",
    max_source: int = 1536,
    max_target: int = 128,
    max_tokens: int | None = None,
    impl: str = "auto",
    progress: bool | None = None,
    race: Race | None = None,
) -> PromptScores:
    """Negative log-likelihood of every example's target under every prompt, in one packed pass over a token trie.

    Equal, up to rounding, to running the model on each of the K * M sequences alone::

        for k, prompt in enumerate(prompts):
            for m, example in enumerate(examples):
                logits = model(ids(context) + ids(response)).logits
                nll[k, m] = -log_softmax(logits)[response rows, response ids].sum()

    Args:
        model: a transformers causal LM or a PeftModel of one, trained or in training, on any device. It is left as it
            was (mode, adapters, attention implementation, RNG, gradients), also after an exception.
        prompts: K instructions, or a `ResponseCache`; then `examples` and everything about rendering is in it already.
        examples: M mappings with "input" and "target" (or "sentence" and "label").
        tokenizer: needed unless `prompts` is a `ResponseCache`.
        template, suffix, text_word, max_source, max_target: see `ResponseCache.build`.
        max_tokens: new tokens per forward; default 1024 on a CPU, 16384 on a GPU. Smaller saves memory and never
            recomputes a token.
        impl: "auto"; "tree" or "padded" to insist on a road; "triton", "sdpa" or "reference" to insist on the tree road
            with that backend.
        progress: a bar on stderr; None shows it on a terminal only.
        race: score in rounds, and only what is needed to find the best prompt; see `Race`.

    Returns:
        `PromptScores` with nll [K, M] in nats (float64, CPU) and tokens [K, M]. After a race, cells that were not
        scored have NaN and 0 tokens, and ``race`` says what happened to each prompt.

    Raises:
        ValueError, TypeError: naming the prompt, example or argument, what was wanted and what was got.
        RuntimeError: ``impl="tree"`` (or a backend) on a model whose layers do not allow it, with the reason.
        torch.OutOfMemoryError: naming the cell that does not fit even alone; before that the pass is halved and redone.

    Numerics: fp32 within 1e-4 nats per token of the plain forward; cells are summed in float64 in response order. A
    race scores the same cells in other passes, so within the same bound of a call without one, not bitwise.
    Source: SAPO, arXiv 2606.01967.
    """
    check_choices(impl, max_tokens)
    if race is not None and not isinstance(race, Race):
        raise TypeError(f"race: wanted a Race or None, got {type(race).__name__}")
    cache = prompts
    if not isinstance(prompts, ResponseCache):
        if tokenizer is None:
            raise ValueError("tokenizer: wanted one to read the prompts with, got None")
        cache = ResponseCache.build(
            tokenizer, prompts, [] if examples is None else examples, template,
            suffix=suffix, text_word=text_word, max_source=max_source, max_target=max_target,
        )  # fmt: skip
    elif examples is not None:
        raise ValueError("examples: wanted none beside a ResponseCache, which holds its own")
    elif (template, suffix, text_word, max_source, max_target) != (None, "", "Text", 1536, 128):
        raise ValueError("template, suffix, text_word, max_source, max_target: wanted none beside a ResponseCache")
    return ScoringJob(model, cache, impl, max_tokens, progress).run(race)


def check_choices(impl: str, max_tokens: int | None) -> None:
    """Refuse an `impl` or `max_tokens` that is none."""
    if impl not in ROADS:
        raise ValueError(f"impl: wanted one of {ROADS}, got {impl!r}")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise ValueError(f"max_tokens: wanted a whole number of at least 1, got {max_tokens!r}")


class ScoringJob:
    """The cells of one cache and how to score them on one model: one call of `score_prompts`."""

    # Another part of the same job, or another rank, says in the log what there is to say.
    quiet = False
    # What the rounds of a race have in common.
    prefixes: PrefixCache | None = None

    def __init__(self, model, cache: ResponseCache, impl: str, max_tokens: int | None, progress: bool | None):
        self.model, self.inner = support.unwrap(model)
        self.cache, self.impl, self.progress = cache, impl, progress
        self.op_impl = impl if impl in OP_IMPL else "auto"
        self.device = support.input_device(self.inner)
        self.max_tokens = max_tokens or DEFAULT_MAX_TOKENS.get(self.device.type, DEFAULT_MAX_TOKENS["cuda"])
        self.longest = int(cache.lengths.max())
        _check_ids(cache, support.vocabulary_size(self.inner))
        refusal = support.too_long(self.inner, self.longest)
        if refusal:
            raise ValueError(f"cell {cache.cell_name(int(cache.lengths.argmax()))}: {refusal}")

    def run(self, race: Race | None = None) -> PromptScores:
        started = time.perf_counter()
        shape = (self.cache.num_prompts, self.cache.num_examples)
        tokens = self.cache.response_lengths.reshape(shape)
        if race is None:
            nll, computed, padded, reason = self.measure()
            report = None
        else:
            state = RaceState(race, tokens)
            self.prefixes = self._prefix_cache()
            computed, padded, reason = self._hold(state)
            nll, tokens, report = state.nll, np.where(state.scored, tokens, 0), state.report()
        scores = PromptScores(
            nll=torch.from_numpy(nll).view(shape),
            tokens=torch.from_numpy(tokens).clone(),
            prompts=list(self.cache.prompts),
            stats={
                "road": "padded" if padded else "tree",
                "impl": self.impl,
                "reason": reason,
                "dense_tokens": int(self.cache.lengths.sum()),
                "trie_tokens": computed,
                "seconds": time.perf_counter() - started,
                **self.cache.stats,
            },
            race=report,
        )
        if not self.quiet:
            scores.warn_nonfinite()
        return scores

    def _prefix_cache(self) -> PrefixCache | None:
        # The oracle of the attention reads the trie as a whole.
        return None if self.impl in ("padded", "reference") else PrefixCache(self.cache)

    def part(self, cells: np.ndarray, road: str) -> ScoringJob:
        """A job of some of this one's cells."""
        job = ScoringJob(self.model, self.cache.select(cells), road, self.max_tokens, self.progress)
        job.prefixes = self.prefixes
        return job

    def _hold(self, state: RaceState) -> tuple[int, bool, str | None]:
        """Score what a state asks for, round by round; (computed tokens, padded, reason) as `measure` has them."""
        total, road, padded, reason = 0, self.impl, False, None
        while (cells := state.wanted()) is not None:
            nll, computed, by_padded, why = self.part(cells, road).measure()
            state.add(cells, nll)
            total, padded, reason = total + computed, padded or by_padded, reason or why
            if padded:  # one road for all rounds, and one line in the log about it
                road, self.prefixes = "padded", None
        return total, padded, reason

    def measure(self) -> tuple[np.ndarray, int, bool, str | None]:
        """([K * M] nll, computed tokens, whether by the padded road, why the tree road is closed)."""
        with (
            claimed(self.inner),
            scoring_mode(self.model),
            compilation_off(),
            rope_kept(self.inner) as self._put_rope_back,
        ):
            verdict = verdict_for(self.model, self.inner, self.op_impl, self.device)
            reason = self._tree_closed(verdict)
            if reason is not None and self.impl not in ("auto", "padded"):
                raise RuntimeError(f"impl={self.impl!r}: {reason}")
            if reason is not None and self.impl == "auto" and not self.quiet:
                logger.warning("scoring by the padded road: %s", reason)
            padded = reason is not None or self.impl == "padded"
            nll, computed = self._padded(verdict) if padded else self._tree(verdict)
        return nll, computed, padded, reason

    def _tree_closed(self, verdict: Verdict) -> str | None:
        """Why the tree road is closed for this model and these lengths."""
        if verdict.tree_reason:
            return verdict.tree_reason
        reason = support.adapter_by_row(self.model) or support.length_dependent(self.inner, self.longest)
        return reason or support.lost_window(self.inner, self.longest, verdict.windowed)

    def _reader(self, through_model: bool):
        return HeadReader(self.inner, OP_IMPL[self.op_impl], through_model).installed()

    def _budget(self, through_model: bool) -> int:
        if not through_model:
            return self.max_tokens
        return max(1, min(self.max_tokens, MODEL_LOGITS_BYTES // (4 * support.vocabulary_size(self.inner))))

    def _tree(self, verdict: Verdict) -> tuple[np.ndarray, int]:
        """([K * M] nll, computed tokens) by the tree road; memory comes before kept prefixes."""
        return self._tree_once(verdict) or self._tree_once(verdict)

    def _tree_once(self, verdict: Verdict) -> tuple[np.ndarray, int] | None:
        """As `_tree`; None if memory ran out and giving up the prefixes freed some."""
        budget, prefixes = self._budget(verdict.through_model), self.prefixes
        plan = self.cache.plan(budget) if prefixes is None else prefixes.begin(self.cache, budget)
        trie, total, done = plan.trie, sum(len(step.input_ids) for step in plan.passes), 0
        sums = CellSums(trie.cell_target, trie.cell_ptr)
        with (
            Progress(len(trie.leaf), trie.dense_tokens, total, self.progress) as bar,
            trie_attention_installed(self.inner),
            self._reader(verdict.through_model) as reader,
        ):
            runner = TreeRunner(self.model, reader, self.op_impl, self.device, prefixes)
            waiting = list(reversed(plan.passes))
            while waiting:
                step = waiting.pop()
                logprob = _unless_out_of_memory(lambda step=step: runner.run(step))
                if logprob is not None:
                    sums.add(logprob)
                    done += len(step.input_ids)
                    bar.update(step.cells_done, done)
                    continue
                if prefixes is not None and prefixes.give_up():
                    return None
                size = step.stop - step.start
                if size == 1:
                    cell = int(
                        np.flatnonzero((trie.leaf >= step.start) & (trie.leaf < trie.subtree_end[step.start]))[0]
                    )
                    raise torch.OutOfMemoryError(
                        f"cell {self.cache.cell_name(cell)}: does not fit, not even one token at a time"
                    )
                logger.warning("out of memory in a pass of %d tokens; halving it", size)
                middle = step.start + size // 2
                waiting += [trie.make_pass(middle, step.stop), trie.make_pass(step.start, middle)]
            agrees = reader.agrees()
        if not agrees:
            return self._again_through_model(verdict, self._tree)
        if prefixes is not None and _unless_out_of_memory(prefixes.end) is None:
            prefixes.give_up()
        return sums.nll(), total

    def _padded(self, verdict: Verdict) -> tuple[np.ndarray, int]:
        """([K * M] nll, computed tokens) by the model's own attention on right-padded batches of similar length."""
        lengths, count = self.cache.lengths, self.cache.response_lengths
        alone = verdict.alone or support.length_dependent(self.inner, self.longest) is not None
        budget = self._budget(verdict.through_model)
        # Rounding depends on a batch's shape, so equal cells are computed once: ties stay ties.
        first = self.cache.first_equal
        nll, computed, done = np.full(len(lengths), np.nan), 0, 0
        with (
            Progress(len(lengths), int(lengths.sum()), None, self.progress) as bar,
            self._reader(verdict.through_model) as reader,
        ):
            waiting = _similar_lengths(np.unique(first), lengths, budget, alone)[::-1]
            while waiting:
                cells = waiting.pop()
                batch = padded_batch(self.cache, cells)
                self._put_rope_back()
                logprob = _unless_out_of_memory(lambda batch=batch: run_padded(self.model, reader, batch, self.device))
                if logprob is None:
                    if len(cells) == 1:
                        raise torch.OutOfMemoryError(
                            f"cell {self.cache.cell_name(cells[0])}: does not fit, not even alone"
                        )
                    logger.warning("out of memory in a batch of %d sequences; halving it", len(cells))
                    waiting += [cells[len(cells) // 2 :], cells[: len(cells) // 2]]
                    continue
                sums = CellSums(np.arange(len(logprob)), np.concatenate([[0], np.cumsum(count[cells])]))
                sums.add(logprob)
                nll[cells] = sums.nll()
                computed, done = computed + batch.input_ids.numel(), done + int(np.isin(first, cells).sum())
                bar.update(done, computed)
            agrees = reader.agrees()
        if not agrees:
            return self._again_through_model(verdict, self._padded)
        return nll[first], computed

    def _again_through_model(self, verdict: Verdict, road):
        logger.warning("the head's transform is not the model's; scoring again through its own logits")
        return road(Verdict(verdict.tree_reason, True, verdict.alone, verdict.windowed))


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


def _similar_lengths(cells: np.ndarray, lengths: np.ndarray, budget: int, alone: bool) -> list[list[int]]:
    """The cells in batches of at most `budget` padded tokens, longest first; with `alone`, of exactly one length."""
    order = cells[np.argsort(-lengths[cells], kind="stable")].tolist()
    batches: list[list[int]] = []
    for cell in order:
        batch = batches[-1] if batches else None
        fits = batch is not None and (len(batch) + 1) * lengths[batch[0]] <= budget
        if fits and (not alone or lengths[batch[0]] == lengths[cell]):
            batch.append(cell)
        else:
            batches.append([cell])
    return batches


def _check_ids(cache: ResponseCache, vocabulary: int) -> None:
    if cache.max_id >= vocabulary:
        at = int(np.argmax(cache.ids >= vocabulary))
        cell = int(np.searchsorted(cache.offsets, at, side="right")) - 1
        raise ValueError(
            f"cell {cache.cell_name(cell)}: token ids must be below the model's vocabulary of {vocabulary}, got "
            f"{int(cache.ids[at])}; is this the model's tokenizer?"
        )
