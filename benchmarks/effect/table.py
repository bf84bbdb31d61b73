"""The tables of docs/effect.md, made from the committed rows and put between ``<!-- effect: NAME -->`` markers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError
from tools.tiny_base.corpus import known_wordings
from tools.tiny_base.presets import PRESETS

from .. import documents
from . import again, design, pretrained_table, rows
from .statistics import (
    Interval,
    bold,
    bootstrap_mean,
    correlations,
    differences,
    group_means,
    paired_difference,
    signed,
    student_mean,
)

Rows = list[dict[str, Any]]
MEASURES = ("AP", "BWT", "FWT")


def values(found: Rows, method: str, policy: str, metric: str, measure: str) -> dict[tuple[str, int], float]:
    """{(order, seed): value} of one measure; in percent, but for the loss."""
    scale = 1.0 if metric == "loss" else 100.0
    picked = [row for row in found if row["method"] == method and row["policy"] == policy]
    return {(row["order"], row["seed"]): scale * row[metric][measure] for row in picked}


def policies_table(found: Rows, metric: str) -> list[str]:
    """Means of every policy and, in brackets, the difference to the original prompt with its interval."""
    digits = 2 if metric == "loss" else 1
    lines = [
        f"| method, policy | {' | '.join(f'{name} (- original)' for name in MEASURES)} |",
        "|---|" + "---|" * len(MEASURES),
    ]
    for method in design.METHODS:
        for policy in (*design.POLICIES, design.AGAIN):
            cells = []
            for measure in MEASURES:
                mine = values(found, method, policy, metric, measure)
                base = values(found, method, "original", metric, measure)
                cell = f"{bootstrap_mean([mine[key] for key in sorted(mine)]).mean:.{digits}f}"
                if policy != "original":
                    cell += f" ({signed(paired_difference(mine, base), digits)})"
                cells.append(cell)
            lines.append(f"| {method}, {policy} | {' | '.join(cells)} |")
    return lines


def comparison_table(
    found: Rows,
    pairs: Sequence[tuple[str, str]],
    metrics: Sequence[str],
    interval: Callable[[dict, dict], Interval] = paired_difference,
) -> list[str]:
    """Differences of one policy to another with their intervals; those that leave 0 out are in bold."""
    lines = [f"| metric, method | difference | {' | '.join(MEASURES)} |", "|---|---|" + "---|" * len(MEASURES)]
    for metric in metrics:
        for method in design.METHODS:
            for first, other in pairs:
                found_here = [
                    interval(*(values(found, method, policy, metric, measure) for policy in (first, other)))
                    for measure in MEASURES
                ]
                cells = [bold(difference, 2 if metric == "loss" else 1) for difference in found_here]
                lines.append(f"| {LABELS[metric]}, {method} | {first} - {other} | {' | '.join(cells)} |")
    return lines


def by_seed(a: dict, b: dict) -> Interval:
    """Mean of the differences with the seeds as the unit: the orders of a seed are averaged first."""
    return student_mean(group_means(differences(a, b), 1))


LABELS = {"rougeL": "ROUGE-L", "exact_match": "exact match", "loss": "loss (nats; lower is better)"}


SIDES = (("forgetting", "forgetting"), ("others", "loss of the other tasks"), ("own", "own loss afterwards"))


def correlation_table(found: Rows) -> list[str]:
    """Spearman of a prompt's loss before learning with what learning with it does, by task and seed."""
    groups = rows.by_task_and_seed(found)
    known = known_wordings(PRESETS["default"].seed)
    unmet = {key: [row for row in group if row["prompt"] not in known[key[0]]] for key, group in groups.items()}
    names = " | ".join(f"rank correlation with {text}" for _, text in SIDES)
    lines = [f"| task | seed | prompts | loss before | forgetting | {names} |", "|---|---|---|---|---|---|---|---|"]
    columns = [correlations(groups, side) for side, _ in SIDES]
    for (task, seed), group in groups.items():
        spans = []
        for name in ("pre", "forgetting"):
            part = [row[name] for row in group]
            spans.append(f"{min(part):.2f} to {max(part):.2f}")
        cells = [f"{column[task, seed]:+.2f}" for column in columns]
        lines.append(f"| {short(task)} | {seed} | {len(group)} | {' | '.join(spans)} | {' | '.join(cells)} |")
    for what, which in (("all prompts", groups), ("wordings that the base had not met", unmet)):
        by_side = [correlations(which, side) for side, _ in SIDES]
        means = [bold(bootstrap_mean(list(column.values())), 2) for column in by_side]
        lines.append(f"| mean, {what} | | | | | {' | '.join(means)} |")
        if len({task for task, _ in which}) > 1:
            means = [bold(student_mean(group_means(column, 0)), 2) for column in by_side]
            lines.append(f"| the same, interval over tasks | | | | | {' | '.join(means)} |")
    return lines


def single_choice_table(found: Rows) -> list[str]:
    """What training on the prompt of the lowest loss did, less what the others did, nats per token."""
    groups = rows.by_task_and_seed(found)
    lines = [f"| lowest loss before learning, less | {' | '.join(text for _, text in SIDES)} |", "|---|---|---|---|"]
    rivals: tuple[tuple[str, Callable[[list[float]], float]], ...] = (
        ("the original prompt", lambda values: values[0]),
        ("the mean of the 20 paraphrases", lambda values: math.fsum(values[1:]) / len(values[1:])),
        ("the best prompt in hindsight", min),
    )
    for name, rival in rivals:
        cells = []
        for side, _ in SIDES:
            differences = []
            for group in groups.values():
                chosen = min(group, key=lambda row: (row["pre"], row["prompt"]))
                differences.append(chosen[side] - rival([row[side] for row in group]))
            cells.append(bold(bootstrap_mean(differences), 2))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def choices_table(found: Rows) -> list[str]:
    """Which prompts SAPO chose, whether the base knew them, and what looking cost."""
    known = known_wordings(PRESETS["default"].seed)
    lines = [
        "| task | prompts that `sapo` trained on (times) | known to the base | of them known |",
        "|---|---|---|---|",
    ]
    picked: dict[str, Counter] = {}
    for row in found:
        if row["policy"] == "sapo":
            for task, index in zip(design.ORDERS[row["order"]], row["prompts"], strict=True):
                picked.setdefault(task, Counter())[index] += 1
    for task, counts in sorted(picked.items()):
        total = sum(counts.values())
        share = sum(times for index, times in counts.items() if index in known[task]) / total
        shown = ", ".join(
            f"{index} ({times})" for index, times in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        )
        lines.append(f"| {short(task)} | {shown} | {', '.join(map(str, sorted(known[task])))} | {100 * share:.0f} % |")
    return lines


def cost_table(found: Rows) -> list[str]:
    """Seconds and tokens of scoring beside those of training."""
    lines = [
        "| policy | scoring / training, seconds | scoring / training, tokens computed | tokens without sharing |",
        "|---|---|---|---|",
    ]
    for policy in ("sapo", design.AGAIN):
        costs = [row["cost"] for row in found if row["policy"] == policy]
        total = {name: math.fsum(cost[name] for cost in costs) for name in costs[0]}
        seconds = total["score_seconds"] / total["train_seconds"]
        computed = total["score_computed_tokens"] / total["train_tokens"]
        dense = total["score_dense_tokens"] / total["train_tokens"]
        lines.append(f"| {policy} | {seconds:.2f} | {computed:.2f} | {dense:.2f} |")
    return lines


def short(task: str) -> str:
    """``task01_product_note_polarity`` -> ``product note polarity``."""
    return task.partition("_")[2].replace("_", " ")


def _sequences(make: Callable[[Rows], list[str]]) -> Callable[[Path], list[str]]:
    return lambda results: make(rows.load("sequences", results)["rows"])


TABLES: dict[str, Callable[[Path], list[str]]] = {
    "rouge": _sequences(lambda found: policies_table(found, "rougeL")),
    "exact": _sequences(lambda found: policies_table(found, "exact_match")),
    "loss": _sequences(lambda found: policies_table(found, "loss")),
    "against": _sequences(
        lambda found: comparison_table(
            found, [("sapo", other) for other in ("original", "random", "worst", "sample")], ("rougeL", "loss")
        )
    ),
    "short": _sequences(
        lambda found: comparison_table(found, [("sapo", "original"), ("sapo", "random")], ("rougeL", "loss"))
    ),
    "again": _sequences(
        lambda found: comparison_table(found, [(design.AGAIN, "sapo")], ("rougeL", "exact_match", "loss"))
    ),
    "why": lambda results: again.table(results),
    "seeds": _sequences(
        lambda found: comparison_table(
            found,
            [("sapo", "original"), ("sapo", "random"), (design.AGAIN, "sapo")],
            ("rougeL", "exact_match", "loss"),
            by_seed,
        )
    ),
    "choices": _sequences(choices_table),
    "cost": _sequences(cost_table),
    "correlation": lambda results: correlation_table(rows.load("single", results)["rows"]),
    "hindsight": lambda results: single_choice_table(rows.load("single", results)["rows"]),
    **pretrained_table.TABLES,
}


def made_table(name: str, results: Path = rows.RESULTS) -> list[str]:
    """The lines of a table."""
    if name not in TABLES:
        raise DataError(f"effect: expected a table ({', '.join(TABLES)}), got {name}")
    return TABLES[name](results)


def outdated(write: bool, results: Path = rows.RESULTS) -> list[str]:
    """The pages whose tables are not those of the rows; with `write` they are written."""
    return documents.outdated("effect", lambda name: made_table(name, results), write)
