"""Scoring all pools inside a run, and knowing when to do it again."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import sapo_kernels as sk

from .choice import Choice
from .config import SapoConfig

# How many of the newest logged losses are compared with the prediction.
DRIFT_RECENT = 3


@dataclass
class Scoring:
    """One scoring of all pools: step, why, seconds, what changed, and every prompt's mean loss by task (nats/token).

    predicted: mean loss of the chosen prompts over all probes and its standard error.
    """

    step: int
    reason: str
    seconds: float
    losses: dict[str, list[float]]
    chosen: dict[str, int]
    switches: list[tuple[str, int, int]] = field(default_factory=list)
    predicted: tuple[float, float] = (math.nan, math.nan)


class Rescorer:
    """Scores every pool on its probe with the model as it is, and updates the choice.

    Args:
        choice: the pools and their state.
        probes: for each task the examples to score on.
        tokenizer, config: as in `attach_sapo`.
    """

    def __init__(self, choice: Choice, probes: Mapping[str, Sequence], tokenizer: Any, config: SapoConfig):
        self.choice, self.config = choice, config
        self.caches = {
            task: sk.ResponseCache.build(
                tokenizer, pool.prompts, probes[task], config.template, suffix=pool.suffix, text_word=pool.text_word,
                max_source=config.max_source, max_target=config.max_target,
            )
            for task, pool in choice.pools.items()
        }  # fmt: skip

    def score(self, model: Any, step: int, reason: str, agree=None) -> Scoring:
        """Score all pools and settle the choice.

        `agree` maps float64 tensors, the [2, P, K] losses and counts first, to those of all ranks (rank 0's).
        """
        started = time.perf_counter()
        state, config = self.choice.state, self.config
        sums = torch.zeros(2, state.num_pools, state.num_prompts, dtype=torch.float64)
        scored = []
        for p, cache in enumerate(self.caches.values()):
            scores = sk.score_prompts(model, cache, max_tokens=config.max_tokens, progress=False)
            sums[0, p, : cache.num_prompts], sums[1, p, : cache.num_prompts] = scores.nll.sum(1), scores.tokens.sum(1)
            scored.append(scores)
        if agree is not None:
            sums = agree(sums)
        temperature = config.temperature if config.mode == "soft" else 0.0
        sk.reweight_(state, sums[0], sums[1].long(), config.decay, temperature, config.floor)
        switches = self.choice.settle()
        tasks = self.choice.tasks
        predicted = prediction(scored, self.choice.chosen.tolist())
        if agree is not None:
            # Drift is judged by it: all ranks must come to the same verdict, or one scores alone and waits for ever.
            predicted = tuple(agree(torch.tensor(predicted, dtype=torch.float64)).tolist())
        return Scoring(
            step=step,
            reason=reason,
            seconds=time.perf_counter() - started,
            losses={t: state.mean[p, : len(self.choice.pools[t].prompts)].tolist() for p, t in enumerate(tasks)},
            chosen=dict(zip(tasks, self.choice.chosen.tolist(), strict=True)),
            switches=switches,
            predicted=predicted,
        )


@dataclass
class Drift:
    """Whether the training loss has departed from what the last scoring predicted, by more than the noise of both.

    `predicted` and `error`: mean loss of the chosen prompts on the probe and its standard error, nats per token. The
    mean of the newest `DRIFT_RECENT` logged losses is compared with it; their own spread counts too. A loss that falls
    as the model learns departs as well: then the model is another one, and it is asked again when `cooldown` losses
    have been logged.
    """

    threshold: float | None
    cooldown: int
    predicted: float = math.nan
    error: float = math.nan
    losses: list[float] = field(default_factory=list)

    def restart(self, predicted: float, error: float) -> None:
        """A scoring has been made."""
        self.predicted, self.error, self.losses = predicted, error, []

    def seen(self, loss: float) -> bool:
        """Add a logged loss; True if it is time to score again."""
        if self.threshold is None or not (math.isfinite(loss) and math.isfinite(self.predicted)):
            return False
        self.losses = [*self.losses, loss][-max(self.cooldown, DRIFT_RECENT) :]
        return len(self.losses) >= max(self.cooldown, DRIFT_RECENT) and abs(self.distance()) > self.threshold

    def distance(self) -> float:
        """How far the newest losses are above (+) or below (-) the prediction, in standard errors."""
        recent = self.losses[-DRIFT_RECENT:]
        mean = math.fsum(recent) / len(recent)
        spread = math.fsum((loss - mean) ** 2 for loss in recent) / (len(recent) - 1) / len(recent)
        # The smallest number keeps the sign where there is no noise at all.
        return (mean - self.predicted) / math.sqrt(max(spread + self.error**2, 1e-24))


def prediction(scores: Sequence[sk.PromptScores], chosen: Sequence[int]) -> tuple[float, float]:
    """(mean loss, its standard error) of the chosen prompts over all probes, nats per token, weighted by tokens."""
    nll = torch.cat([one.nll[k] for one, k in zip(scores, chosen, strict=True)])
    tokens = torch.cat([one.tokens[k] for one, k in zip(scores, chosen, strict=True)]).double()
    mean = nll.sum() / tokens.sum()
    # The ratio estimator's linearisation: each example counts with what it adds to the mean's error.
    return float(mean), float((nll - mean * tokens).square().sum().sqrt() / tokens.sum())
