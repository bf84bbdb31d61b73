"""Knowing when the training loss has left the course that it took after the last scoring."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .ranks import gathered

# Of how many of the newest losses the noise is estimated.
NOISE_LOSSES = 64


@dataclass
class Drift:
    """Whether the losses have departed from those right after the last scoring, by more than their noise.

    A loss here is what training showed minus what the last scoring expects of the same tasks and prompts, in nats per
    token (`Trained`). Dropout, soft targets or a probe that is easier than the data shift all of them alike: the first
    `window` losses after a scoring say by how much, and the newest `window` are compared with those. The noise comes
    from the differences of neighbours, which a slow course does not enter; where it is known from few of them, more is
    asked (`limit`). Losses are compared after ``2 * window`` of them at the earliest.

    threshold: in standard errors of the difference of the two means; None: never.
    """

    threshold: float | None
    window: int
    first: list[float] = field(default_factory=list)
    newest: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)

    def restart(self) -> None:
        """A scoring has been made. What is known of the noise stays."""
        self.first, self.newest = [], []

    def seen(self, loss: float) -> bool:
        """Add a loss; True if it is time to score again."""
        if self.threshold is None or not math.isfinite(loss):
            return False
        before = [*self.first, *self.newest][-1:]
        self.squares = [*self.squares, *((loss - other) ** 2 for other in before)][-NOISE_LOSSES:]
        if len(self.first) < self.window:
            self.first.append(loss)
        else:
            self.newest = [*self.newest, loss][-self.window :]
        return len(self.newest) == self.window and abs(self.distance()) > self.limit()

    def distance(self) -> float:
        """How far the newest losses are above (+) or below (-) the first ones, in standard errors."""
        apart = math.fsum(self.newest) / len(self.newest) - math.fsum(self.first) / len(self.first)
        # Neighbours differ by twice the variance of one; the mean of each window has 1 / window of it.
        variance = math.fsum(self.squares) / len(self.squares) / 2 * (1 / len(self.newest) + 1 / len(self.first))
        # The smallest number keeps the sign where there is no noise at all.
        return apart / math.sqrt(max(variance, 1e-24))

    def limit(self) -> float:
        """The quantile of Student's distribution with the tail that `threshold` leaves of a normal one."""
        # Differences of neighbours overlap: n of them are worth 2/3 n.
        return _student(self.threshold, 2 / 3 * len(self.squares))


@functools.cache
def _student(threshold: float, freedom: float) -> float:
    from scipy.stats import norm, t

    return float(t.isf(norm.sf(threshold), freedom))


@dataclass
class Trained:
    """What was trained on since the last look: the loss that it showed, and the one that was to be expected.

    loss: sum over optimizer steps of the step's mean loss, nats per token; a float, or a tensor on the device that is
    read only when somebody looks. steps: how many. expected: sum over response tokens of the loss that the last scoring
    found for their task and prompt; tokens: how many, on this rank.
    """

    loss: Any = 0.0
    steps: int = 0
    expected: float = 0.0
    tokens: int = 0

    def batch(self, counts: Mapping[tuple[str, int], int], losses: Mapping[str, list[float]]) -> None:
        """Response tokens of a batch by (task, prompt) are going to be trained on; `losses` by task and prompt."""
        for (task, prompt), tokens in counts.items():
            self.expected += tokens * losses[task][prompt] if losses else 0.0
            self.tokens += tokens

    def excess(self) -> float | None:
        """Loss per token above the expected one, over all ranks; None if nothing was trained. Starts anew."""
        ranks, steps = gathered({**vars(self), "loss": float(self.loss)}), self.steps
        loss, expected, tokens = (sum(one[name] for one in ranks) for name in ("loss", "expected", "tokens"))
        self.loss, self.steps, self.expected, self.tokens = 0.0, 0, 0.0, 0
        return loss / len(ranks) / steps - expected / tokens if steps and tokens else None
