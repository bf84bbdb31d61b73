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
seen before, count as ``floor``. If no unseen difference lies below it, alpha holds exactly, for every M, number of
examples and shape of the distribution. If some do, the conclusion is ``D > theta - tail``, where tail is the largest
sum over the unseen examples of what is missing to the floor, divided by M.

A control ``z``, known for all M examples (the same difference under an earlier state of the model), takes part of the
noise out: ``d - b * (z - mean of the z left)`` has the same mean over the examples left for every b that was chosen
before. b is estimated on the way, so a control that predicts nothing is soon ignored. The capital is spread evenly over
several rules for the stakes, with and without the control: an average of fair games is a fair game.

Sources: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (2021) and "Confidence
sequences for sampling without replacement" (2020).
"""

from __future__ import annotations

import math

import numpy as np

# Examples that are only looked at before the first bet: stakes need an idea of the spread.
WARM_UP = 4
# The largest part of the capital that can be lost on one example.
MOST = 0.9
# Before b is learned, an old difference is believed (b = 1) like this many examples that say so.
PRIOR_EXAMPLES = 4.0
# Two more rules aim this many standard deviations below the mean, whatever is to be shown: bounds for any theta.
STEADY = (0.7, 0.35)
_TINY = 1e-300


class PairEvidence:
    """What the first n of M examples say about P pairs of prompts.

    Args:
        drawn: [P, n] float64, differences in the order drawn, nats per token.
        population: M.
        margin: nats per token; the stakes aim at showing ``D > 0`` and ``D > -margin``.
        reach: see above.
        control: [P, M] float64, in the same order, or None.

    Attributes:
        estimate: [P] of D: the mean of `drawn`, corrected by the control.
    """

    def __init__(
        self, drawn: np.ndarray, population: int, margin: float, reach: float, control: np.ndarray | None = None
    ):
        self.drawn, self.population = drawn, population
        self.complete = drawn.shape[1] == population
        self.mean = self.estimate = drawn.mean(1)
        self._games: list[_Game] = []
        if drawn.shape[1] > WARM_UP and not self.complete:
            self._games.append(_Game(drawn, drawn, population, margin, reach))
            if control is not None:
                values, self.estimate = _without_noise(drawn, control)
                self._games.append(_Game(values, drawn, population, margin, reach))

    def log_capital(self, theta: np.ndarray | float) -> np.ndarray:
        """[P] natural logarithm of the capital against ``D <= theta``; +-inf once all examples are seen."""
        theta = np.broadcast_to(np.asarray(theta, dtype=np.float64), (len(self.drawn),))
        if self.complete:
            return np.where(self.mean > theta, math.inf, -math.inf)
        if not self._games:
            return np.zeros(len(self.drawn))
        logs = np.concatenate([game.log_capitals(theta) for game in self._games])
        top = logs.max(0)
        return np.log(np.exp(logs - top).mean(0)) + top

    def lower_bound(self, level: np.ndarray | float) -> np.ndarray:
        """[P] the largest theta below which all are refuted, ``log_capital(theta) >= level``; -inf if none is.

        The capital never grows with theta, so this is a bisection; it ends within 1e-9 of the width.
        """
        if self.complete:
            return self.mean.copy()
        level = np.broadcast_to(np.asarray(level, dtype=np.float64), self.mean.shape)
        width = np.maximum(np.abs(self.drawn - self.mean[:, None]).max(1, initial=0.0), _TINY)
        high, low = self.mean + width, np.full_like(width, -math.inf)
        for step in 4.0 ** np.arange(1, 12):
            candidate = self.mean - step * width
            found = np.isinf(low) & (self.log_capital(candidate) >= level)
            low = np.where(found, candidate, low)
        known = np.isfinite(low)
        for _ in range(64):
            middle = np.where(known, 0.5 * (np.where(known, low, 0.0) + high), 0.0)
            refuted = self.log_capital(middle) >= level
            low = np.where(known & refuted, middle, low)
            high = np.where(known & ~refuted, middle, high)
            if not known.any() or (high - low)[known].max() <= 1e-9 * width[known].max():
                break
        return low


class _Game:
    """One series of bets for P pairs: everything about them that does not depend on theta.

    values: [P, n], what is bet on (`drawn`, or without part of its noise); the mean over the examples left is that of
    the differences themselves.
    """

    def __init__(self, values: np.ndarray, drawn: np.ndarray, population: int, margin: float, reach: float):
        n = values.shape[1]
        count = np.arange(WARM_UP, n)  # examples seen before each bet
        left = population - count
        mean, spread, variance = (part[:, WARM_UP - 1 : -1] for part in _running(values))
        self.seen_sum = (np.cumsum(drawn, 1) - drawn)[:, WARM_UP:]
        self.left, self.population = left, population
        self.floor = mean - reach * spread
        self.value = np.maximum(values[:, WARM_UP:], self.floor)
        variance = variance * (1.0 + 1.0 / count)
        stakes = []
        for aim in (0.0, -margin):
            # The stake that lets the capital grow fastest against this aim, if the next is like those before.
            gap = np.maximum(mean - (population * aim - self.seen_sum) / left, 0.0)
            best = gap / (variance + gap * gap + _TINY)
            stakes += [best, 0.5 * best]
        for part in STEADY:
            stakes.append(part * np.sqrt(variance) / ((1.0 + part * part) * variance + _TINY))
        self.stakes = np.stack(stakes)

    def log_capitals(self, theta: np.ndarray) -> np.ndarray:
        """[rules, P], one capital for each rule of the stakes."""
        expected = (self.population * theta[:, None] - self.seen_sum) / self.left
        room = expected - self.floor
        with np.errstate(divide="ignore"):
            most = np.where(room > 0, MOST / np.maximum(room, _TINY), math.inf)
        return np.log1p(np.minimum(self.stakes, most) * (self.value - expected)).sum(2)


def _running(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[P, n] each: mean, largest distance from it, and variance of the first 1, 2, ... values."""
    count = np.arange(1, values.shape[1] + 1)
    # Shifted by the first value, so that squares do not cancel.
    first = values[:, :1]
    mean = np.cumsum(values - first, 1) / count
    square = np.cumsum((values - first) ** 2, 1) / count
    highest, lowest = np.maximum.accumulate(values, 1), np.minimum.accumulate(values, 1)
    variance = np.maximum(square - mean * mean, 0.0)
    mean = mean + first
    return mean, np.maximum(highest - mean, mean - lowest), variance


def _without_noise(drawn: np.ndarray, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([P, n] ``d - b * (z - mean of the z left)``, b learned from the examples before; [P] estimate of D)."""
    n, population = drawn.shape[1], control.shape[1]
    z = control - control.mean(1, keepdims=True)
    variance = (z * z).mean(1, keepdims=True)
    seen = z[:, :n]
    left = -(np.cumsum(seen, 1) - seen) / (population - np.arange(n))
    count = np.arange(1, n + 1)
    centre = np.cumsum(drawn, 1) / count
    both = np.cumsum(seen * (drawn - drawn[:, :1]), 1) - np.cumsum(seen, 1) * (centre - drawn[:, :1])
    squares = np.cumsum(seen * seen, 1)
    slope = (both + PRIOR_EXAMPLES * variance) / (squares + PRIOR_EXAMPLES * variance + _TINY)
    estimate = drawn.mean(1) - slope[:, -1] * seen.mean(1)
    slope = np.concatenate([np.ones((len(drawn), 1)), slope[:, :-1]], 1)
    return drawn - slope * (seen - left), estimate
