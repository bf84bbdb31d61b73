"""Rank correlation and intervals of paired differences, by scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, equal values sharing theirs; NaN where one side has a single value only."""
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"x, y: expected two lists of one length of at least 2, got {len(x)} and {len(y)}")
    x, y = _checked(x), _checked(y)
    return float(stats.spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else float("nan")


def student_mean(values: Sequence[float]) -> Interval:
    """A mean of at least 2 values and its 95 % interval by Student's distribution."""
    values = _checked(values)
    if len(values) < 2:
        raise ValueError(f"values: expected at least 2, got {len(values)}")
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values) or 1e-300)
    return Interval(float(values.mean()), float(low), float(high))


def _checked(values: Sequence[float]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("values: expected a list of finite numbers, at least one")
    return values


def differences(a: dict, b: dict) -> dict:
    """a - b for each key that both have; a key is a pair (order, seed) or the like."""
    keys = sorted(set(a) & set(b))
    if not keys:
        raise ValueError("a, b: expected at least one common key, got none")
    return {key: a[key] - b[key] for key in keys}


def group_means(values: dict, place: int) -> list[float]:
    """The mean of the values whose keys have the same entry at `place`, by that entry: one a seed, one a task."""
    groups: dict = {}
    for key in sorted(values):
        groups.setdefault(key[place], []).append(values[key])
    return [math.fsum(groups[name]) / len(groups[name]) for name in sorted(groups)]


def correlations(groups: dict[tuple[str, int], list[dict]], side: str) -> dict[tuple[str, int], float]:
    """Spearman of the loss before learning with one thing afterwards, a value a group."""
    return {key: spearman([row["pre"] for row in group], [row[side] for row in group]) for key, group in groups.items()}


def signed(interval: Interval, digits: int) -> str:
    """``+0.012 [-0.003, +0.030]``; the mean alone where there is no interval."""
    if math.isnan(interval.low):
        return f"{interval.mean:+.{digits}f}"
    return f"{interval.mean:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def bold(interval: Interval, digits: int) -> str:
    """The same, bold where the interval leaves zero out."""
    text = signed(interval, digits)
    return f"**{text}**" if interval.low > 0 or interval.high < 0 else text
