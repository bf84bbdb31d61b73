"""Race: score all prompts on a few examples, then only those that may still be the best on more.

`Race` says how, `RaceState` holds one: it names the cells of the next round, takes their losses, and drops prompts.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from .prompt_scores import PromptScores
from .race_report import RaceReport

# Pools have a few to some dozens of prompts, and the rate of errors hardly depends on their number.
RIVALS = 20


@dataclass(frozen=True)
class Race:
    """How to look for the best of K prompts without scoring all K * M cells; for `score_prompts(..., race=Race())`.

    All prompts are scored on the first examples of a random order, then on more, round by round. After each round every
    prompt is compared with the one that leads, example by example: a prompt is dropped when its mean loss lies above
    the leader's, less the tolerance, by `quantile` standard errors of the difference. The standard deviation of a
    difference counts as no less than the median one, and the error shrinks to 0 as the sample becomes all M examples.
    The race ends when one prompt is left; those left after all examples are compared exactly as without a race. A
    prompt with a loss that is not finite is out, and those dropped because of it are compared with the next leader.

    What this is worth was measured, not proven: a prompt that is best because of a few examples not yet scored is
    dropped by any rule. `benchmarks.racing` replays the rule on loss matrices of trained models and counts what
    it saves and how often it chooses a prompt whose loss is more than half a percent above the lowest.

    Args:
        delta: how readily prompts are dropped, in [0, 1). Smaller is safer and slower; 0 scores every cell. It is the
            knob of `quantile`, that of a normal distribution for twenty rivals looked at once, and no bound on the rate
            of errors: differences are not normal, and they are looked at after every round.
        tolerance: nats per token; prompts shown to be at most this much better than the leader are dropped too.
        relative: the same as a share of the leader's loss; the larger of the two counts. With both 0 near ties are
            decided too, for which most examples are needed.
        first: examples of the first round, at least 2. Fewer save more, and standard errors can be trusted less.
        growth: each round ends at this multiple of the examples of the one before, or later: on a GPU, which takes as
            long for a few tokens as for many, rounds are filled up to whole halves of a forward.
        seed: of the order of the examples. The same seed and losses give the same race where `max_tokens` and
            the kind of device are the same.

    Raises:
        ValueError, TypeError: naming the option, what was expected and what was got.
    """

    delta: float = 0.05
    tolerance: float = 0.0
    relative: float = 0.005
    first: int = 16
    growth: float = 1.1
    seed: int = 0

    def __post_init__(self):
        for name, high in (("delta", 1.0), ("tolerance", math.inf), ("relative", 1.0)):
            value = getattr(self, name)
            if not (_number(value) and 0.0 <= value < high):
                raise ValueError(f"{name}: expected a number of at least 0 and below {high:g}, got {value!r}")
        if not (_number(self.growth) and 1.0 < self.growth < math.inf):
            raise ValueError(f"growth: expected a number above 1, got {self.growth!r}")
        if type(self.first) is not int or self.first < 2:
            raise ValueError(f"first: expected a whole number of at least 2, got {self.first!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed: expected a whole number, got {self.seed!r}")

    def order(self, num_examples: int) -> list[int]:
        """The examples in the order in which they are scored: that of a hash, the same in every version and process."""

        def place(example: int) -> bytes:
            return hashlib.blake2b(f"{self.seed} {example}".encode(), digest_size=16).digest()

        return sorted(range(num_examples), key=place)

    @property
    def quantile(self) -> float:
        """How many standard errors behind the leader a prompt is dropped: 2.81 by default."""
        return -NormalDist().inv_cdf(self.delta / RIVALS) if self.delta else math.inf


class RaceState:
    """One race over K prompts x M examples.

    Args:
        race: the options.
        tokens: [K, M] int64, response tokens of every cell, also of those never scored.
        cost: [K, M] int64, tokens that the model computes for each cell, about; with `fill` only.
        fill: rounds are filled up with examples to whole multiples of this many tokens; 0: they are not.

    Use::

        while (cells := state.next_cells()) is not None:      # flat numbers k * M + m, ascending
            state.add(cells, nll)                         # [len(cells)] float64, nats
        state.report()
    """

    def __init__(self, race: Race, tokens: np.ndarray, cost: np.ndarray | None = None, fill: int = 0):
        self.race, self.tokens, self.cost, self.fill = race, tokens, cost, fill
        self.num_prompts, self.num_examples = tokens.shape
        self.order = np.asarray(race.order(self.num_examples))
        self.nll = np.full(tokens.shape, np.nan)
        self.scored = np.zeros(tokens.shape, dtype=bool)
        # The loss sum(nll) / sum(tokens) is the mean of these multiples of the cells, as all tokens are known ahead.
        self._weight = self.num_examples / tokens.sum(1, keepdims=True)
        self.active = np.ones(self.num_prompts, dtype=bool)
        self.broken = np.zeros(self.num_prompts, dtype=bool)  # a cell that is not finite
        self.left = np.zeros(self.num_prompts, dtype=np.int64)
        self.close = np.zeros(self.num_prompts, dtype=bool)  # dropped within the tolerance
        self.size, self.rounds = self._filled(race.first), []

    def next_cells(self) -> np.ndarray | None:
        """The cells of the next round, or None if the race is over."""
        if self.rounds and self.active.sum() <= 1:
            return None
        block = np.zeros(self.tokens.shape, dtype=bool)
        block[np.ix_(self.active, self.order[: self.size])] = True
        return np.flatnonzero(block & ~self.scored)

    def add(self, cells: np.ndarray, nll: np.ndarray) -> None:
        """Take the losses of the cells that `next_cells` named and decide which prompts are dropped."""
        self.nll.flat[cells], self.scored.flat[cells] = nll, True
        self.rounds.append(self.size)
        self.left[self.active] = len(self.rounds)
        broken = (self.scored & ~np.isfinite(self.nll)).any(1)
        if (broken & ~self.broken).any():
            # Prompts that were dropped because of it get the cells that they have missed.
            self.broken, self.active = broken, ~broken
            if not self.scored[np.ix_(self.active, self.order[: self.size])].all():
                return
        if self.active.any():
            self._judge()
        self.size = self._filled(math.ceil(self.size * self.race.growth))

    def _filled(self, size: int) -> int:
        """Examples of a round that has at least `size` of them, up to all."""
        size = min(size, self.num_examples)
        if self.fill:
            new = self.active[:, None] & ~self.scored
            total = (self.cost * new).sum(0)[self.order].cumsum()
            size = max(size, int(total.searchsorted(-(-total[size - 1] // self.fill) * self.fill, "right")))
        return size

    def _judge(self) -> None:
        """Drop the active prompts that are not worth going on with."""
        live, n = np.flatnonzero(self.active), self.size
        if n == self.num_examples:
            # Exactly as a call without a race has them.
            losses = PromptScores(*map(torch.from_numpy, (self.nll[live], self.tokens[live])), []).loss.numpy()
            self.active[:] = np.arange(self.num_prompts) == live[np.argmin(losses)]
            self.close[live] = False
            return
        if not self.race.delta:
            return
        values = self.nll[np.ix_(live, self.order[:n])] * self._weight[live]
        means = values.mean(1)
        best = int(np.argmin(means))
        apart = values - values[best]
        spread = apart.std(1, ddof=1)
        # Few examples may lack those on which two prompts differ; other pairs have met them.
        spread = np.maximum(spread, np.median(spread))
        margin = self.race.quantile * spread * math.sqrt((1 - n / self.num_examples) / n)
        tolerance = max(self.race.tolerance, self.race.relative * float(means[best]))
        behind = means - means[best]
        dropped = behind + tolerance > margin
        dropped[best] = False
        self.active[live[dropped]] = False
        self.close[live] = behind <= margin

    def report(self) -> RaceReport:
        """The outcome; call it when `next_cells` has returned None."""
        winner = int(np.argmax(self.active)) if self.active.any() else -1
        reason = np.where(self.close, "within tolerance", "worse")
        reason = np.where(self.broken, "not finite", np.where(np.arange(self.num_prompts) == winner, "winner", reason))
        return RaceReport(
            winner=winner,
            examples=self.scored.sum(1).tolist(),
            left=self.left.tolist(),
            reason=reason.tolist(),
            rounds=self.rounds,
            cells=int(self.scored.sum()),
            total=self.scored.size,
        )


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
