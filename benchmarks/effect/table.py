"""The tables of docs/effect.md, made from the committed rows and put between ``<!-- effect: NAME -->`` markers.

A (task, seed) of single-task runs counts once all of its prompts have been run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from sapo_kernels import PromptScores
from sapo_kernels.files import DataError
from tools.tiny_base.corpus import known_wordings
from tools.tiny_base.presets import PRESETS

from .. import documents
from ..racing import Matrix, read_matrices
from . import pretrained_design as design
from . import rows
from .policies import CANDIDATES
from .statistics import Interval, group_means, spearman, student_mean

Rows = list[dict[str, Any]]
Groups = dict[tuple[str, int], Rows]
Rival = Callable[[list[float]], float]
table = partial(documents.table, align="---")
SAPO = CANDIDATES["lowest loss (SAPO)"]
SIDES = {"forgetting": "forgetting", "others": "loss of tasks not learned yet", "own": "own loss afterwards"}
RIVALS: dict[str, Rival] = {
    "the original": lambda values: values[0],
    "a random paraphrase": lambda values: fmean(values[1:]),
}
ORDERS = 50


def by_task_and_seed(found: Rows) -> Groups:
    """Rows of single-task runs in groups, by prompt."""
    groups: Groups = {}
    for row in sorted(found, key=lambda row: (row["task"], row["seed"], row["prompt"])):
        groups.setdefault((row["task"], row["seed"]), []).append(row)
    return groups


def complete(found: Rows) -> Groups:
    """Those that are there in full."""
    groups = by_task_and_seed(found)
    return {key: group for key, group in groups.items() if [r["prompt"] for r in group] == design.prompts_of(key[0])}


def short(task: str) -> str:
    return task.partition("_")[0]


def of_tasks(values: dict[tuple[str, int], float]) -> Interval:
    """The mean with the task as the unit: seeds of a task are averaged first."""
    return student_mean(group_means(values, 0))


def differ_table(groups: Groups) -> list[str]:
    """How far the prompts of a task are apart in what they do."""
    body = []
    for (task, seed), group in groups.items():
        columns = [[row[name] for row in group] for name in ("pre", "own", "forgetting", "others")]
        body.append([short(task), str(seed), *(f"{min(one):.2f} to {max(one):.2f}" for one in columns)])
    return table(["task", "seed", "loss before", *(SIDES[name] for name in ("own", "forgetting", "others"))], body)


def by_task_table(groups: Groups) -> list[str]:
    """Forgetting by task, the seeds averaged, and how far the two seeds rank the prompts alike."""
    kinds: dict[str, Callable[[Rows], float]] = {
        "lowest loss (SAPO)": lambda group: SAPO(group)["forgetting"],
        "the original": lambda group: group[0]["forgetting"],
        "mean of the paraphrases": lambda group: fmean(row["forgetting"] for row in group[1:]),
        "best": lambda group: min(row["forgetting"] for row in group),
        "worst": lambda group: max(row["forgetting"] for row in group),
    }
    body = []
    for task in dict.fromkeys(task for task, _ in groups):
        own = [group for (name, _), group in groups.items() if name == task]
        pairs = [spearman(*([row["forgetting"] for row in group] for group in pair)) for pair in combinations(own, 2)]
        cells = [f"{fmean(map(kind, own)):+.3f}" for kind in kinds.values()]
        body.append([short(task), *cells, f"{fmean(pairs):+.2f}" if pairs else ""])
    return table(["forgetting, task", *kinds, "rank correlation of the seeds"], body)


def correlations(groups: Groups, side: str) -> dict[tuple[str, int], float]:
    """Spearman of the loss before learning with one thing afterwards, a value a group."""
    return {key: spearman([row["pre"] for row in group], [row[side] for row in group]) for key, group in groups.items()}


def correlation_table(groups: Groups) -> list[str]:
    """Spearman of a prompt's loss before learning with what learning with it does."""
    columns = [correlations(groups, side) for side in SIDES]
    body = [[short(key[0]), str(key[1]), *(f"{column[key]:+.2f}" for column in columns)] for key in groups]
    means = " | ".join(of_tasks(column).text(2) for column in columns)
    return [*table(["task", "seed", *SIDES.values()], body), f"| mean over tasks | | {means} |"]


def gain(groups: Groups, rule: Callable[[Rows], dict], side: str, rival: Rival) -> Interval:
    """What the rule's prompt does less what the rival's does, nats per token."""
    return of_tasks({key: rule(group)[side] - rival([r[side] for r in group]) for key, group in groups.items()})


def choice_table(groups: Groups) -> list[str]:
    """The prompt of the lowest loss, and the best and worst in hindsight, against the original and a random one."""
    names: dict[str, Callable[[str], Callable[[Rows], dict]]] = {
        "lowest loss (SAPO)": lambda side: SAPO,
        "best in hindsight": lambda side: lambda group: min(group, key=lambda row: row[side]),
        "highest loss": lambda side: lambda group: max(group, key=lambda row: row["pre"]),
    }
    body = [
        [name, rival, *(gain(groups, rule(side), side, value).text(3) for side in SIDES)]
        for name, rule in names.items() for rival, value in RIVALS.items()
    ]  # fmt: skip
    return table(["prompt", "less", *SIDES.values()], body)


def policy_table(groups: Groups) -> list[str]:
    """Forgetting under every candidate less that under the original and a random paraphrase, on either half."""
    chosen_on = {key: group for key, group in groups.items() if key[0] in design.CHOOSING}
    shown_on = {key: group for key, group in groups.items() if key not in chosen_on}
    gains = {
        name: [gain(part, rule, "forgetting", rival) for part in (chosen_on, shown_on) for rival in RIVALS.values()]
        for name, rule in CANDIDATES.items()
    }
    taken = min(gains, key=lambda name: gains[name][0].mean)
    body = [[f"{n}{' (taken)' if n == taken else ''}", *(one.text(3) for one in own)] for n, own in gains.items()]
    heads = [f"{half}, less {rival}" for half in ("chosen on", "shown on") for rival in RIVALS]
    return table(["forgetting with", *heads], body)


def rests_table(matrices: list[Matrix]) -> list[str]:
    """How often the choice by fewer rows or another mean is that of the token mean of all rows, and what it costs."""
    body = []
    for kind in ("token", "example", "batch"):
        for count in (16, 64, None):
            same, regret = np.asarray([_agreement(one, kind, count) for one in matrices]).T
            body.append([kind, str(count or "all (110 to 250)"), f"{100 * same.mean():.0f} %",
                         f"{100 * regret.mean():.2f} %", f"{100 * regret.max():.1f} %"])  # fmt: skip
    return table(
        ["mean over", "rows", "the same prompt", "regret, mean over matrices", "largest mean of a matrix"], body
    )


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


def summary_table(results: Path) -> list[str]:
    """What loss before learning says of forgetting, and what choosing by it saves, on each model and rate."""
    body = []
    for kind, (_, name) in SINGLE.items():
        groups = complete(rows.load(kind, results)["rows"])
        less = {key: SAPO(group)["forgetting"] - group[0]["forgetting"] for key, group in groups.items()}
        gains = [gain(groups, SAPO, "forgetting", rival).text(3) for rival in RIVALS.values()]
        correlation = of_tasks(correlations(groups, "forgetting")).text(2)
        body.append([name, correlation, *gains, f"{max(group_means(less, 0)):+.3f}"])
    return table(
        ["model, learning rate", "rank correlation", "SAPO less the original", "SAPO less a random paraphrase",
         "worst task of SAPO less the original"], body,
    )  # fmt: skip


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


def by_seed(a: dict, b: dict) -> Interval:
    """The mean of a - b where both have a value, with the seeds as the unit: a seed's orders are averaged first."""
    return student_mean(group_means({key: a[key] - b[key] for key in a.keys() & b.keys()}, 1))


def comparison_table(found: Rows) -> list[str]:
    """Differences of one policy to another."""

    def cell(pair: tuple[str, str], method: str, metric: str, measure: str) -> str:
        both = (values(found, method, policy, metric, measure) for policy in pair)
        return by_seed(*both).text(2 if metric == "loss" else 1)

    body = [
        [f"{label}, {method}", " - ".join(pair), *(cell(pair, method, metric, measure) for measure in MEASURES)]
        for metric, label in LABELS.items() for method in METHODS for pair in PAIRS
    ]  # fmt: skip
    return table(["metric, method", "difference", *MEASURES], body)


def sequences_table(found: Rows) -> list[str]:
    """Sequences under each policy: means over seeds and, in brackets, how much more than with the original."""
    columns = [(measure, metric) for metric in ("loss", "rougeL") for measure in MEASURES]
    body = []
    for method, policy in dict.fromkeys((row["method"], row["policy"]) for row in found):
        cells = []
        for measure, metric in columns:
            mine, original = (values(found, method, name, metric, measure) for name in (policy, "original"))
            digits = 3 if metric == "loss" else 1
            cells.append(f"{fmean(mine.values()):.{digits}f}")
            if policy != "original" and mine.keys() & original.keys():
                cells[-1] += f" ({by_seed(mine, original).text(digits)})"
        body.append([f"{method}, {policy}", str(len(mine)), *cells])
    heads = [f"{measure}, {LABELS[metric]}" for measure, metric in columns]
    return table(["method, policy", "seeds", *heads], body)


def _single(make: Callable[[Groups], list[str]], kind: str) -> Callable[[Path], list[str]]:
    return lambda results: make(complete(rows.load(kind, results)["rows"]))


def _tiny(make: Callable[[Groups], list[str]], *, unmet: bool = False) -> Callable[[Path], list[str]]:
    """unmet: of the prompts that the base had not met in its training."""

    def made(results: Path) -> list[str]:
        known = known_wordings(PRESETS["default"].seed) if unmet else {}
        found = rows.load("single", results)["rows"]
        return make(by_task_and_seed([row for row in found if row["prompt"] not in known.get(row["task"], ())]))

    return made


# Rows of single-task runs on pretrained models: what their tables are called, and what is told of them.
SINGLE = {
    "single_smollm2": ("smollm2", "SmolLM2-135M, 2e-3"),
    "single_smollm2_0.0005": ("smollm2-slow", "SmolLM2-135M, 5e-4"),
    "single_gemma3-270m": ("gemma3", "Gemma 3 270M, 5e-4"),
}
MAKERS = {
    "differ": differ_table,
    "tasks": by_task_table,
    "correlation": correlation_table,
    "choice": choice_table,
    "policies": policy_table,
}
TABLES: dict[str, Callable[[Path], list[str]]] = {
    **{f"{told} {name}": _single(make, kind) for kind, (told, _) in SINGLE.items() for name, make in MAKERS.items()},
    "summary": summary_table,
    "rests": lambda _: rests_table([one for one in read_matrices() if one.set.startswith("smollm2")]),
    "tiny correlation": _tiny(correlation_table),
    "tiny correlation unmet": _tiny(correlation_table, unmet=True),
    "tiny choice": _tiny(choice_table),
    "smollm2 sequences": lambda results: sequences_table(rows.load("sequences_smollm2", results)["rows"]),
    "tiny sequences": lambda results: comparison_table(rows.load("sequences", results)["rows"]),
}


def made_table(name: str, results: Path = rows.RESULTS) -> list[str]:
    """The lines of a table."""
    if name not in TABLES:
        raise DataError(f"effect: expected a table ({', '.join(TABLES)}), got {name}")
    return TABLES[name](results)
