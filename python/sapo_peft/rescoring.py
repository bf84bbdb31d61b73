"""Scoring all pools inside a run, and knowing when to do it again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import sapo_kernels as sk
from sapo_kernels.sharding import DEFAULT_TIMEOUT, unshareable

from ._ranks import several
from .choice import Choice
from .config import SapoConfig


@dataclass
class Scoring:
    """One scoring of all pools: step, why, seconds, what changed, and every prompt's mean loss by task (nats/token).

    tokens: by task the response tokens that each loss is over. dense_tokens, computed_tokens: what separate forwards
    would compute, and what was computed.
    """

    step: int
    reason: str
    seconds: float
    losses: dict[str, list[float]]
    chosen: dict[str, int]
    switches: list[tuple[str, int, int]] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    dense_tokens: int = 0
    computed_tokens: int = 0


class Rescorer:
    """Scores every pool on its probe with the model as it is, and updates the choice.

    Args:
        choice: the pools and their state.
        probes: for each task the examples to score on.
        tokenizer, config: as in `attach_sapo`.
        patience: seconds after which a rank that the others wait for is given up.
    """

    def __init__(
        self, choice: Choice, probes: Mapping[str, Sequence], tokenizer: Any, config: SapoConfig,
        patience: float = DEFAULT_TIMEOUT,
    ):  # fmt: skip
        self.choice, self.config, self.patience = choice, config, patience
        self.caches = {
            task: sk.ResponseCache.build(
                tokenizer, pool.prompts, probes[task], config.template, suffix=pool.suffix, text_word=pool.text_word,
                max_source=config.max_source, max_target=config.max_target,
            )
            for task, pool in choice.pools.items()
        }  # fmt: skip

    def _scores(self, model: Any, cache: sk.ResponseCache) -> sk.PromptScores:
        """Shared out where there are several ranks and each may score cells of its own, else all cells on each."""
        if several() and unshareable(model) is None:
            return sk.score_prompts_sharded(model, cache, max_tokens=self.config.max_tokens, timeout=self.patience)
        return sk.score_prompts(model, cache, max_tokens=self.config.max_tokens, progress=False)

    def score(self, model: Any, step: int, reason: str, agree=None) -> Scoring:
        """Score all pools and settle the choice.

        `agree` maps float64 tensors, the [2, P, K] losses and counts first, to those of all ranks (rank 0's).
        """
        started = time.perf_counter()
        state, config = self.choice.state, self.config
        sums = torch.zeros(2, state.num_pools, state.num_prompts, dtype=torch.float64)
        scored = []
        for p, cache in enumerate(self.caches.values()):
            scores = self._scores(model, cache)
            sums[0, p, : cache.num_prompts], sums[1, p, : cache.num_prompts] = scores.nll.sum(1), scores.tokens.sum(1)
            scored.append(scores)
        if agree is not None:
            sums = agree(sums)
        temperature = config.temperature if config.mode == "soft" else 0.0
        sk.reweight_(state, sums[0], sums[1].long(), config.decay, temperature, config.floor)
        switches = self.choice.settle()
        tasks = self.choice.tasks
        return Scoring(
            step=step,
            reason=reason,
            seconds=time.perf_counter() - started,
            losses={t: state.mean[p, : len(self.choice.pools[t].prompts)].tolist() for p, t in enumerate(tasks)},
            chosen=dict(zip(tasks, self.choice.chosen.tolist(), strict=True)),
            switches=switches,
            tokens={t: one.tokens.sum(1).tolist() for t, one in zip(tasks, scored, strict=True)},
            dense_tokens=sum(one.stats["dense_tokens"] for one in scored),
            computed_tokens=sum(one.stats["trie_tokens"] for one in scored),
        )
