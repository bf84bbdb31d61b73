"""Rank correlation and intervals of paired differences, by scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval; NaN where there is none."""

    mean: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        """``+0.012 [-0.003, +0.030]``, bold where the interval leaves zero out; the mean alone where there is none."""
        if math.isnan(self.low):
            return f"{self.mean:+.{digits}f}"
        text = f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"
        return f"**{text}**" if self.low > 0 or self.high < 0 else text


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, equal values sharing theirs."""
    return float(stats.spearmanr(x, y).statistic)


def student_mean(values: Sequence[float]) -> Interval:
    """A mean and its 95 % interval by Student's distribution; a single value has none."""
    if len(values) == 1:
        return Interval(float(values[0]), math.nan, math.nan)
    mean = float(np.mean(values))
    low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values) or 1e-300)
    return Interval(mean, float(low), float(high))


def group_means(values: dict, place: int) -> list[float]:
    """The mean of the values whose keys have the same entry at `place`, by that entry: one a seed, one a task."""
    groups: dict = {}
    for key in sorted(values):
        groups.setdefault(key[place], []).append(values[key])
    return [fmean(groups[name]) for name in sorted(groups)]
