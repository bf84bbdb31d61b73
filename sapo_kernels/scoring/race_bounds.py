"""Is one prompt's loss above another's? Evidence from a growing sample of the examples, drawn without replacement.

Two prompts differ by ``d[m]`` on example m, in nats per token; ``D = mean(d)`` over all M examples is the difference of
their losses. The examples are seen in a random order. Somebody who believes ``D <= theta`` must take a bet that is fair
or worse for us on every next example: before it is seen we choose a stake ``s >= 0``, and our capital is multiplied by

    1 + s * (d - e(theta)),     e(theta) = (M * theta - sum of the d seen) / (examples left),

because e(theta) is at least what the next difference is on average if ``D <= theta``. Starting with 1, the capital
ever reaches 1 / alpha with probability alpha at most (Ville's inequality), however often one looks: so when it does,
``D > theta`` is concluded. The stakes may depend on everything that was seen before.

The capital must stay positive, and no sample can tell how low a difference may lie that nobody has seen. Hence the one
assumption, the *reach*: differences below ``floor = mean - reach * (1 + 2 / n) * (how far the lowest lies below it)``,
of the n examples seen before the bet, count as ``floor``. That no unseen difference lies below it at any bet, and the
truth is refuted all the same, has probability alpha at most, for every M, number of examples and shape of the
distribution. In most orders some do at the first bets, if only by a little; then the conclusion is
``D > theta - tail``, where tail is the largest sum over the unseen examples of what is missing to the floor, divided
by M.

Examples fall into *strata*, known beforehand: equal responses, or responses of like length. From each difference the
mean of its stratum, as the examples before have it, is taken, and the mean of the same over all examples left is added:
that leaves the mean over the examples left as it was, and takes out the noise that a stratum's examples share. The bets
are on what is left. In the floor, the mean is what the strata let one expect of the examples left; the depth is that
of the differences as they are. A stratum that says nothing costs a little variance, never the promise
(`sapo_kernels.scoring.race_strata`).

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

import functools
import math

import numpy as np

from .race_strata import expected_means, without_strata

# Examples that are only looked at before the first bet: stakes need an idea of the spread.
WARM_UP = 4
# The reach is longer while few were seen: by this over their number.
EARLY = 2.0
# The largest part of the capital that can be lost on one example.
MOST = 0.9
# Before b is learned, an old difference is believed (b = 1) like this many examples that say so.
PRIOR_EXAMPLES = 4.0
# Another rule aims this many standard deviations below the mean, whatever is to be shown: bounds for any theta.
STEADY = 0.8
_TINY = 1e-300


class Evidence:
    """What the first n of M examples say about P prompts and one rival.

    Args:
        drawn: [P, n], the differences in the order drawn, nats per token: of the prompts minus the rival. NaN where the
            rival was not scored; nothing before that is touched by it.
        population: M.
        margin: nats per token; the stakes aim at showing ``D > -margin``. Fixed beforehand.
        reach: see above.
        openings: (examples looked at before the first bet, share of the capital for it: a number or [P]). The shares of
            one truth add up to 1 over everything that could refute it.
        stratum: [M] the stratum of each example in the order drawn; None: all are alike.
        control: [P, M] the same differences under an earlier state, in the order drawn, or None.

    Attributes:
        drawn: as given.
        mean: [P] of the differences seen.
        estimate: [P] of the differences of all examples, corrected by the control or by the strata.
    """

    def __init__(
        self,
        drawn: np.ndarray,
        population: int,
        margin: float,
        reach: float,
        openings=((WARM_UP, 1.0),),
        stratum: np.ndarray | None = None,
        control: np.ndarray | None = None,
    ):
        self.drawn = drawn
        self.openings = [(first, share) for first, share in openings if np.any(share)]
        stratum = np.zeros(population, dtype=np.int64) if stratum is None else stratum
        self.mean, self.complete = drawn.mean(1), drawn.shape[1] == population
        self._series, self._rules = [drawn], (margin, reach, stratum)
        if control is None:
            self.estimate = expected_means(drawn, stratum)
        else:
            without, self.estimate = _without_control(drawn, control)
            self._series.append(without)

    @functools.cached_property
    def _games(self) -> list[_Game]:
        """Not made for who only asks for the estimate."""
        before = np.cumsum(self.drawn, 1) - self.drawn
        return [_Game(values, before, *self._rules) for values in self._series]

    def growth(self, theta: np.ndarray | float) -> np.ndarray:
        """[rules, P, n] what each bet adds to the logarithm of the capital against ``D <= theta``; 0 in the warm-up.

        n < M: nothing is left to bet on once all examples are seen.
        """
        theta = np.broadcast_to(np.asarray(theta, dtype=np.float64), self.mean.shape)
        return np.concatenate([game.growth(theta) for game in self._games])

    def log_capital(self, theta: np.ndarray | float) -> np.ndarray:
        """[P] natural logarithm of the capital against ``D <= theta``; +-inf once all examples are seen.

        What was not bet with is not counted, so without bets this is -inf.
        """
        if self.complete:
            return np.where(self.mean > theta, math.inf, -math.inf)
        openings = [(first, share) for first, share in self.openings if first < self.drawn.shape[1]]
        if not openings:
            return np.full(len(self.mean), -math.inf)
        growth, parts = self.growth(theta), []
        for first, share in openings:
            with np.errstate(divide="ignore"):
                share = np.log(np.broadcast_to(np.asarray(share, dtype=np.float64), self.mean.shape))
            parts.append(share + log_mean(growth[:, :, first:].sum(2)))
        return np.logaddexp.reduce(parts)

    def lower_bound(self, level: float) -> np.ndarray:
        """[P] the largest theta below which all are refuted, ``log_capital(theta) >= level``; -inf if none is.

        The capital never grows with theta, so this is a bisection; it ends within 1e-9 of the width.
        """
        if self.complete:
            return self.mean.copy()
        width = np.maximum(np.abs(self.drawn - self.mean[:, None]).max(1, initial=0.0), _TINY)
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
    """One series of bets for P prompts: everything about them that does not depend on theta, the stakes before all.

    values: [P, n], the differences, or these without part of their noise; what their strata let one expect is taken
    out here. Their mean over the examples left is that of the differences. before: [P, n] sum of the differences
    before. stratum: [M], in the order drawn.
    """

    def __init__(self, values: np.ndarray, before: np.ndarray, margin: float, reach: float, stratum: np.ndarray):
        self.population = len(stratum)
        self.left = self.population - np.arange(values.shape[1])  # examples before each bet is settled
        even, mean, variance, depth = without_strata(values, stratum)
        longer = 1.0 + EARLY / np.maximum(np.arange(values.shape[1]), 1)
        self.before, self.floor = before, mean - reach * longer * depth
        self.value = np.maximum(even, self.floor)
        # The stake that lets the capital grow fastest against -margin, if the next is like those before.
        gap = np.maximum(mean + (self.population * margin + before) / self.left, 0.0)
        steady = STEADY * np.sqrt(variance) / ((1.0 + STEADY * STEADY) * variance + _TINY)
        self.stakes = np.stack([gap / (variance + gap * gap + _TINY), steady])

    def growth(self, theta: np.ndarray) -> np.ndarray:
        """[rules, P, n], see `Evidence.growth`."""
        expected = (self.population * theta[:, None] - self.before) / self.left
        room = expected - self.floor
        most = np.where(room > 0, MOST / np.maximum(room, _TINY), math.inf)
        made = np.log1p(np.minimum(self.stakes, most) * (self.value - expected))
        made[:, :, :WARM_UP] = 0.0
        return made


def log_mean(logs: np.ndarray) -> np.ndarray:
    """``log(exp(logs).mean(0))``."""
    top = logs.max(0)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(logs - top).mean(0)) + top


def _without_control(drawn: np.ndarray, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The differences without what the control says of their noise, [P, n], and the corrected mean, [P]."""
    n, population = drawn.shape[1], control.shape[1]
    z = control - control.mean(1, keepdims=True)
    prior = PRIOR_EXAMPLES * (z * z).mean(1, keepdims=True)
    z, shifted, count = z[:, :n], drawn - drawn[:, :1], np.arange(1, n + 1)
    left = -(np.cumsum(z, 1) - z) / (population - count + 1)
    both = np.cumsum(z * shifted, 1) - np.cumsum(z, 1) * np.cumsum(shifted, 1) / count
    # b, as the first 1, 2, ... examples have it; that for an example was learned from those before it.
    slope = (both + prior) / (np.cumsum(z * z, 1) + prior + _TINY)
    earlier = np.concatenate([np.ones((len(slope), 1)), slope[:, :-1]], 1)
    return drawn - earlier * (z - left), drawn.mean(1) - slope[:, -1] * z.mean(1)
