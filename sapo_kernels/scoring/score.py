"""score_prompts: from K prompts and M examples to their loss matrix, and the choice of the path on the way."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from . import model_support
from .attention import NotTreeable
from .fingerprint import configurations, fingerprint
from .foreign_code import foreign_code
from .model_state import (
    Unrecoverable,
    claimed,
    compilation_off,
    is_out_of_memory,
    only_this_thread,
    rope_kept,
    scoring_mode,
)
from .paths import ALONE, EQUAL, PADDED, PATHS, TREE, Paths, most_batched
from .prefix_cache import PrefixCache
from .prompt_scores import PromptScores
from .race import Race, RaceState
from .render import Template, with_end_token, without_empty_targets
from .response_cache import ResponseCache
from .verification import UNMEASURED, Check, Disagreement, PlainModel, chosen_cells

logger = logging.getLogger("sapo_kernels")

IMPLS = ("auto", "tree", "padded", "alone", "triton", "sdpa", "reference")
# New tokens in one forward. A CPU wants activations that stay in its caches, a GPU enough work to fill it.
DEFAULT_MAX_TOKENS = {"cpu": 1024, "cuda": 16384}
# Cells from which on a second one is verified: at most one in ten.
TWO_CHECKS = 20
# Passes whose ends are verified where code that nobody knows is packed because the caller insists on it.
VERIFIED_PASSES = 4
_FAILED = "it failed"
_SPOKEN = {PADDED: "by the padded path", EQUAL: "each sequence without padding", ALONE: "each sequence alone"}
# What is remembered of one model: it may be used in a few ways in turn (under autocast, with another adapter).
_REMEMBERED = 16


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
    instruction_role: str = "user",
    max_tokens: int | None = None,
    impl: str = "auto",
    progress: bool | Callable[[int, int], None] | None = None,
    race: Race | None = None,
    skip_empty: bool = False,
    fuse: str | bool = "auto",
) -> PromptScores:
    """Negative log-likelihood of every example's target under every prompt, in one packed pass over a token trie.

    Equal, up to rounding, to running the model on each of the K * M whole sequences alone::

        for k, prompt in enumerate(prompts):
            for m, example in enumerate(examples):
                logits = model(ids(context) + ids(response)).logits
                nll[k, m] = -log_softmax(logits)[response rows, response ids].sum()

    Every call verifies that on one or two of its own cells, the longest among them. If they disagree, or if code that
    is not a known library's runs in the model's forward (see `foreign_code.LIBRARIES`), the next path is taken: padded
    batches, then each sequence alone; a line in the log says which and why.

    Args:
        model: a transformers causal LM or a PeftModel of one, trained or in training, on any device. It is left as it
            was (mode, adapters, attention implementation, RNG, gradients), also after an exception.
        prompts: K instructions, or a `ResponseCache`; then `examples` and everything about rendering is in it already.
        examples: M mappings with "input" and "target" (or "sentence" and "label"), or with ``messages``.
        tokenizer: needed unless `prompts` is a `ResponseCache`.
        template, suffix, text_word, max_source, max_target, instruction_role: see `ResponseCache.build`.
        max_tokens: new tokens per forward; default 1024 on a CPU, 16384 on a GPU. Smaller saves memory and never
            recomputes a token.
        impl: "auto"; "tree" to insist on the trie, "triton", "sdpa" or "reference" to insist on it with that backend;
            "padded" for the model's own attention; "alone" for each sequence alone (of equal length together where
            that is the same).
        progress: a bar on stderr; None shows it on a terminal only. Or a function, which is told the cells and the
            tokens that are done; of a race it hears each round from 0 on.
        race: score in rounds, and only what is needed to find the best prompt; see `Race`.
        skip_empty: leave out examples whose target is empty, instead of raising; their cells have NaN and 0 tokens,
            and ``stats["skipped_examples"]`` names them.
        fuse: "auto" to run norms, rotary embeddings and gated activations as one kernel each where that computes what
            the model's own modules do (`sapo_kernels.fused_layers`); False to leave them alone.

    Returns:
        `PromptScores` with nll [K, M] in nats (float64, CPU) and tokens [K, M]. After a race, cells that were not
        scored have NaN and 0 tokens, and ``race`` says what happened to each prompt.

    Raises:
        ValueError, TypeError: naming the prompt, example or argument, what was expected and what was got.
        RuntimeError: ``impl="tree"`` (or a backend) on a model whose layers do not allow it, with the reason; a model
            that gives another answer each time.
        torch.OutOfMemoryError: naming the cell that does not fit even alone; before that the pass is halved and redone.

    Numerics: fp32 within 1e-4 nats per token of the plain forward; cells are summed in float64 in response order. A
    race scores the same cells in other passes, so within the same bound of a call without one, not bitwise.
    Source: SAPO, arXiv 2606.01967.
    """
    check_choices(impl, max_tokens, fuse)
    if race is not None and not isinstance(race, Race):
        raise TypeError(f"race: expected a Race or None, got {type(race).__name__}")
    cache, kept = prompts, None
    if not isinstance(prompts, ResponseCache):
        if tokenizer is None:
            raise ValueError("tokenizer: expected one to read the prompts with, got None")
        examples = [] if examples is None else examples
        if skip_empty:
            examples, kept = without_empty_targets(examples)
        cache = ResponseCache.build(
            with_end_token(tokenizer, model), prompts, examples, template,
            suffix=suffix, text_word=text_word, max_source=max_source, max_target=max_target,
            instruction_role=instruction_role,
        )  # fmt: skip
    elif examples is not None or skip_empty:
        raise ValueError("examples, skip_empty: expected none beside a ResponseCache, which holds its own")
    elif (template, suffix, text_word, max_source, max_target) != (None, "", "Text", 1536, 128):
        raise ValueError("template, suffix, text_word, max_source, max_target: expected none beside a ResponseCache")
    elif instruction_role != "user":
        raise ValueError("instruction_role: expected none beside a ResponseCache")
    scores = ScoringJob(model, cache, impl, max_tokens, progress, fuse).score(race)
    return scores if kept is None else scores.spread(kept)


def check_choices(impl: str, max_tokens: int | None, fuse: str | bool = "auto") -> None:
    """Refuse an `impl`, `max_tokens` or `fuse` that is none."""
    if fuse != "auto" and fuse is not False:
        raise ValueError(f"fuse: expected 'auto' or False, got {fuse!r}")
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise ValueError(f"max_tokens: expected a whole number of at least 1, got {max_tokens!r}")


@dataclass
class Measured:
    """What a job found: [cells] nll in nats, computed tokens, and by which path, why that one, verified how far off.

    verified: names of the cells that were compared with the plain model. difference: the largest seen, nats.
    """

    nll: np.ndarray
    computed: int
    path: str
    reason: str | None
    verified: list[str]
    difference: float

    @property
    def name(self) -> str:
        """The path as people know it."""
        return ALONE if self.path == EQUAL else self.path


@dataclass
class Settled:
    """What is known of a model as one fingerprint has it: the path that agreed, why not a faster one, its noise.

    key: the fingerprint. length: tokens of the longest sequence that was verified; a race's later rounds look at both.
    """

    path: str
    reason: str | None
    through_model: bool
    noise: tuple[float, float] | None
    key: int = 0
    length: int = 0


class PathChanged(Exception):
    """A later round of a race found that the path of the earlier ones is not the plain model's."""


_known: weakref.WeakKeyDictionary[nn.Module, dict[int, Settled]] = weakref.WeakKeyDictionary()


class ScoringJob(Paths):
    """The cells of one cache and how to score them on one model: one call of `score_prompts`."""

    # Another part of the same job, or another rank, says in the log what there is to say.
    quiet = False
    # What the earlier rounds of a race settled.
    settled: Settled | None = None

    def __init__(
        self, model, cache: ResponseCache, impl: str, max_tokens: int | None, progress, fuse: str | bool = "auto"
    ):
        super().__init__(model, cache, impl, max_tokens or 0, progress, fuse)
        self.impl = impl
        self.max_tokens = max_tokens or DEFAULT_MAX_TOKENS.get(self.device.type, DEFAULT_MAX_TOKENS["cuda"])
        self.longest = int(cache.lengths.max()) + 1
        cache.check_ids(model_support.vocabulary_size(self.inner))
        refusal = model_support.too_long(self.inner, self.longest)
        if refusal:
            raise ValueError(f"cell {cache.cell_name(int(cache.lengths.argmax()))}: {refusal}")

    def score(self, race: Race | None = None) -> PromptScores:
        started = time.perf_counter()
        shape = (self.cache.num_prompts, self.cache.num_examples)
        tokens, report = self.cache.response_lengths.reshape(shape), None
        if race is None:
            found = self.measure()
        else:
            state, found = self._race(race, tokens)
            tokens, report = np.where(state.scored, tokens, 0), state.report()
        scores = PromptScores(
            nll=torch.from_numpy(found.nll).view(shape),
            tokens=torch.from_numpy(tokens).clone(),
            prompts=list(self.cache.prompts),
            stats={
                "path": found.name,
                "impl": self.impl,
                "reason": found.reason,
                "verified": found.verified,
                "difference": found.difference,
                "dense_tokens": int(self.cache.lengths.sum()),
                "trie_tokens": found.computed,
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
        return None if self.impl in ("padded", "alone", "reference") else PrefixCache(self.cache)

    def part(self, cells: np.ndarray) -> ScoringJob:
        """A job of some of this one's cells."""
        return ScoringJob(self.model, self.cache.select(cells), self.impl, self.max_tokens, self.progress, self.fuse)

    def _race(self, race: Race, tokens: np.ndarray) -> tuple[RaceState, Measured]:
        """Score what a race asks for, round by round; from the beginning if the path changes on the way."""
        settled = None
        while True:
            state = RaceState(race, tokens)
            self.prefixes = self._prefix_cache() if settled is None or settled.path == TREE else None
            try:
                return state, self._rounds(state, settled)
            except PathChanged as change:
                (settled,) = change.args

    def _rounds(self, state: RaceState, settled: Settled | None) -> Measured:
        total, verified, difference = 0, [], 0.0
        while (cells := state.wanted()) is not None:
            part = self.part(cells)
            part.prefixes, part.settled, part.quiet = self.prefixes, settled, self.quiet
            found = part.measure()
            state.add(cells, found.nll)
            total, verified = total + found.computed, verified + found.verified
            difference = max(difference, found.difference)
            if settled is not None and part.settled.path != settled.path:
                raise PathChanged(part.settled)
            settled = part.settled
            if settled.path != TREE:
                self.prefixes = None
        return Measured(state.nll, total, settled.path, settled.reason, verified, difference)

    def measure(self) -> Measured:
        """Score all cells, by the first path that agrees with the plain model."""
        with (
            claimed(self.inner),
            scoring_mode(self.model),
            compilation_off(),
            rope_kept(self.inner) as self.put_rope_back,
        ):
            configs = configurations(self.model)
            foreign = foreign_code(self.model, configs)
            key = fingerprint(self.model, self.device, configs, f"{self.impl}, fuse={self.fuse}")
            with only_this_thread(self.inner):
                return self._measure(_known.setdefault(self.inner, {}), key, foreign)

    def _measure(self, known: dict[int, Settled], key: int, foreign: str | None) -> Measured:
        plain = PlainModel(self.model, self.inner, self.device, keep_rows=foreign is None)
        known_here = self.settled is not None and self.settled.key == key and self.settled.path == TREE
        # Batches of other rounds have other company: only the tree is taken at its word for shorter sequences.
        if known_here and self.longest <= self.settled.length:
            self.through_model = self.settled.through_model
            nll, computed = self.attempt(self.settled.path, [], plain)
            return Measured(nll, computed, self.settled.path, self.settled.reason, [], 0.0)
        before = known.get(key) if self.settled is None or self.settled.key != key else self.settled
        found, lasting = self._first_that_agrees(before, foreign, plain)
        self.settled.key = key
        if lasting:
            while len(known) >= _REMEMBERED:
                known.pop(next(iter(known)))
            known[key] = self.settled
        return found

    def _first_that_agrees(
        self, before: Settled | None, foreign: str | None, plain: PlainModel
    ) -> tuple[Measured, bool]:
        """(what was found, whether its path may be remembered); `settled` has the path."""
        start, reason = self._start(foreign)
        if before is not None and PATHS.index(before.path) > PATHS.index(start):
            start, reason = self._allowed(before.path, before.reason)
        checks, lasting = self._checks([], self._cells(start, before, foreign), before, plain), True
        if not any(check.finite for check in checks):
            lasting = False
            if start in (TREE, PADDED):
                start, reason = self._allowed(EQUAL, "its log-probabilities are not finite: nothing can be verified")
        for path in PATHS[PATHS.index(start) :]:
            checks = self._checks(checks, self._cells(path, before, foreign), before, plain)
            self.through_model = not all(check.head for check in checks)
            if any(check.head is None for check in checks) and path != ALONE:
                _, reason = self._allowed(ALONE, "its forward does not go through its output embeddings")
                continue
            asked = {"padded": PADDED, "alone": EQUAL}.get(self.impl, TREE)
            told = self.quiet or (self.settled is not None and self.settled.path == path)
            if PATHS.index(path) > PATHS.index(asked) and reason is not None and not told:
                logger.warning("scoring %s: %s", _SPOKEN[path], reason)
            try:
                nll, computed = self.attempt(path, checks, plain)
            except (Disagreement, NotTreeable) as error:
                problem, lasting = str(error), lasting and not str(error).startswith(_FAILED)
            except Unrecoverable:
                raise
            except Exception as error:
                if is_out_of_memory(error) or path == ALONE:
                    raise
                # It may have been a passing fault.
                problem, lasting = f"{_FAILED}: {type(error).__name__}: {str(error)[:200]}", False
            else:
                self.settled = Settled(path, reason, self.through_model, checks[0].noise, length=self.longest)
                names = [self.cache.cell_name(check.cell) for check in checks]
                return Measured(nll, computed, path, reason, names, max(check.worst for check in checks)), lasting
            if before is not None:
                # What is remembered may have changed: the model's own error, which cells show a difference.
                return self._first_that_agrees(None, foreign, plain)
            following = PATHS[min(PATHS.index(path) + 1, len(PATHS) - 1)]
            _, reason = self._allowed(following, f"{type(self.inner).__name__} by the {path} path: {problem}")
        raise RuntimeError(
            f"model: expected the same log-probabilities each time, got others for the same sequence ({reason}); it "
            "cannot be scored"
        )

    def _start(self, foreign: str | None) -> tuple[str, str | None]:
        """(the first path to try, why not a faster one), before anything is computed."""
        if foreign is not None and self.impl in ("auto", "padded", "alone"):
            return ALONE, f"{foreign} is no library's code and may look at other sequences of its batch"
        reason = model_support.length_dependent(self.inner, self.longest)
        if reason or model_support.padding_matters(self.inner):
            return self._allowed(EQUAL, reason or f"{type(self.inner).__name__} chooses its keys by the batch's length")
        if reason := model_support.adapter_by_row(self.model) or model_support.tree_refusal(self.inner):
            return self._allowed(PADDED, reason)
        if self.impl in ("padded", "alone"):
            return (PADDED if self.impl == "padded" else EQUAL), None
        return TREE, None

    def _allowed(self, path: str, reason: str) -> tuple[str, str]:
        """`path` and `reason`; raises if the caller insists on a faster path."""
        if self.impl not in ("auto", "padded", "alone"):
            raise RuntimeError(f"impl={self.impl!r}: {reason}")
        return (EQUAL if self.impl == "alone" and path == PADDED else path), reason

    def _cells(self, path: str, before: Settled | None, foreign: str | None) -> list[int]:
        """The cells to verify on a path, the longest first."""
        ends = chosen_cells(self.cache, 2)
        longest, shortest = ends[0], ends[-1]
        if path in (PADDED, EQUAL):
            return [longest, most_batched(self.cache, self._budget(), path == EQUAL)]
        if path == ALONE:  # whether the model gives the same twice
            return [longest, shortest]
        # In front of every other sequence a cell has the same place in the pass as alone, and shows no neighbour.
        first, last = self.cache.extremes
        if longest == first or (before is None and len(self.cache.lengths) >= TWO_CHECKS):
            cells = [longest, last if last != longest else shortest]
        else:
            cells = [longest]
        if foreign is None or self.impl in ("auto", "padded", "alone"):
            return cells
        plan = self.cache.plan(self._budget())
        passes = [*plan.passes[: VERIFIED_PASSES // 2], *plan.passes[-VERIFIED_PASSES // 2 :]]
        # The next leaf in depth-first order belongs to a cell that holds the token.
        order = np.argsort(plan.trie.leaf, kind="stable")
        tokens = [token for step in passes for token in (step.start, step.stop - 1)]
        return [*cells, shortest, *order[np.searchsorted(plan.trie.leaf[order], tokens)].tolist()]

    def _checks(self, checks: list[Check], cells: list[int], before: Settled | None, plain: PlainModel) -> list[Check]:
        """`checks` and those of more cells; of others too as long as no cell's loss is finite."""
        reader, found = self.reader(), {check.cell: check for check in checks}
        noise = before.noise if before and before.noise and before.noise < UNMEASURED else None
        for cell in [*cells, *chosen_cells(self.cache, len(cells) + 3)]:
            cell = int(self.cache.first_equal[cell])
            if cell in found or (cell not in cells and any(check.finite for check in found.values())):
                continue
            self.put_rope_back()
            found[cell] = plain.check(self.cache, cell, reader, noise)
        self.put_rope_back()
        return list(found.values())

    def attempt(self, path: str, checks: Sequence[Check], plain: PlainModel) -> tuple[np.ndarray, int]:
        """`run`; a job that is shared among ranks shares this out."""
        return self.run(path, checks, plain)
