"""Runs side by side: which may be compared, and paired bootstrap intervals of their differences.

Two runs are a pair if they agree in method, order, tasks, data, model and seed. Runs that differ in nothing but the
seed are an arm; the differences of two arms are taken seed by seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sapo_kernels.files import DataError

from .measures import MEASURES
from .run_data import Run

POLICIES = ("sapo", "original", "random", "worst", "sample")
RESAMPLES = 10_000
LEVEL = 0.95
# Percentile intervals of fewer pairs are too narrow: of five normal differences they hold the mean in 86 % of all
# cases, of ten in 91 %, instead of 95 %.
FEW = 10
# Settings that are no difference between arms.
IDENTITY = frozenset({"policy", "seed"})


@dataclass(frozen=True)
class Arm:
    """Runs of one policy and one configuration, by seed. label: the policy, and what tells it from a namesake."""

    policy: str
    label: str
    config: dict[str, str]
    runs: dict[int, Run]

    def values(self, score: str, metric: str) -> dict[int, float]:
        """By seed, of the runs that are done."""
        found = {seed: run.figure(score, metric) for seed, run in self.runs.items() if run.status == "done"}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Difference:
    """A metric of `arm` minus that of `other`: values by pair, mean, and (low, high) or None for fewer than two."""

    values: list[float]
    mean: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """ "higher", "lower", or "open" where the interval has 0 inside or there is none."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "open"
        return "higher" if self.mean > 0 else "lower"


@dataclass(frozen=True)
class Group:
    """Arms that may be compared."""

    method: str
    order: str
    tasks: list[str]
    arms: list[Arm]

    @property
    def measures(self) -> list[str]:
        """Those of `MEASURES` that any run of the group has; the first is the headline."""
        return [name for name in MEASURES if any(name in r.scores for arm in self.arms for r in arm.runs.values())]

    def arm_of(self, run: Run) -> Arm:
        return next(arm for arm in self.arms if arm.runs.get(run.seed) is run)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which they first occur, their arms by policy.

    Raises: `DataError` if two folders hold the same run, because it is open which of them counts.
    """
    groups: dict[tuple, dict[tuple, list[Run]]] = {}
    for run in runs:
        arms = groups.setdefault((run.method, run.order, run.model, _canonical([run.tasks, run.data])), {})
        arms.setdefault((run.policy, _canonical(_settings(run))), []).append(run)
    found = []
    for (method, order, *_), runs_by_arm in groups.items():
        tasks = next(iter(runs_by_arm.values()))[0].tasks
        found.append(Group(method, order, tasks, _arms(runs_by_arm)))
    return found


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _settings(run: Run) -> dict[str, str]:
    return {key: _canonical(run.config[key]) for key in sorted(run.config) if key not in IDENTITY}


def _arms(runs_by_key: dict[tuple, list[Run]]) -> list[Arm]:
    arms = []
    for (policy, _), runs in runs_by_key.items():
        by_seed: dict[int, Run] = {}
        for run in runs:
            if run.seed in by_seed:
                raise DataError(
                    f"{run.path}: wanted each run once, got policy {policy!r} with seed {run.seed} "
                    f"in {by_seed[run.seed].path} too"
                )
            by_seed[run.seed] = run
        namesakes = [_settings(others[0]) for (name, _), others in runs_by_key.items() if name == policy]
        config = _settings(runs[0])
        apart = [f"{key}={config.get(key, 'none')}" for key in differing(*namesakes)]
        arms.append(Arm(policy, f"{policy} ({', '.join(apart)})" if apart else policy, config, by_seed))
    return sorted(arms, key=lambda arm: (_rank(arm.policy), arm.policy))


def _rank(policy: str) -> int:
    return POLICIES.index(policy) if policy in POLICIES else len(POLICIES)


def differing(*configs: dict[str, str]) -> list[str]:
    """The settings that have not the same value everywhere."""
    keys = sorted(set().union(*configs))
    return [key for key in keys if len({config.get(key) for config in configs}) > 1]


def difference(arm: Arm, other: Arm, score: str, metric: str) -> Difference | None:
    """Over the seeds that both have; None if they share none."""
    ours, theirs = arm.values(score, metric), other.values(score, metric)
    values = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return Difference(values, sum(values) / len(values), paired_interval(values)) if values else None


def paired_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of paired differences; None for fewer than two.

    Equals: resample the pairs with replacement `RESAMPLES` times, take each mean, cut off (1 - level) / 2 at either
    end. The draws come from a fixed seed, so the same differences give the same interval.
    """
    if len(differences) < 2:
        return None
    values = np.asarray(differences, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def order_for_detail(runs: Sequence[Run]) -> list[Run]:
    """One seed of everything first: by seed, then method and order, then policy."""
    return sorted(runs, key=lambda run: (run.seed, run.method, run.order, _rank(run.policy)))
