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
from ..sequence.folder import Run
from ..sequence.schema import MEASURES, RunRecord

LEVEL = 0.95
# SAPO first.
ORDER = sorted(POLICIES, key=lambda policy: policy != "sapo")


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
        return [name for name in MEASURES if any(name in run.measures for run in self.runs)]

    def arm_of(self, run: Run) -> Arm:
        return next(arm for arm in self.arms if arm.runs.get(run.record.seed) is run)

    def baseline(self, run: Run) -> Run | None:
        """What a run is shown beside: the run of the same seed with the original prompts, else of any other policy."""
        if run.record.policy == "original":
            return None
        others = sorted(self.arms, key=lambda arm: arm.policy != "original")
        found = (arm.runs.get(run.record.seed) for arm in others)
        return next((other for other in found if other and other is not run and other.tasks), None)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which they first occur, their arms by policy.

    Raises: `DataError` if two folders hold the same run, because it is open which of them counts.
    """
    groups: dict[str, dict[tuple[str, str], dict[int, Run]]] = {}
    for run in runs:
        record = run.record
        key = json.dumps([record.method, record.order, record.model, record.tasks, sorted(record.data.items())])
        settings = {name: json.dumps(value, sort_keys=True) for name, value in sorted(record.config.items())}
        arm = json.dumps({name: value for name, value in settings.items() if name not in ("policy", "seed")})
        other = groups.setdefault(key, {}).setdefault((record.policy, arm), {}).setdefault(record.seed, run)
        if other is not run:
            raise DataError(
                f"{run.path}: expected each run once, got policy {record.policy!r} with seed {record.seed} in "
                f"{other.path} too"
            )
    return [Group(next(iter(next(iter(arms.values())).values())).record, _arms(arms)) for arms in groups.values()]


def _arms(found: dict[tuple[str, str], dict[int, Run]]) -> list[Arm]:
    arms = []
    for (policy, key), by_seed in found.items():
        settings = json.loads(key)
        apart = differing(*(json.loads(other) for name, other in found if name == policy))
        told = ", ".join(f"{name}={settings.get(name, 'none')}" for name in apart)
        arms.append(Arm(policy, f"{policy} ({told})" if told else policy, settings, by_seed))
    return sorted(arms, key=lambda arm: (_rank(arm.policy), arm.label))


def _rank(policy: str) -> int:
    return ORDER.index(policy) if policy in ORDER else len(ORDER)


def in_order(runs: Sequence[Run]) -> list[Run]:
    """One seed of everything first: by seed, then method and order, then policy."""
    records = lambda run: (run.record.seed, run.record.method, run.record.order, _rank(run.record.policy))
    return sorted(runs, key=records)


def differing(*settings: dict[str, str]) -> list[str]:
    """The settings that have not the same value everywhere."""
    return [key for key in sorted(set().union(*settings)) if len({one.get(key) for one in settings}) > 1]


def difference(arm: Arm, other: Arm, measure: str, metric: str) -> Difference | None:
    """Over the seeds that both have; None if they share none.

    Student's interval is honest for the few seeds that a comparison usually has; a percentile bootstrap is too narrow.
    """
    from scipy.stats import ttest_1samp

    ours, theirs = arm.values(measure, metric), other.values(measure, metric)
    values = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not values:
        return None
    mean, interval = sum(values) / len(values), None
    if len(values) > 1:
        equal = min(values) == max(values)
        interval = (mean, mean) if equal else tuple(map(float, ttest_1samp(values, 0).confidence_interval(LEVEL)))
    return Difference(values, mean, interval, MEASURES[measure].lower_is_better)
