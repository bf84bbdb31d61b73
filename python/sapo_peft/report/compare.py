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
from ..sequence.schema import MEASURES

LEVEL = 0.95
# SAPO first.
ORDER = {policy: rank for rank, policy in enumerate(sorted(POLICIES, key=lambda policy: policy != "sapo"))}


@dataclass(frozen=True)
class Arm:
    """Runs of one policy and one configuration, by seed; settings: that configuration but for these two, as JSON."""

    policy: str
    settings: dict[str, str]
    runs: dict[int, Run]

    def values(self, measure: str, metric: str) -> dict[int, float]:
        """By seed, of the runs that are finished."""
        found = {seed: run.figure(measure, metric) for seed, run in self.runs.items() if run.finished}
        return {seed: value for seed, value in found.items() if value is not None}

    def label(self, other: Arm) -> str:
        """The policy, and the settings that are not those of `other`."""
        names = sorted({*self.settings, *other.settings})
        apart = [name for name in names if self.settings.get(name) != other.settings.get(name)]
        told = ", ".join(f"{name}={self.settings.get(name, 'none')}" for name in apart)
        return f"{self.policy} ({told})" if told else self.policy


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


def arms_of(run: Run, runs: Sequence[Run]) -> list[Arm]:
    """Those among `runs` that may be compared with `run`, which is one of them, as arms: its own first.

    Raises: `DataError` if two folders hold the same run, because it is open which of them counts.
    """
    arms: dict[tuple[str, str], Arm] = {}
    for one in (one for one in runs if _shared(one) == _shared(run)):
        policy, seed = one.record.policy, one.record.seed
        settings = {name: json.dumps(value, sort_keys=True) for name, value in sorted(one.record.config.items())
                    if name not in ("policy", "seed")}  # fmt: skip
        arm = arms.setdefault((policy, json.dumps(settings)), Arm(policy, settings, {}))
        if (other := arm.runs.setdefault(seed, one)) is not one:
            raise DataError(f"{one.path}: expected each run once, got policy {policy!r} with seed {seed} in "
                            f"{other.path} too")  # fmt: skip
    seed = run.record.seed
    rank = lambda arm: (arm.runs.get(seed) is not run, ORDER.get(arm.policy, len(ORDER)), json.dumps(arm.settings))
    return sorted(arms.values(), key=rank)


def baseline(run: Run, arms: Sequence[Arm]) -> Run | None:
    """What a run is shown beside: the run of the same seed with the original prompts, else of any other policy."""
    if run.record.policy == "original":
        return None
    others = (arm.runs.get(run.record.seed) for arm in sorted(arms, key=lambda arm: arm.policy != "original"))
    return next((other for other in others if other and other is not run and other.tasks), None)


def in_order(runs: Sequence[Run]) -> list[Run]:
    """One seed of everything first: by seed, then method and order, then policy."""
    rank = lambda run: (run.seed, run.method, run.order, ORDER.get(run.policy, len(ORDER)))
    return sorted(runs, key=lambda run: rank(run.record))


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


def _shared(run: Run) -> tuple:
    """What runs that are compared have in common."""
    record = run.record
    return record.method, record.order, record.model, record.tasks, record.data
