"""Tables of the runs on pretrained models; a (task, seed) counts once all of its prompts have been run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from sapo_kernels import PromptScores

from ..racing import Matrix, read_matrices
from . import pretrained_design as design
from . import rows
from .policies import CANDIDATES
from .statistics import Interval, bold, correlations, differences, group_means, spearman, student_mean

Rows = list[dict[str, Any]]
Groups = dict[tuple[str, int], Rows]
SIDES = (("forgetting", "forgetting"), ("others", "loss of tasks not learned yet"), ("own", "own loss afterwards"))
RIVALS: dict[str, Callable[[list[float]], float]] = {
    "the original": lambda values: values[0],
    "a random paraphrase": lambda values: fmean(values[1:]),
}
ORDERS = 50


def complete(found: Rows) -> Groups:
    """{(task, seed): its rows by prompt} of those that are there in full."""
    groups = rows.by_task_and_seed(found)
    return {key: group for key, group in groups.items() if [r["prompt"] for r in group] == design.prompts_of(key[0])}


def of_tasks(values: dict[tuple[str, int], float]) -> Interval:
    """The mean with the task as the unit: seeds of a task are averaged first; no interval of a single task."""
    means = group_means(values, 0)
    return student_mean(means) if len(means) > 1 else Interval(means[0], math.nan, math.nan)


def differ_table(groups: Groups) -> list[str]:
    """How far the prompts of a task are apart in what they do."""
    lines = ["| task | seed | loss before | own loss afterwards | forgetting | loss of tasks not learned yet |"]
    lines.append("|---|---|---|---|---|---|")
    for (task, seed), group in groups.items():
        spans = [_span([row[name] for row in group]) for name in ("pre", "own", "forgetting", "others")]
        lines.append(f"| {task.partition('_')[0]} | {seed} | {' | '.join(spans)} |")
    return lines


def by_task_table(groups: Groups) -> list[str]:
    """Forgetting by task, the seeds averaged, and how far the two seeds rank the prompts alike."""
    kinds: dict[str, Callable[[Rows], float]] = {
        "lowest loss (SAPO)": lambda group: CANDIDATES["lowest loss (SAPO)"](group)["forgetting"],
        "the original": lambda group: group[0]["forgetting"],
        "mean of the paraphrases": lambda group: fmean(row["forgetting"] for row in group[1:]),
        "best": lambda group: min(row["forgetting"] for row in group),
        "worst": lambda group: max(row["forgetting"] for row in group),
    }
    lines = [
        f"| forgetting, task | {' | '.join(kinds)} | rank correlation of the seeds |",
        "|---|" + "---|" * (len(kinds) + 1),
    ]
    for task in dict.fromkeys(task for task, _ in groups):
        own = [group for (name, _), group in groups.items() if name == task]
        cells = [f"{fmean(map(kind, own)):+.3f}" for kind in kinds.values()]
        pairs = [spearman(*([row["forgetting"] for row in group] for group in pair)) for pair in combinations(own, 2)]
        cells.append(f"{fmean(pairs):+.2f}" if pairs else "")
        lines.append(f"| {task.partition('_')[0]} | {' | '.join(cells)} |")
    return lines


def _span(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def correlation_table(groups: Groups) -> list[str]:
    """Spearman of a prompt's loss before learning with what learning with it does."""
    lines = [f"| task | seed | {' | '.join(text for _, text in SIDES)} |", "|---|---|---|---|---|"]
    columns = [correlations(groups, side) for side, _ in SIDES]
    for key in groups:
        shown = " | ".join(f"{column[key]:+.2f}" for column in columns)
        lines.append(f"| {key[0].partition('_')[0]} | {key[1]} | {shown} |")
    lines.append(f"| mean over tasks | | {' | '.join(bold(of_tasks(column), 2) for column in columns)} |")
    return lines


def gain(groups: Groups, rule: Callable[[Rows], dict], side: str, rival: Callable[[list[float]], float]) -> Interval:
    """What the rule's prompt does less what the rival's does, nats per token."""
    return of_tasks({key: rule(group)[side] - rival([r[side] for r in group]) for key, group in groups.items()})


def choice_table(groups: Groups) -> list[str]:
    """The prompt of the lowest loss, and the best and worst in hindsight, against the original and a random one."""
    names: dict[str, Callable[[str], Callable[[Rows], dict]]] = {
        "lowest loss (SAPO)": lambda side: CANDIDATES["lowest loss (SAPO)"],
        "best in hindsight": lambda side: lambda group: min(group, key=lambda row: row[side]),
        "highest loss": lambda side: lambda group: max(group, key=lambda row: row["pre"]),
    }
    lines = [f"| prompt | less | {' | '.join(text for _, text in SIDES)} |", "|---|---|---|---|---|"]
    for name, rule in names.items():
        for rival, value in RIVALS.items():
            cells = [bold(gain(groups, rule(side), side, value), 3) for side, _ in SIDES]
            lines.append(f"| {name} | {rival} | {' | '.join(cells)} |")
    return lines


def halves(groups: Groups) -> tuple[Groups, Groups]:
    """The tasks that a policy is chosen on, and those it is shown on."""
    chosen = {key: group for key, group in groups.items() if key[0] in design.CHOOSING}
    return chosen, {key: group for key, group in groups.items() if key not in chosen}


def policy_table(groups: Groups) -> list[str]:
    """Forgetting under every candidate less that under the original and a random paraphrase, on either half."""
    parts = halves(groups)
    if not all(parts):
        return ["Not enough tasks have been run."]
    heads = [f"{half}, less {rival}" for half in ("chosen on", "shown on") for rival in RIVALS]
    lines = [f"| forgetting with | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    taken = min(
        CANDIDATES, key=lambda name: gain(parts[0], CANDIDATES[name], "forgetting", RIVALS["the original"]).mean
    )
    for name, rule in CANDIDATES.items():
        cells = [bold(gain(part, rule, "forgetting", rival), 3) for part in parts for rival in RIVALS.values()]
        lines.append(f"| {name}{' (taken)' if name == taken else ''} | {' | '.join(cells)} |")
    return lines


def rests_table(matrices: list[Matrix]) -> list[str]:
    """How often the choice by fewer rows or another mean is that of the token mean of all rows, and what it costs."""
    lines = [
        "| mean over | rows | the same prompt | regret, mean over matrices | largest mean of a matrix |",
        "|---|---|---|---|---|",
    ]
    for kind in ("token", "example", "batch"):
        for count in (16, 64, None):
            found = [_agreement(one, kind, count) for one in matrices]
            same, regret = (np.asarray(column) for column in zip(*found, strict=True))
            lines.append(
                f"| {kind} | {count or 'all (110 to 250)'} | {100 * same.mean():.0f} % | {100 * regret.mean():.2f} % | "
                f"{100 * regret.max():.1f} % |"
            )
    return lines


def _agreement(one: Matrix, kind: str, count: int | None) -> tuple[float, float]:
    """(share of the draws with the same choice, mean regret as a share of the lowest loss)."""
    full, loss = one.scores, one.scores.loss.numpy()
    chosen = []
    for draw in range(1 if count is None else ORDERS):
        order = list(range(full.nll.shape[1]))
        if count is not None:
            random.Random(f"{one.task}/{draw}").shuffle(order)
        picked = order[:count]
        part = PromptScores(full.nll[:, picked], full.tokens[:, picked], full.prompts)
        chosen.append(int(part.reduce(kind).argmin()))
    regret = loss[chosen] / loss.min() - 1
    return float(np.mean(np.asarray(chosen) == loss.argmin())), float(regret.mean())


def sequences_table(found: Rows) -> list[str]:
    """Sequences under each policy: means over seeds and, in brackets, how much more than with the original."""
    columns = (("loss", "AP"), ("loss", "BWT"), ("rougeL", "AP"), ("rougeL", "BWT"))
    lines = [
        f"| method, policy | seeds | {' | '.join(f'{measure}, {metric}' for metric, measure in columns)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for method, policy in dict.fromkeys((row["method"], row["policy"]) for row in found):
        cells = []
        for metric, measure in columns:
            mine, original = (
                {
                    (row["seed"],): row[metric][measure]
                    for row in found
                    if (row["method"], row["policy"]) == (method, name)
                }
                for name in (policy, "original")
            )
            cells.append(f"{fmean(mine.values()):.3f}")
            if policy != "original" and mine.keys() & original.keys():
                more = list(differences(mine, original).values())
                interval = student_mean(more) if len(more) > 1 else Interval(more[0], math.nan, math.nan)
                cells[-1] += f" ({bold(interval, 3)})"
        lines.append(f"| {method}, {policy} | {len(mine)} | {' | '.join(cells)} |")
    return lines


def _single(make: Callable[[Groups], list[str]], base: str = "smollm2") -> Callable[[Path], list[str]]:
    return lambda results: make(complete(rows.load(f"single_{base}", results)["rows"]))


TABLES: dict[str, Callable[[Path], list[str]]] = {
    "pretrained differ": _single(differ_table),
    "pretrained tasks": _single(by_task_table),
    "pretrained correlation": _single(correlation_table),
    "pretrained choice": _single(choice_table),
    "pretrained policies": _single(policy_table),
    "pretrained sequences": lambda results: sequences_table(rows.load("sequences_smollm2", results)["rows"]),
    "pretrained rests": lambda _: rests_table([one for one in read_matrices() if one.set.startswith("smollm2")]),
}
