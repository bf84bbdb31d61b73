"""The tables of docs/effect.md, made from the committed rows and put between ``<!-- effect: NAME -->`` markers.

Those of sequences are here, those of single-task runs in single_table.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from sapo_kernels.files import DataError

from .. import documents
from . import rows, single_table
from .statistics import Interval, bold, differences, group_means, student_mean

Rows = list[dict[str, Any]]
MEASURES = ("AP", "BWT", "FWT")
LABELS = {"rougeL": "ROUGE-L", "exact_match": "exact match", "loss": "loss (nats; lower is better)"}
# On the tiny base; sapo-again scores again inside a task.
METHODS = ("lora-inc", "o-lora")
PAIRS = (("sapo", "original"), ("sapo", "random"), ("sapo", "worst"), ("sapo", "sample"), ("sapo-again", "sapo"))


def values(found: Rows, method: str, policy: str, metric: str, measure: str) -> dict[tuple[str, int], float]:
    """{(order, seed): value} of one measure; in percent, but for the loss."""
    scale = 1.0 if metric == "loss" else 100.0
    picked = [row for row in found if row["method"] == method and row["policy"] == policy]
    return {(row["order"], row["seed"]): scale * row[metric][measure] for row in picked}


def comparison_table(found: Rows) -> list[str]:
    """Differences of one policy to another; the interval is over seeds, the orders of a seed averaged first."""
    lines = [f"| metric, method | difference | {' | '.join(MEASURES)} |", "|---|---|" + "---|" * len(MEASURES)]
    for metric, label in LABELS.items():
        for method in METHODS:
            for pair in PAIRS:
                cells = [
                    bold(
                        by_seed(*(values(found, method, policy, metric, measure) for policy in pair)),
                        2 if metric == "loss" else 1,
                    )
                    for measure in MEASURES
                ]
                lines.append(f"| {label}, {method} | {' - '.join(pair)} | {' | '.join(cells)} |")
    return lines


def by_seed(a: dict, b: dict) -> Interval:
    """Mean of the differences with the seeds as the unit: the orders of a seed are averaged first."""
    means = group_means(differences(a, b), 1)
    return student_mean(means) if len(means) > 1 else Interval(means[0], math.nan, math.nan)


def sequences_table(found: Rows) -> list[str]:
    """Sequences under each policy: means over seeds and, in brackets, how much more than with the original."""
    columns = [(measure, metric) for metric in ("loss", "rougeL") for measure in MEASURES]
    lines = [
        f"| method, policy | seeds | {' | '.join(f'{measure}, {LABELS[metric]}' for measure, metric in columns)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for method, policy in dict.fromkeys((row["method"], row["policy"]) for row in found):
        cells = []
        for measure, metric in columns:
            mine, original = (values(found, method, name, metric, measure) for name in (policy, "original"))
            digits = 3 if metric == "loss" else 1
            cells.append(f"{fmean(mine.values()):.{digits}f}")
            if policy != "original" and mine.keys() & original.keys():
                cells[-1] += f" ({bold(by_seed(mine, original), digits)})"
        lines.append(f"| {method}, {policy} | {len(mine)} | {' | '.join(cells)} |")
    return lines


TABLES: dict[str, Callable[[Path], list[str]]] = {
    **single_table.TABLES,
    "smollm2 sequences": lambda results: sequences_table(rows.load("sequences_smollm2", results)["rows"]),
    "tiny sequences": lambda results: comparison_table(rows.load("sequences", results)["rows"]),
}


def made_table(name: str, results: Path = rows.RESULTS) -> list[str]:
    """The lines of a table."""
    if name not in TABLES:
        raise DataError(f"effect: expected a table ({', '.join(TABLES)}), got {name}")
    return TABLES[name](results)


def outdated(write: bool, results: Path = rows.RESULTS) -> list[str]:
    """The pages whose tables are not those of the rows; with `write` they are written."""
    return documents.outdated("effect", lambda name: made_table(name, results), write)
