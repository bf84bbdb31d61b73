"""What the template shows of a run, and of runs side by side, as plain values and charts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from markupsafe import Markup

from ..sequence.folder import Run
from ..sequence.schema import MEASURES, Evaluation, FinishedTask, Scores
from . import charts
from .compare import Arm, Difference, difference
from .text import change, figure, fixed, level, line, percent, plural, seconds, whole, word_diff

# More prompts or lines than these make a page that nobody reads.
MAX_PROMPTS = 200
MAX_LINES = 40
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
# What each metric is called, and the sentence about it; WORSE and BETTER are sides of 0.
METRICS = {
    "AP": ("average performance", "The mean score over all tasks, measured after the last one."),
    "BWT": ("backward transfer", "How much the scores of tasks already learnt changed while later ones were learnt, "
            "on average: WORSE 0 is forgetting."),
    "FWT": ("forward transfer", "How much the scores of tasks still to come changed against the untrained model, "
            "on average: BETTER 0, what was learnt before helps."),
}  # fmt: skip
VERDICTS = {"better": "better", "worse": "worse", "open": "no difference shown",
            "single": "one pair, which cannot tell an effect from chance"}  # fmt: skip


def meaning(metric: str, measure: str) -> str:
    """The sentence about a metric of a measure."""
    sides = ("above", "below") if MEASURES[measure].lower_is_better else ("below", "above")
    return METRICS[metric][1].replace("WORSE", sides[0]).replace("BETTER", sides[1])


def matrices(run: Run, baseline: Run | None) -> Iterator[tuple[Any, list[tuple[str, list[list[dict]]]]]]:
    """(measure, its tables): the matrix of the run, that of the baseline, and the differences, as (title, cells)."""
    for name in run.measures:
        measure, ours, theirs = MEASURES[name], run.figure(name, "R"), baseline and baseline.figure(name, "R")
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

    def cell(i: int, j: int, value: float | None) -> dict:
        share = 0.0 if value is None else good(value)
        kinds = {"own": i == j and value is not None, "ahead": j > i, "none": value is None, "bad": share < 0}
        return {"text": shown(value, measure), "good": share, "kind": " ".join(k for k, v in kinds.items() if v)}

    return [[cell(i, j, value) for j, value in enumerate(row, 1)] for i, row in enumerate(matrix)]


def task_view(run: Run, number: int, task: FinishedTask, baseline: Run | None) -> dict[str, Any]:
    """The prompts of a task, its charts and a few answers."""
    prompts, chosen, scorings = task.scores.prompts, task.scores.chosen, task.scores.scorings
    losses = scorings[-1].loss if scorings else [None] * len(prompts)
    marks = {0: " original", chosen: " chosen"} if chosen else {0: " original, chosen"}
    ranked = sorted(range(len(prompts)), key=lambda k: (losses[k] is None, losses[k] or 0.0, k))[:MAX_PROMPTS]
    others = baseline.tasks[number - 1 : number] if baseline else []
    curves = [charts.Series(other.train.losses, "original", baseline.record.policy) for other in others]
    curves.append(charts.Series(task.train.losses, "used", run.record.policy))
    return {
        "words": word_diff(prompts[0], prompts[chosen]),
        "losses": losses,
        "gain": None if None in (losses[0], losses[chosen]) else losses[chosen] - losses[0],
        "prompts": [[f"{k}{marks.get(k, '')}", fixed(losses[k], 4), line(prompts[k], 1000)] for k in ranked],
        "prompt_chart": _prompt_chart(task.scores) if len(scorings) > 1 else "",
        "prompt_told": _told(task.scores),
        "training_chart": charts.plot(curves, f"Training loss of task {number}", "step", "nats per token"),
        "answers": _answers(run.before, task.metrics, number - 1),
    }


def _prompt_chart(scores: Scores) -> Markup:
    """Losses of the prompts over the steps; one scoring is a table, not a chart."""
    scorings, prompts = scores.scorings, scores.prompts
    lowest = {k: min((s.loss[k] for s in scorings if s.loss[k] is not None), default=None) for k in range(len(prompts))}
    ranked = sorted((k for k in lowest if lowest[k] is not None), key=lambda k: lowest[k])
    points = {k: [(scoring.step, scoring.loss[k]) for scoring in scorings] for k in ranked}
    used = [k for k in dict.fromkeys(scoring.chosen for scoring in scorings) if k in points and k != 0][-MAX_LINES:]
    others = [k for k in ranked if k not in (0, *used)][:MAX_LINES]
    series = [charts.Series(points[k], "faint", title=f"prompt {k}: {prompts[k]}") for k in others]
    series += [charts.Series(points[k], "used", f"prompt {k}", prompts[k]) for k in used]
    if 0 in points:
        series.append(charts.Series(points[0], "original", "original", prompts[0]))
    series.append(charts.Series([(s.step, s.loss[s.chosen]) for s in scorings], "ring", dots=True))
    label = f"Losses of {plural(len(ranked), 'prompt')} in {plural(len(scorings), 'scoring')}"
    return charts.plot(series, label, "step", "nats per token")


def left_original(scores: Scores) -> bool:
    """Whether a task was trained on another prompt than the first, at the end or before a switch."""
    return any([scores.chosen, *(scoring.chosen for scoring in scores.scorings)])


def _told(scores: Scores) -> str:
    scorings = scores.scorings
    pairs = zip(scorings, scorings[1:], strict=False)
    switches = [(after, before.chosen) for before, after in pairs if before.chosen != after.chosen]
    if not scorings:
        return "Not scored: this policy trains without looking at the losses of the prompts."
    tokens = f"{whole(sum(scorings[-1].tokens))} probe tokens, all prompts together."
    if len(scorings) == 1:
        return f"One scoring, at step {scorings[0].step}. {tokens}"
    told = [f"step {s.step} ({line(s.reason, 40)}): {old} \u2192 {s.chosen}" for s, old in switches[:MAX_SWITCHES]]
    told += [f"{whole(len(switches) - MAX_SWITCHES)} more"] if len(switches) > MAX_SWITCHES else []
    changed = f"Switches: {'; '.join(told)}." if told else f"No switch in {len(scorings)} scorings."
    return f"Ringed: the prompt in use. {changed} Last scoring: {tokens}"


def _answers(before: Evaluation | None, after: Evaluation, place: int) -> list[list[str]]:
    """Input, target, answer before training and after the task of the first few test examples, if kept."""
    known = {one.input: one.answer for one in before.answers[place]} if before and before.answers else {}
    shown = after.answers[place][:MAX_ANSWERS] if after.answers else []
    rows = [(one.input, one.target, known.get(one.input, "not kept"), one.answer) for one in shown]
    return [[line(text, 400) for text in texts] for texts in rows]


def task_names(run: Run) -> list[str]:
    return [f"{number}. {name}" for number, name in enumerate(run.record.tasks, 1)]


def cost(run: Run) -> dict[str, Any] | None:
    """Seconds by part, of whose sum all shares are taken, and rows by task."""
    total = run.results["cost"]
    if not total["train_seconds"]:
        return None
    names = {"scoring": "score", "training": "train", "evaluation": "eval"}
    parts = {name: total[f"{key}_seconds"] for name, key in names.items()}
    whole_run, rows = sum(parts.values()), []

    def row(name: str, spent: list[float], tokens: list[int]) -> list[str]:
        return [name, *map(seconds, spent), percent(spent[0] / whole_run), *map(whole, tokens)]

    for name, task in zip(task_names(run), run.tasks, strict=False):
        score, dense, computed = (sum(getattr(scoring, key) for scoring in task.scores.scorings)
                                  for key in ("seconds", "dense_tokens", "computed_tokens"))  # fmt: skip
        spent = [score, task.train.seconds, task.metrics.seconds]
        rows.append(row(name, spent, [task.train.tokens, dense, computed]))
    tokens = [total[key] for key in ("train_tokens", "score_dense_tokens", "score_computed_tokens")]
    rows.append(row("whole run", list(parts.values()), tokens))
    return {"parts": parts, "seconds": whole_run, "rows": rows}


def data_rows(run: Run) -> list[list[str]]:
    return [
        [name, *(whole(task.data.rows.get(split, 0)) for split in ("train", "test")),
         line("; ".join(task.data.notes) or "none", 4000)]
        for name, task in zip(task_names(run), run.tasks, strict=False)
    ]  # fmt: skip


def settings(values: dict[str, Any]) -> list[list[str]]:
    texts = {key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in sorted(values.items())}
    return [[line(key), line(text, 2000)] for key, text in texts.items()]


def runs_of(arms: Sequence[Arm]) -> list[Run]:
    return [run for arm in arms for run in arm.runs.values()]


def latest(runs: Sequence[Run]) -> str:
    return max(run.record.finished or run.record.started for run in runs)


def comparison(arms: Sequence[Arm]) -> list[tuple[Any, list[list[str]]]]:
    """By measure the means of all arms and how the first differs from each of the others."""
    own, tables = arms[0], []
    for measure in (name for name in MEASURES if any(name in run.measures for run in runs_of(arms))):
        rows = []
        for metric in METRICS:
            for arm in arms:
                values = list(arm.values(measure, metric).values())
                mean = figure(sum(values) / len(values), measure, metric) if values else "none"
                shown = _difference(None if arm is own else difference(own, arm, measure, metric), measure)
                rows.append([metric, line(arm.label(own)), str(len(values)), mean, *shown])
        tables.append((MEASURES[measure], rows))
    return tables


def _difference(found: Difference | None, measure: str) -> list[str]:
    """Difference, pairs, interval and verdict."""
    if found is None:
        return [""] * 4
    ends = " to ".join(change(end, measure) for end in found.interval) if found.interval else "none"
    return [change(found.mean, measure), str(len(found.values)), ends, VERDICTS[found.verdict]]
