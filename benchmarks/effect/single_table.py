"""Tables of single-task runs; a (task, seed) counts once all of its prompts have been run."""

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
from tools.tiny_base.corpus import known_wordings
from tools.tiny_base.presets import PRESETS

from ..racing import Matrix, read_matrices
from . import pretrained_design as design
from . import rows
from .policies import CANDIDATES
from .statistics import Interval, bold, correlations, group_means, spearman, student_mean

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


def summary_table(results: Path) -> list[str]:
    """What loss before learning says of forgetting, and what choosing by it saves, on each model and rate."""
    columns = (
        "rank correlation",
        "SAPO less the original",
        "SAPO less a random paraphrase",
        "worst task of SAPO less the original",
    )
    lines = [f"| model, learning rate | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    sapo = CANDIDATES["lowest loss (SAPO)"]
    for kind, (_, name) in SINGLE.items():
        groups = complete(rows.load(kind, results)["rows"])
        less = {key: sapo(group)["forgetting"] - group[0]["forgetting"] for key, group in groups.items()}
        cells = [bold(of_tasks(correlations(groups, "forgetting")), 2)]
        cells += [bold(gain(groups, sapo, "forgetting", rival), 3) for rival in RIVALS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {max(group_means(less, 0)):+.3f} |")
    return lines


def _single(make: Callable[[Groups], list[str]], kind: str) -> Callable[[Path], list[str]]:
    return lambda results: make(complete(rows.load(kind, results)["rows"]))


def _tiny(make: Callable[[Groups], list[str]], *, unmet: bool = False) -> Callable[[Path], list[str]]:
    """unmet: of the prompts that the base had not met in its training."""

    def made(results: Path) -> list[str]:
        known = known_wordings(PRESETS["default"].seed) if unmet else {}
        found = rows.load("single", results)["rows"]
        return make(rows.by_task_and_seed([row for row in found if row["prompt"] not in known.get(row["task"], ())]))

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
}
