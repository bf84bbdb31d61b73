"""Is one prompt's loss above another's? Evidence from a growing sample of the examples, drawn without replacement.

Two prompts differ by ``d[m]`` on example m, in nats per token; ``D = mean(d)`` over all M examples is the difference of
their losses. The examples are seen in a random order. Somebody who believes ``D <= theta`` must take a bet that is fair
or worse for us on every next example: before it is seen we choose a stake ``s >= 0``, and our capital is multiplied by

    1 + s * (d - e(theta)),     e(theta) = (M * theta - sum of the d seen) / (examples left),

because e(theta) is at least what the next difference is on average if ``D <= theta``. Starting with 1, the capital
ever reaches 1 / alpha with probability alpha at most (Ville's inequality), however often one looks: so when it does,
``D > theta`` is concluded. The stakes may depend on everything that was seen before.

The capital must stay positive, and no sample can tell how low a difference may lie that nobody has seen. Hence the one
assumption, the *reach*: differences below ``floor = mean - reach * (largest distance from it)``, both of the examples
seen before the bet, count as ``floor``. If no unseen difference lies below it at any bet, alpha holds exactly, for
every M, number of examples and shape of the distribution. If some do, the conclusion is ``D > theta - tail``, where
tail is the largest sum over the unseen examples of what is missing to the floor, divided by M.

Examples fall into *strata*, known beforehand: equal responses, or responses of like length. From each difference the
mean of its stratum, as the examples before have it, is taken, and the mean of the same over all examples left is added:
that leaves the mean over the examples left as it was, and takes out the noise that a stratum's examples share. The bets
are on what is left. In the floor, the mean is what the strata let one expect of the examples left; the distance is that
of the differences as they are. A stratum that says nothing costs a little variance, never the promise
(`sapo_kernels.race_strata`).

A control ``z``, known for all M examples (the same difference under an earlier state of the model), takes part of the
noise out: ``d - b * (z - mean of the z left)`` has the same mean over the examples left for every b that was chosen
before. b is estimated on the way, so a control that predicts nothing is soon ignored. The capital is spread over
several rules for the stakes, with and without the control: an average of fair games is a fair game.

"Nobody is better than this prompt" is refuted with less: the bet on each example may be against another rival, the one
that leads after the examples before, because every rival's difference is then bounded by the same belief. That needs
no correction for the number of rivals.

Sources: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (2021) and "Confidence
sequences for sampling without replacement" (2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .race_strata import expected_means, without_strata

# Examples that are only looked at before the first bet: stakes need an idea of the spread.
WARM_UP = 4
# The largest part of the capital that can be lost on one example.
MOST = 0.9
# Before b is learned, an old difference is believed (b = 1) like this many examples that say so.
PRIOR_EXAMPLES = 4.0
# Two more rules aim this many standard deviations below the mean, whatever is to be shown: bounds for any theta.
STEADY = (0.7, 0.35)
_TINY = 1e-300


@dataclass(frozen=True)
class Differences:
    """P series of differences in the order drawn, nats per token, each between a prompt and its rivals.

    value: [P, n], this prompt minus the rival it has on that example.
    before: [P, n], sum of the differences from that same rival over the examples before.
    control: [P, n] the difference in the memory, less its mean over all examples, and control_left, its mean over this
        and the examples after; control_variance: [P, 1] over all examples. None without a memory.

    With one rival throughout, see `with_one_rival`, the mean of the series is the difference of two losses.
    """

    value: np.ndarray
    before: np.ndarray
    control: np.ndarray | None = None
    control_left: np.ndarray | None = None
    control_variance: np.ndarray | None = None

    @classmethod
    def with_one_rival(cls, drawn: np.ndarray, control: np.ndarray | None = None) -> Differences:
        """drawn: [P, n]. control: [P, M] in the same order, or None."""
        before = np.cumsum(drawn, 1) - drawn
        if control is None:
            return cls(drawn, before)
        n, population = drawn.shape[1], control.shape[1]
        centred = control - control.mean(1, keepdims=True)
        seen = centred[:, :n]
        left = -(np.cumsum(seen, 1) - seen) / (population - np.arange(n))
        return cls(drawn, before, seen, left, (centred * centred).mean(1, keepdims=True))

    def reversed(self) -> Differences:
        """The rivals minus the prompts."""
        control = None if self.control is None else -self.control
        left = None if self.control_left is None else -self.control_left
        return Differences(-self.value, -self.before, control, left, self.control_variance)


class Evidence:
    """What the first n of M examples say about P prompts and their rivals.

    Args:
        seen: the differences.
        population: M.
        margin: nats per token; the stakes aim at showing ``D > 0`` and ``D > -margin``. Fixed beforehand.
        reach: see above.
        openings: (examples looked at before the first bet, share of the capital for it: a number or [P]). The shares of
            one truth add up to 1 over everything that could refute it.
        stratum: [M] the stratum of each example in the order drawn; None: all are alike.

    Attributes:
        seen: as given.
        mean: [P] of the differences seen.
        estimate: of the differences of all examples, corrected by the control or by the strata.
    """

    def __init__(
        self,
        seen: Differences,
        population: int,
        margin: float,
        reach: float,
        openings=((WARM_UP, 1.0),),
        stratum: np.ndarray | None = None,
    ):
        n = seen.value.shape[1]
        stratum = np.zeros(population, dtype=np.int64) if stratum is None else stratum
        self.mean, self.estimate = seen.value.mean(1), expected_means(seen.value, stratum)
        self.complete, self.seen = n == population, seen
        self._games: list[tuple[np.ndarray, _Game]] = []
        series = [seen.value]
        if seen.control is not None:
            slope = _slope(seen)
            self.estimate = self.mean - slope[:, -1] * seen.control.mean(1)
            # b for an example was learned from those before it.
            slope = np.concatenate([np.ones((len(slope), 1)), slope[:, :-1]], 1)
            series.append(seen.value - slope * (seen.control - seen.control_left))
        for first, share in openings:
            if n > first and not self.complete and np.any(share):
                with np.errstate(divide="ignore"):
                    share = np.log(np.broadcast_to(np.asarray(share, dtype=np.float64), self.mean.shape) / len(series))
                self._games += [(share, _Game(v, seen.before, margin, reach, first, stratum)) for v in series]

    def log_capital(self, theta: np.ndarray | float) -> np.ndarray:
        """[P] natural logarithm of the capital against ``D <= theta``; +-inf once all examples are seen.

        What was not bet with is not counted, so without bets this is -inf.
        """
        theta = np.broadcast_to(np.asarray(theta, dtype=np.float64), self.mean.shape)
        if self.complete:
            return np.where(self.mean > theta, math.inf, -math.inf)
        if not self._games:
            return np.full(len(theta), -math.inf)
        return _log_sum(np.stack([share + game.log_capital(theta) for share, game in self._games]))

    def lower_bound(self, level: float) -> np.ndarray:
        """[P] the largest theta below which all are refuted, ``log_capital(theta) >= level``; -inf if none is.

        The capital never grows with theta, so this is a bisection; it ends within 1e-9 of the width.
        """
        if self.complete:
            return self.mean.copy()
        width = np.maximum(np.abs(self.seen.value - self.mean[:, None]).max(1, initial=0.0), _TINY)
        high, low = self.mean + width, np.full_like(width, -math.inf)
        for step in 4.0 ** np.arange(1, 12):
            candidate = self.mean - step * width
            found = np.isinf(low) & (self.log_capital(candidate) >= level)
            low = np.where(found, candidate, low)
        known = np.isfinite(low)
        for _ in range(64):
            if not known.any() or (high - low)[known].max() <= 1e-9 * width[known].max():
                break
            middle = np.where(known, 0.5 * (np.where(known, low, 0.0) + high), 0.0)
            refuted = self.log_capital(middle) >= level
            low = np.where(known & refuted, middle, low)
            high = np.where(known & ~refuted, middle, high)
        return low


class _Game:
    """One series of bets for P prompts: everything about them that does not depend on theta.

    values: [P, n], the differences, or these without part of their noise; what their strata let one expect is taken
    out here. Their mean over the examples left is that of the differences. before: as in `Differences`. first: examples
    before the first bet. stratum: [M], in the order drawn.
    """

    def __init__(self, values: np.ndarray, before: np.ndarray, margin: float, reach: float, first: int, stratum):
        population = len(stratum)
        count = np.arange(first, values.shape[1])  # examples seen before each bet
        self.left, self.population = population - count, population
        even, mean, variance, spread = (part[:, first:] for part in without_strata(values, stratum))
        self.before = before[:, first:]
        self.floor = mean - reach * spread
        self.value = np.maximum(even, self.floor)
        stakes = []
        for aim in (0.0, -margin):
            # The stake that lets the capital grow fastest against this aim, if the next is like those before.
            gap = np.maximum(mean - (population * aim - self.before) / self.left, 0.0)
            stakes.append(gap / (variance + gap * gap + _TINY))
        for part in STEADY:
            stakes.append(part * np.sqrt(variance) / ((1.0 + part * part) * variance + _TINY))
        self.stakes = np.stack(stakes)

    def log_capital(self, theta: np.ndarray) -> np.ndarray:
        """[P] of the mean capital over the rules for the stakes."""
        expected = (self.population * theta[:, None] - self.before) / self.left
        room = expected - self.floor
        with np.errstate(divide="ignore"):
            most = np.where(room > 0, MOST / np.maximum(room, _TINY), math.inf)
        logs = np.log1p(np.minimum(self.stakes, most) * (self.value - expected)).sum(2)
        return _log_sum(logs) - math.log(len(logs))


def _log_sum(logs: np.ndarray) -> np.ndarray:
    """``log(exp(logs).sum(0))``; faster here than ``np.logaddexp.reduce``."""
    top = logs.max(0)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(logs - top).sum(0)) + top


def _slope(seen: Differences) -> np.ndarray:
    """[P, n] the slope b of the differences on the control, as the first 1, 2, ... examples have it."""
    shifted, z = seen.value - seen.value[:, :1], seen.control
    count = np.arange(1, z.shape[1] + 1)
    both = np.cumsum(z * shifted, 1) - np.cumsum(z, 1) * np.cumsum(shifted, 1) / count
    prior = PRIOR_EXAMPLES * seen.control_variance
    return (both + prior) / (np.cumsum(z * z, 1) + prior + _TINY)
