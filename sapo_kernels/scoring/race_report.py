"""RaceReport: what a race did to every prompt, and what it proves about the one it chose."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..files import DataError, excerpt

REASONS = ("winner", "worse", "within tolerance", "not finite")


@dataclass(frozen=True)
class RaceReport:
    """The outcome of `score_prompts` with a `Race`; differences are in nats per token, one entry a prompt.

    Attributes:
        winner: the prompt chosen; -1 if none had a finite loss.
        examples: how many examples each prompt was scored on.
        left: round, counted from 1, after which it was scored no more.
        reason: "winner"; "worse" (shown not to be the best, or to lose no less than the winner); "within tolerance"
            (shown to be at most the tolerance better than the winner, if better at all); "not finite".
        against: the prompt it was last compared with; itself for the winner and for "not finite".
        lower, upper: bounds on its loss minus the winner's over all examples, from the examples that both have; each
            holds for a given pair with probability ``1 - delta``, at all numbers of examples at once, if the condition
            that `Race` states holds for its differences. (0, 0) for the winner, NaN for "not finite".
        regret: with probability ``1 - delta`` the winner's loss is no more than this above the lowest there is.
        tolerance: differences up to this were left undecided.
        delta: as in `Race`.
        rounds: examples that the prompts still in had after each round.
        cells, total: cells scored, and K * M.
    """

    winner: int
    examples: list[int]
    left: list[int]
    reason: list[str]
    against: list[int]
    lower: list[float]
    upper: list[float]
    regret: float
    tolerance: float
    delta: float
    rounds: list[int]
    cells: int
    total: int

    @property
    def saved(self) -> float:
        """Share of the cells that were not scored."""
        return 1.0 - self.cells / self.total

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; non-finite numbers become strings ("nan", "inf", "-inf")."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: [_plain(x) for x in v] if isinstance(v, list) else _plain(v) for name, v in values.items()}

    @classmethod
    def from_dict(cls, data: Any, num_prompts: int) -> RaceReport:
        """The inverse of `to_dict` for K prompts; raises `DataError` naming the field that does not fit."""
        if not isinstance(data, dict):
            raise DataError(f"race: wanted an object, got {excerpt(data)}")
        prompts, last = range(num_prompts), len(_list(data, "rounds", _whole, None))
        return cls(
            winner=_one(data, "winner", lambda v: _whole(v, -1, num_prompts - 1)),
            examples=_list(data, "examples", _whole, num_prompts),
            left=_list(data, "left", lambda v: _whole(v, 1, last), num_prompts),
            reason=_list(data, "reason", lambda v: v if v in REASONS else None, num_prompts),
            against=_list(data, "against", lambda v: v if type(v) is int and v in prompts else None, num_prompts),
            lower=_list(data, "lower", read_nats, num_prompts),
            upper=_list(data, "upper", read_nats, num_prompts),
            regret=_one(data, "regret", read_nats),
            tolerance=_one(data, "tolerance", read_nats),
            delta=_one(data, "delta", read_nats),
            rounds=_list(data, "rounds", _whole, None),
            cells=_one(data, "cells", _whole),
            total=_one(data, "total", lambda v: _whole(v, 1)),
        )

    def __repr__(self) -> str:
        if self.winner < 0:
            return f"RaceReport(no winner, {self.cells} of {self.total} cells)"
        return (
            f"RaceReport(winner {self.winner}, at most {self.regret:.4f} nats per token above the best with "
            f"probability {1 - self.delta:.3g}; {self.cells} of {self.total} cells in {len(self.rounds)} rounds)"
        )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _whole(value: Any, low: int = 0, high: int = 2**63 - 1) -> int | None:
    return value if type(value) is int and low <= value <= high else None


def read_nats(value: Any) -> float | None:
    """A number or one of the strings that stand for the numbers JSON does not have; None for anything else."""
    if type(value) not in (int, float) and value not in ("nan", "inf", "-inf"):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _one(data: dict, name: str, read) -> Any:
    value = read(data.get(name))
    if value is None:
        raise DataError(f"race: {name}: wanted another value, got {excerpt(data.get(name))}")
    return value


def _list(data: dict, name: str, read, length: int | None) -> list:
    values = data.get(name)
    if not isinstance(values, list) or (length is not None and len(values) != length):
        raise DataError(f"race: {name}: wanted a list{f' of {length}' if length else ''}, got {excerpt(values)}")
    made = [read(value) for value in values]
    if None in made:
        at = made.index(None)
        raise DataError(f"race: {name}[{at}]: wanted another value, got {excerpt(values[at])}")
    return made
