"""RaceReport: how far every prompt came in a race."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..files import DataError, excerpt

REASONS = ("winner", "worse", "within tolerance", "not finite")
_MOST = 2**63 - 1


@dataclass(frozen=True)
class RaceReport:
    """The outcome of `score_prompts` with a `Race`; lists have one entry a prompt.

    Attributes:
        winner: the prompt chosen; -1 if none had a finite loss.
        examples: how many examples each prompt was scored on.
        left: round, counted from 1, after which it was scored no more.
        reason: "winner"; "worse" (its loss was above the leader's by more than chance explains, or after all examples);
            "within tolerance" (it may be better than the leader, by no more than the tolerance); "not finite".
        rounds: examples that the prompts still in had after each round.
        cells, total: cells scored, and K * M.
    """

    winner: int
    examples: list[int]
    left: list[int]
    reason: list[str]
    rounds: list[int]
    cells: int
    total: int

    @property
    def saved(self) -> float:
        """Share of the cells that were not scored."""
        return 1.0 - self.cells / self.total

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, num_prompts: int) -> RaceReport:
        """The inverse of `to_dict` for K prompts; raises `DataError` naming the field that does not fit.

        Fields that reports of earlier versions had are left out.
        """
        if not isinstance(data, dict):
            raise DataError(f"race: expected an object, got {excerpt(data)}")
        rounds = _numbers(data, "rounds", None, 1, _MOST)
        reason = data.get("reason")
        if not isinstance(reason, list) or len(reason) != num_prompts or any(one not in REASONS for one in reason):
            raise DataError(f"race: reason: expected {num_prompts} of {REASONS}, got {excerpt(reason)}")
        return cls(
            winner=_number(data, "winner", -1, num_prompts - 1),
            examples=_numbers(data, "examples", num_prompts, 0, _MOST),
            left=_numbers(data, "left", num_prompts, 1, len(rounds)),
            reason=reason,
            rounds=rounds,
            cells=_number(data, "cells", 0, _MOST),
            total=_number(data, "total", 1, _MOST),
        )

    def __repr__(self) -> str:
        winner = f"winner {self.winner}" if self.winner >= 0 else "no winner"
        return f"RaceReport({winner}, {self.cells} of {self.total} cells in {len(self.rounds)} rounds)"


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _number(data: dict, name: str, low: int, high: int) -> int:
    if not _whole(value := data.get(name), low, high):
        raise DataError(f"race: {name}: expected a whole number from {low} to {high}, got {excerpt(value)}")
    return value


def _numbers(data: dict, name: str, length: int | None, low: int, high: int) -> list[int]:
    values = data.get(name)
    if not isinstance(values, list) or len(values) != (len(values) if length is None else length):
        raise DataError(f"race: {name}: expected a list of {length or 'numbers'}, got {excerpt(values)}")
    for i, value in enumerate(values):
        if not _whole(value, low, high):
            raise DataError(f"race: {name}[{i}]: expected a whole number from {low} to {high}, got {excerpt(value)}")
    return values
