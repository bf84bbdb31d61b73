"""Runs side by side: which may be compared, and paired intervals of their differences.

Two runs are a pair if they agree in method, order, tasks, data, model and seed. Runs that differ in nothing but the
seed are an arm; the differences of two arms are taken seed by seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sapo_kernels.files import DataError

from ..sequence.config import POLICIES
from ..sequence.schema import MEASURES, RunRecord
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
    """Arms that may be compared; record: what their runs have in common, from one of them."""

    record: RunRecord
    arms: list[Arm]

    @property
    def runs(self) -> list[Run]:
        return [run for arm in self.arms for run in arm.runs.values()]

    @property
    def measures(self) -> list[str]:
        """Those that any run has; the first is the headline."""
        return [name for name in MEASURES if any(run.matrix(name) for run in self.runs)]

    def arm_of(self, run: Run) -> Arm:
        return next(arm for arm in self.arms if arm.runs.get(run.record.seed) is run)

    def baseline(self, run: Run) -> Run | None:
        """What a run is shown beside: the run of the same seed with the original prompts, else of any other policy."""
        if run.record.policy == "original":
            return None
        others = sorted(self.arms, key=lambda arm: arm.policy != "original")
        found = (arm.runs.get(run.record.seed) for arm in others)
        return next((other for other in found if other and other is not run and other.results), None)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which they first occur, their arms by policy.

    Raises: `DataError` if two folders hold the same run, because it is open which of them counts.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        record = run.record
        key = [record.method, record.order, record.model, record.tasks, record.data]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    return [Group(found[0].record, _arms(found)) for found in groups.values()]


def _arms(runs: Sequence[Run]) -> list[Arm]:
    by_key: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        record = run.record
        by_seed = by_key.setdefault((record.policy, json.dumps(_settings(run))), {})
        other = by_seed.setdefault(record.seed, run)
        if other is not run:
            raise DataError(
                f"{run.path}: expected each run once, got policy {record.policy!r} with seed {record.seed} in "
                f"{other.path} too"
            )
    arms = []
    for (policy, key), by_seed in by_key.items():
        settings = json.loads(key)
        apart = differing(*(json.loads(other) for name, other in by_key if name == policy))
        told = ", ".join(f"{name}={settings.get(name, 'none')}" for name in apart)
        arms.append(Arm(policy, f"{policy} ({told})" if told else policy, settings, by_seed))
    return sorted(arms, key=lambda arm: (_rank(arm.policy), arm.label))


def _settings(run: Run) -> dict[str, str]:
    return {k: json.dumps(v, sort_keys=True) for k, v in sorted(run.record.config.items()) if k not in IDENTITY}


def _rank(policy: str) -> int:
    """SAPO first, then as `POLICIES` has them."""
    order = ("sapo", *POLICIES)
    return order.index(policy) if policy in order else len(order)


def in_order(runs: Sequence[Run]) -> list[Run]:
    """One seed of everything first: by seed, then method and order, then policy."""
    return sorted(
        runs, key=lambda run: (run.record.seed, run.record.method, run.record.order, _rank(run.record.policy))
    )


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
