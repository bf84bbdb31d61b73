"""Scoring all pools inside a run, and knowing when to do it again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

import torch

import sapo_kernels as sk
from sapo_kernels.scoring.distributed import DEFAULT_TIMEOUT, unshareable
from sapo_kernels.scoring.render import warn_once

from . import ranks as _ranks
from .choice import Choice
from .config import SapoConfig
from .records import numbers, unpacked


@dataclass
class Scoring:
    """One scoring of all pools: step, why, seconds, what changed, and every prompt's mean loss by task (nats/token).

    tokens: by task the response tokens that each loss is over. dense_tokens, computed_tokens: what separate forwards
    would compute, and what was computed. cells_saved: share of the cells that races left out, None without a race;
    after a race losses are those of `PromptScores.loss`, which are estimates for prompts that left early.
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
    cells_saved: float | None = None

    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return numbers({name: value for name, value in asdict(self).items() if value is not None})

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Scoring:
        """The inverse of `record`."""
        return cls(**unpacked(record))


class Rescorer:
    """Scores every pool on its probe with the model as it is, and updates the choice.

    Args:
        choice: the pools and their state.
        probes: for each task the examples to score on.
        tokenizer, config: as in `attach_sapo`.
        timeout: seconds after which a rank that the others wait for is given up.

    `render` comes first.
    """

    def __init__(
        self, choice: Choice, probes: Mapping[str, Sequence], tokenizer: Any, config: SapoConfig,
        timeout: float = DEFAULT_TIMEOUT,
    ):  # fmt: skip
        self.choice, self.probes, self.tokenizer, self.config, self.timeout = choice, probes, tokenizer, config, timeout
        # What hears how far a scoring is: made for each one, from its name and its cells.
        self.progress: Callable[[str, int], Any] | None = None
        # Rank 0's [2, P, K] losses and counts, and state, in place of this rank's.
        self.agree: Callable[[torch.Tensor], torch.Tensor] = _ranks.first_of

    def render(self, now: datetime) -> None:
        """Everything that is scored, as of that moment; see `SapoConfig.now`."""
        config = self.config
        self.caches = {
            task: sk.ResponseCache.build(
                self.tokenizer, pool.prompts, self.probes[task], config.template, suffix=pool.suffix,
                text_word=pool.text_word, max_source=config.max_source, max_target=config.max_target,
                instruction_role=config.instruction_role, now=now,
            )
            for task, pool in self.choice.pools.items()
        }  # fmt: skip

    def score(self, model: Any, step: int, reason: str) -> Scoring:
        """Score all pools and settle the choice.

        Each prompt enters the state with its loss and the response tokens that it was scored on. After a race the loss
        is `PromptScores.loss`, that of the winner plus their difference on the examples that both have, since means
        over different examples cannot be compared; and only the winner may be selected, which need not have the lowest
        of these estimates.
        """
        started = time.perf_counter()
        state, config, tasks = self.choice.state, self.config, self.choice.tasks
        sums = torch.zeros(2, state.num_pools, state.num_prompts, dtype=torch.float64)
        scored: list[sk.PromptScores] = []
        live, may = state.live.clone(), state.live.clone()
        for p, (task, cache) in enumerate(self.caches.items()):
            scores = self._scores(model, task, cache, race_of(config.race, task, step))
            tokens = scores.tokens.sum(1)
            sums[0, p, : cache.num_prompts] = scores.nll.sum(1) if scores.race is None else scores.loss * tokens
            sums[1, p, : cache.num_prompts] = tokens
            if scores.race is not None and scores.race.winner >= 0:
                may[p] = torch.arange(state.num_prompts) == scores.race.winner
            scored.append(scores)
        sums = self.agree(sums)
        state.live.copy_(self.agree(may))
        try:
            temperature = config.temperature if config.mode == "soft" else 0.0
            sk.reweight_(state, sums[0], sums[1].long(), config.decay, temperature, config.floor)
        finally:
            state.live.copy_(live)
        # Processors may differ in the last bits of an exponential: draws are made by rank 0's numbers.
        for value in (state.mean, state.weight, state.probs, state.best, state.effective):
            value.copy_(self.agree(value))
        switches = self.choice.take(state.best.tolist())
        cells = sum(one.scored.numel() for one in scored)
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
            cells_saved=None if config.race is None else 1.0 - sum(int(one.scored.sum()) for one in scored) / cells,
        )

    def _scores(self, model: Any, task: str, cache: sk.ResponseCache, race: sk.Race | None) -> sk.PromptScores:
        """Shared out where there are several ranks and each may score cells of its own, else all cells on each."""
        options: dict[str, Any] = {"max_tokens": self.config.max_tokens}
        if _ranks.several():
            closed = unshareable(model)
            if closed is None:
                return sk.score_prompts_sharded(model, cache, timeout=self.timeout, race=race, **options)
            if race is not None:
                # Ranks that each judge by their own rounding may want different rounds, and then wait for ever.
                warn_once(f"no race, every cell is scored: the ranks cannot share the work: {closed}")
                race = None
        told = self.progress(f"scoring {task}", cache.num_prompts * cache.num_examples) if self.progress else False
        return sk.score_prompts(model, cache, progress=told, race=race, **options)


def race_of(race: sk.Race | None, task: str, step: int) -> sk.Race | None:
    """The race of a task's scoring, whose examples come in an order of their own: no few of them decide every time."""
    if race is None:
        return None
    digest = hashlib.blake2b(f"{race.seed} {step} {task}".encode("utf-8", "surrogatepass"), digest_size=7)
    return replace(race, seed=int.from_bytes(digest.digest(), "big"))
