"""What the templates show of a run, and of runs side by side, as plain values and charts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from markupsafe import Markup

from ..sequence.schema import MEASURES
from . import charts
from .compare import Arm, Group, difference, differing
from .runs import FinishedTask, Run
from .text import change, figure, fixed, level, line, plural, unit, whole, word_diff

# More prompts, lines or dots than these make a page that nobody reads.
MAX_PROMPTS = 200
MAX_LINES, MAX_DOTS = 40, 400
MAX_SWITCHES = 6
MAX_ANSWERS = 5
POLICIES = {
    "sapo": "prompts chosen by SAPO",
    "original": "the original prompts",
    "random": "paraphrases drawn at random",
    "worst": "the prompts with the highest loss",
    "sample": "a prompt drawn anew for every example",
}
METHODS = {
    "lora-inc": "a new LoRA adapter for each task, the earlier ones frozen and active",
    "o-lora": "a new LoRA adapter for each task, kept orthogonal to the earlier ones",
    "seq-lora": "one LoRA adapter, trained on from task to task",
}
# What each metric is called, and the sentence about it; {worse} and {better} are sides of 0.
METRICS = {
    "AP": ("average performance", "The mean score over all tasks, measured after the last one."),
    "BWT": ("backward transfer", "How much the scores of tasks already learnt changed while later ones were learnt, "
            "on average: {worse} 0 is forgetting."),
    "FWT": ("forward transfer", "How much the scores of tasks still to come changed against the untrained model, "
            "on average: {better} 0, what was learnt before helps."),
}  # fmt: skip
VERDICTS = {"better": "better", "worse": "worse", "open": "no difference shown",
            "single": "one pair, which cannot tell an effect from chance"}  # fmt: skip


def meaning(metric: str, measure: str) -> str:
    """The sentence about a metric of a measure."""
    sides = ("above", "below") if MEASURES[measure].lower_is_better else ("below", "above")
    return METRICS[metric][1].format(worse=sides[0], better=sides[1])


def matrices(run: Run, baseline: Run | None) -> Iterator[tuple[Any, list[tuple[str, list[list[dict]]]]]]:
    """(measure, its tables): the matrix of the run, that of the baseline, and the differences, as (title, cells)."""
    for name in run.measures:
        measure, ours, theirs = MEASURES[name], run.matrix(name), baseline and baseline.matrix(name)
        values = [v for matrix in (ours, theirs or []) for row in matrix for v in row if v is not None]
        worst, best = (0.0, measure.top) if measure.top else (max(values, default=1.0), min(values, default=0.0))
        share = lambda value, worst=worst, best=best: (value - worst) / (best - worst) if best != worst else 0.5
        tables = [(run.record.policy, _cells(ours, level, name, share))]
        if theirs:
            tables.append((baseline.record.policy, _cells(theirs, level, name, share)))
            gaps = [[None if None in pair else pair[0] - pair[1] for pair in zip(*rows, strict=True)]
                    for rows in zip(ours, theirs, strict=True)]  # fmt: skip
            reach = max((abs(gap) for row in gaps for gap in row if gap is not None), default=0.0) or 1.0
            sign = -reach if measure.lower_is_better else reach
            title = f"{run.record.policy} less {baseline.record.policy}"
            tables.append((title, _cells(gaps, change, name, lambda gap, sign=sign: gap / sign)))
        yield measure, tables


def _cells(matrix: Sequence[Sequence], shown: Callable, measure: str, good: Callable) -> list[list[dict]]:
    """good(value): 1 for the best, 0 for white, below 0 for worse than the baseline."""
    return [
        [
            {"text": shown(value, measure), "good": None if value is None else good(value),
             "place": "own" if i == j else "ahead" if j > i else ""}
            for j, value in enumerate(row, 1)
        ]
        for i, row in enumerate(matrix)
    ]  # fmt: skip


def task_view(run: Run, task: FinishedTask, baseline: Run | None) -> dict[str, Any]:
    """The prompts of a task, its charts and a few answers."""
    prompts, chosen, scorings = task.scores.prompts, task.scores.chosen, task.scores.scorings
    losses = scorings[-1].loss if scorings else [None] * len(prompts)
    other = next((one for one in baseline.tasks if one.number == task.number), None) if baseline else None
    curves = [charts.Series(other.train.losses, "original", baseline.record.policy)] if other else []
    curves.append(charts.Series(task.train.losses, "used", run.record.policy))
    return {
        "words": word_diff(prompts[0], prompts[chosen]),
        "losses": losses,
        "gain": None if None in (losses[0], losses[chosen]) else losses[chosen] - losses[0],
        "ranked": sorted(range(len(prompts)), key=lambda k: (losses[k] is None, losses[k] or 0.0, k))[:MAX_PROMPTS],
        "prompt_chart": _prompt_chart(task) if scorings else "",
        "prompt_told": _told(task),
        "training_chart": charts.plot(curves, f"Training loss of task {task.number}", "step", "nats per token"),
        "answers": _answers(run, task),
    }


def _prompt_chart(task: FinishedTask) -> Markup:
    """Losses of the prompts: by rank for one scoring, else over the steps."""
    scorings, prompts = task.scores.scorings, task.scores.prompts
    by_rank = len(scorings) == 1
    lowest = {k: min((s.loss[k] for s in scorings if s.loss[k] is not None), default=None) for k in range(len(prompts))}
    ranked = sorted((k for k in lowest if lowest[k] is not None), key=lambda k: lowest[k])
    if by_rank:
        points = {k: [(rank, lowest[k])] for rank, k in enumerate(ranked, 1)}
    else:
        points = {k: [(scoring.step, scoring.loss[k]) for scoring in scorings] for k in ranked}
    used = [k for k in dict.fromkeys(scoring.chosen for scoring in scorings) if k in points and k != 0][-MAX_LINES:]
    others = [k for k in ranked if k not in (0, *used)]
    others = charts.thinned(others, MAX_DOTS) if by_rank else others[:MAX_LINES]
    shape = "dot" if by_rank else "line"
    series = [charts.Series(points[k], "faint", title=f"prompt {k}: {prompts[k]}", shape=shape) for k in others]
    series += [charts.Series(points[k], "used", f"prompt {k}", prompts[k], shape) for k in used]
    if 0 in points:
        series.append(charts.Series(points[0], "original", "original", prompts[0], "diamond" if by_rank else "line"))
    if not by_rank:
        series.append(charts.Series([(s.step, s.loss[s.chosen]) for s in scorings], "ring", shape="dot"))
    label = f"Losses of {plural(len(ranked), 'prompt')} in {plural(len(scorings), 'scoring')}"
    return charts.plot(series, label, "rank among the prompts" if by_rank else "step", "nats per token")


def _told(task: FinishedTask) -> str:
    scorings, switches = task.scores.scorings, task.switches()
    if not scorings:
        return "Not scored: this policy trains without looking at the losses of the prompts."
    tokens = f"{whole(sum(scorings[-1].tokens))} probe tokens, all prompts together."
    if len(scorings) == 1:
        return f"One scoring, at step {scorings[0].step}. {tokens}"
    told = [f"step {s.step} ({line(s.reason, 40)}): {old} \u2192 {s.chosen}" for s, old in switches[:MAX_SWITCHES]]
    told += [f"{whole(len(switches) - MAX_SWITCHES)} more"] if len(switches) > MAX_SWITCHES else []
    changed = f"Switches: {'; '.join(told)}." if told else f"No switch in {len(scorings)} scorings."
    return f"Ringed: the prompt in use. {changed} Last scoring: {tokens}"


def _answers(run: Run, task: FinishedTask) -> list[tuple[str, str, str | None, str]]:
    """(input, target, answer before training, answer after the task) of the first few test examples, if kept."""
    before, after = (
        found.answers[task.number - 1] if found and found.answers else [] for found in (run.before, task.metrics)
    )
    known = {one.input: one.answer for one in before}
    return [(one.input, one.target, known.get(one.input), one.answer) for one in after[:MAX_ANSWERS]]


def cost(run: Run) -> dict[str, Any] | None:
    """Seconds by part, of whose sum all shares are taken, and rows of (name, seconds, tokens) by task."""
    if run.results is None or not (total := run.results.cost).train_seconds:
        return None
    parts = {"scoring": total.score_seconds, "training": total.train_seconds, "evaluation": total.eval_seconds}
    rows = []
    for task in run.tasks:
        sums = [sum(getattr(scoring, name) for scoring in task.scores.scorings)
                for name in ("seconds", "dense_tokens", "computed_tokens")]  # fmt: skip
        spent = [sums[0], task.train.seconds, task.metrics.seconds]
        rows.append((f"{task.number}. {task.name}", spent, [task.train.tokens, *sums[1:]]))
    tokens = [total.train_tokens, total.score_dense_tokens, total.score_computed_tokens]
    rows.append(("whole run", list(parts.values()), tokens))
    return {"parts": parts, "seconds": sum(parts.values()), "rows": rows}


def settings(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in sorted(values.items())]


def comparison(group: Group, arm: Arm) -> dict[str, Any]:
    """By measure and metric the means of all arms and how `arm` differs from each of the others."""
    measures = {}
    for measure in group.measures:
        measures[measure] = {}
        for metric in METRICS:
            rows = [
                _row(arm, other, measure, metric) for other in (arm, *(one for one in group.arms if one is not arm))
            ]
            known = [row["difference"] for row in rows if row["difference"]]
            # Not by the intervals: one of two pairs may be very wide.
            reach = max((abs(value) for one in known for value in one.values), default=0.0) * 1.2 or 0.01
            for row in rows:
                row["mark"] = _mark(row, reach) if row["difference"] else ""
            if any(row["runs"] for row in rows):
                measures[measure][metric] = rows
    apart = [
        (other.label, [f"{key}: {arm.settings.get(key, 'none')} and {other.settings.get(key, 'none')}" for key in keys])
        for other in group.arms
        if (keys := differing(arm.settings, other.settings))
    ]
    unfinished = sum(not run.finished for run in group.runs)
    return {"group": group, "arm": arm, "measures": measures, "apart": apart, "unfinished": unfinished}


def _row(arm: Arm, other: Arm, measure: str, metric: str) -> dict[str, Any]:
    values = list(other.values(measure, metric).values())
    found = None if other is arm else difference(arm, other, measure, metric)
    ends = found and found.interval
    return {
        "label": other.label,
        "runs": len(values),
        "mean": figure(sum(values) / len(values), measure, metric) if values else "none",
        "difference": found,
        "gap": found and change(found.mean, measure),
        "interval": f"{change(ends[0], measure)} to {change(ends[1], measure)}" if ends else "none",
    }


def _mark(row: dict[str, Any], reach: float) -> Markup:
    found = row["difference"]
    return charts.interval(found.mean, found.interval, reach, found.verdict, f"{row['gap']}, {row['interval']}")
