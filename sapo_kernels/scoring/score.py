"""score_prompts: from K prompts and M examples to their loss matrix."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from . import model_support
from .paths import TREE
from .prefix_cache import PrefixCache
from .prompt_scores import PromptScores
from .race import Race, RaceState
from .render import Template, check_examples, with_end_token
from .response_cache import ResponseCache
from .verified_paths import Measured, VerifiedPaths

IMPLS = ("auto", "tree", "padded", "alone", "triton", "sdpa", "reference")
# New tokens in one forward. A CPU wants activations that stay in its caches, a GPU enough work to fill it.
DEFAULT_MAX_TOKENS = {"cpu": 1024, "cuda": 16384}
# How a cell is laid out by default.
_USUAL = {name: one.default for name, one in inspect.signature(ResponseCache.build).parameters.items()}


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
    given = {"template": template, "suffix": suffix, "text_word": text_word, "max_source": max_source,
             "max_target": max_target, "instruction_role": instruction_role, "skip_empty": skip_empty}  # fmt: skip
    check_choices(impl, max_tokens, race, fuse)
    kept = None
    if skip_empty and not isinstance(prompts, ResponseCache):
        rows = check_examples([] if examples is None else examples, empty_targets=True)
        kept = [bool(row["target"].strip()) for row in rows]
        examples = [row for row, keep in zip(rows, kept, strict=True) if keep]
        given["skip_empty"] = False
    layout = {name: value for name, value in given.items() if value != _USUAL.get(name, False)}
    cache = cache_of(prompts, examples, tokenizer, layout, model)
    scores = ScoringJob(model, cache, impl, max_tokens, progress, fuse).score(race)
    return scores if kept is None else scores.spread(kept)


def check_choices(impl: str, max_tokens: int | None, race: Race | None = None, fuse: str | bool = "auto") -> None:
    """Refuse an `impl`, `max_tokens`, `race` or `fuse` that is none."""
    if fuse != "auto" and fuse is not False:
        raise ValueError(f"fuse: expected 'auto' or False, got {fuse!r}")
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise ValueError(f"max_tokens: expected a whole number of at least 1, got {max_tokens!r}")
    if race is not None and not isinstance(race, Race):
        raise TypeError(f"race: expected a Race or None, got {type(race).__name__}")


def cache_of(prompts, examples, tokenizer, layout: Mapping, model) -> ResponseCache:
    """The cache that `prompts` is, or one made of them; `layout`: options of `ResponseCache.build`, not for a cache."""
    if isinstance(prompts, ResponseCache):
        names = [*(["examples"] if examples is not None else []), *layout]
        if names:
            raise ValueError(f"{', '.join(names)}: expected none with a ResponseCache, which has its own")
        return prompts
    if tokenizer is None:
        raise ValueError("tokenizer: expected one to tokenise the prompts with, got None")
    tokenizer = with_end_token(tokenizer, model)
    return ResponseCache.build(tokenizer, prompts, [] if examples is None else examples, **layout)


class ScoringJob(VerifiedPaths):
    """The cells of one cache and how to score them on one model: one call of `score_prompts`."""

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
        tokens, report = self.cache.response_lengths.reshape(self.cache.num_prompts, -1), None
        if race is None:
            with self.prepared():
                rounds = [self.measure()]
            nll = rounds[0].nll.reshape(tokens.shape)
        else:
            with self.prepared():
                state, rounds = self._race(race, tokens)
            nll, tokens, report = state.nll, np.where(state.scored, tokens, 0), state.report()
        settled, verified = rounds[-1].settled, [pair for found in rounds for pair in found.verified.items()]
        scores = PromptScores(
            nll=torch.from_numpy(nll),
            tokens=torch.from_numpy(tokens).clone(),
            prompts=list(self.cache.prompts),
            stats={
                "path": settled.name,
                "impl": self.impl,
                "reason": settled.reason,
                "verified": [cell for cell, _ in verified],
                "difference": max((difference for _, difference in verified), default=0.0),
                "dense_tokens": int(self.cache.lengths.sum()),
                "trie_tokens": sum(found.computed for found in rounds),
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

    def _state(self, race: Race, tokens: np.ndarray) -> RaceState:
        if not self.fills_rounds():
            return RaceState(race, tokens)
        cost = self.cache.lengths.reshape(tokens.shape) - self.cache.prefix_lengths[:, None]
        return RaceState(race, tokens, cost, self.max_tokens // 2)

    def fills_rounds(self) -> bool:
        """Whether a round of a race should fill half a forward: not where half the tokens take half the time."""
        return self.device.type != "cpu"

    def part(self, cells: np.ndarray) -> ScoringJob:
        """A job of some of this one's cells, in the same call."""
        part = copy.copy(self)
        part.cache = self.cache.select(cells)
        part.longest = int(part.cache.lengths.max()) + 1
        return part

    def _race(self, race: Race, tokens: np.ndarray) -> tuple[RaceState, list[Measured]]:
        """Score the cells of a race, round by round; from the beginning if a round needs another path."""
        state, rounds, settled, prefixes = self._state(race, tokens), [], None, self._prefix_cache()
        while (cells := state.next_cells()) is not None:
            job = self.part(cells)
            job.prefixes, job.settled = prefixes, settled
            found = job.measure()
            changed = settled is not None and found.settled.path != settled.path
            settled = found.settled
            if changed:
                # The rounds before went by a path that is not the plain model's any more.
                state, rounds, prefixes = self._state(race, tokens), [], self._prefix_cache()
            else:
                state.add(cells, found.nll)
                rounds.append(found)
            prefixes = prefixes if settled.path == TREE else None
        return state, rounds
