"""Runs side by side: which may be compared, and paired intervals of their differences.

Two runs are a pair if they agree in method, order, tasks, data, model and seed. Runs that differ in nothing but the
seed are an arm; the differences of two arms are taken seed by seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sapo_kernels.files import DataError

from ..sequence.config import POLICIES
from ..sequence.schema import MEASURES
from .runs import Run

LEVEL = 0.95
# Settings that are no difference between arms.
IDENTITY = ("policy", "seed")


@dataclass(frozen=True)
class Arm:
    """Runs of one policy and one configuration, by seed. label: the policy, and what tells it from a namesake."""

    policy: str
    label: str
    settings: dict[str, str]
    runs: dict[int, Run]

    def values(self, measure: str, metric: str) -> dict[int, float]:
        """By seed, of the runs that are finished."""
        found = {seed: run.figure(measure, metric) for seed, run in self.runs.items() if run.finished}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Difference:
    """A metric of one arm minus that of another: by pair, mean, and (low, high) or None for a single pair."""

    values: list[float]
    mean: float
    interval: tuple[float, float] | None
    lower_is_better: bool

    @property
    def verdict(self) -> str:
        """ "better", "worse", "open" where the interval has 0 inside, or "single" where there is none."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "open" if self.interval else "single"
        return "better" if (self.mean > 0) != self.lower_is_better else "worse"


@dataclass(frozen=True)
class Group:
    """Arms that may be compared."""

    method: str
    order: str
    tasks: list[str]
    arms: list[Arm]

    @property
    def measures(self) -> list[str]:
        """Those that any run has; the first is the headline."""
        return [name for name in MEASURES if any(run.matrix(name) for run in self.runs)]

    @property
    def runs(self) -> list[Run]:
        return [run for arm in self.arms for run in arm.runs.values()]

    def arm_of(self, run: Run) -> Arm:
        return next(arm for arm in self.arms if arm.runs.get(run.record.seed) is run)

    def baseline(self, run: Run) -> Run | None:
        """The run that another one is shown beside: the same seed with the original prompts, else any other policy."""
        own = self.arm_of(run)
        order = sorted(self.arms, key=lambda arm: (arm.policy != "original", _rank(arm.policy)))
        others = (arm.runs.get(run.record.seed) for arm in order if arm is not own and own.policy != "original")
        return next((other for other in others if other and other.results), None)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which they first occur, their arms by policy.

    Raises: `DataError` if two folders hold the same run, because it is open which of them counts.
    """
    groups: dict[tuple, dict[tuple, list[Run]]] = {}
    for run in runs:
        record = run.record
        arms = groups.setdefault((record.method, record.order, record.model, _plain([record.tasks, record.data])), {})
        arms.setdefault((record.policy, _plain(_settings(run))), []).append(run)
    return [
        Group(method, order, next(iter(arms.values()))[0].record.tasks, _arms(arms))
        for (method, order, *_), arms in groups.items()
    ]


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _settings(run: Run) -> dict[str, str]:
    return {key: _plain(value) for key, value in sorted(run.record.config.items()) if key not in IDENTITY}


def _arms(runs_by_key: dict[tuple, list[Run]]) -> list[Arm]:
    arms = []
    for (policy, _), runs in runs_by_key.items():
        by_seed: dict[int, Run] = {}
        for run in runs:
            seed = run.record.seed
            if seed in by_seed:
                raise DataError(
                    f"{run.path}: expected each run once, got policy {policy!r} with seed {seed} in "
                    f"{by_seed[seed].path} too"
                )
            by_seed[seed] = run
        namesakes = [_settings(others[0]) for (name, _), others in runs_by_key.items() if name == policy]
        settings = _settings(runs[0])
        apart = [f"{key}={settings.get(key, 'none')}" for key in differing(*namesakes)]
        arms.append(Arm(policy, f"{policy} ({', '.join(apart)})" if apart else policy, settings, by_seed))
    return sorted(arms, key=lambda arm: (_rank(arm.policy), arm.label))


def _rank(policy: str) -> int:
    """SAPO first, then as `POLICIES` has them."""
    order = ("sapo", *POLICIES)
    return order.index(policy) if policy in order else len(order)


def differing(*settings: dict[str, str]) -> list[str]:
    """The settings that have not the same value everywhere."""
    return [key for key in sorted(set().union(*settings)) if len({one.get(key) for one in settings}) > 1]


def difference(arm: Arm, other: Arm, measure: str, metric: str) -> Difference | None:
    """Over the seeds that both have; None if they share none."""
    ours, theirs = arm.values(measure, metric), other.values(measure, metric)
    values = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not values:
        return None
    return Difference(values, sum(values) / len(values), student_interval(values), MEASURES[measure].lower_is_better)


def student_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Student's interval of the mean of paired differences; None for fewer than two.

    Honest for the few seeds that a comparison usually has, where a percentile bootstrap is too narrow.
    """
    from scipy import stats

    if len(values) < 2:
        return None
    mean, error = sum(values) / len(values), float(stats.sem(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def order_for_detail(runs: Sequence[Run]) -> list[Run]:
    """One seed of everything first: by seed, then method and order, then policy."""
    return sorted(
        runs, key=lambda run: (run.record.seed, run.record.method, run.record.order, _rank(run.record.policy))
    )
