"""Rank correlation and paired bootstrap intervals, on numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def ranks(values: Sequence[float]) -> np.ndarray:
    """[n] float64 ranks from 1; equal values share the mean of their places."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("values: wanted a list of finite numbers")
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[where]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; NaN where one side has a single value only."""
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"x, y: wanted two lists of one length of at least 2, got {len(x)} and {len(y)}")
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else float("nan")


def bootstrap_mean(values: Sequence[float], seed: int = 0, draws: int = DRAWS) -> Interval:
    """Percentile bootstrap of a mean: the values are drawn with replacement `draws` times.

    For a paired comparison the values are the differences of the pairs.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("values: wanted a list of finite numbers, at least one")
    picked = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[picked].mean(axis=1), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(a: dict, b: dict, seed: int = 0) -> Interval:
    """Bootstrap of mean(a - b) over the keys that both have; a key is a pair (order, seed) or the like."""
    keys = sorted(set(a) & set(b))
    if not keys:
        raise ValueError("a, b: wanted at least one common key, got none")
    return bootstrap_mean([a[key] - b[key] for key in keys], seed)
