"""Which prompt to train with: rules on what scoring has found before learning, a few lines each.

A rule gets the rows of one task and seed, the original first, and gives the row that it would have trained with. Rows
have the losses ``pre`` and ``pre_REDUCTION_ROWS``, ``pre_error_ROWS`` (standard error of the difference to the
original), ``pre_cold_8`` (under the model before it learned the earlier tasks) and ``near`` (the words shared with the
original).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Rule = Callable[[list[Row]], Row]
# Standard errors of a difference that count as evidence.
SURE = 2.0


def lowest(by: str) -> Rule:
    """The lowest loss; of equal ones the first."""
    return lambda group: min(group, key=lambda row: (row[by], row["prompt"]))


def never_without_evidence(group: list[Row]) -> Row:
    """The lowest loss where it is `SURE` below the original's, else the original."""
    best, original = lowest("pre_token_16")(group), group[0]
    gained = original["pre_token_16"] - best["pre_token_16"]
    return best if gained > SURE * best["pre_error_16"] else original


def near_the_original(group: list[Row]) -> Row:
    """Of the prompts within one standard error of the lowest loss, the one with most of the original's words."""
    best = lowest("pre_token_16")(group)
    tied = [row for row in group if row["pre_token_16"] <= best["pre_token_16"] + row["pre_error_16"]]
    return max(tied or [best], key=lambda row: (row["near"], -row["prompt"]))


def average_of_states(group: list[Row]) -> Row:
    """The lowest mean of the losses under the model as it is and as it was before the earlier tasks."""
    return min(group, key=lambda row: (row["pre_token_8"] + row["pre_cold_8"], row["prompt"]))


CANDIDATES: dict[str, Rule] = {
    "lowest loss (SAPO)": lowest("pre"),
    "lowest loss on 8 rows": lowest("pre_token_8"),
    "lowest example mean": lowest("pre_example_16"),
    "lowest batch mean": lowest("pre_batch_16"),
    "lowest before the earlier tasks": lowest("pre_cold_8"),
    "lowest mean of both states": average_of_states,
    "lowest if clear of the original": never_without_evidence,
    "nearest to the original among ties": near_the_original,
}
