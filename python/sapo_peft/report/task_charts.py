"""Losses and weights of one task's prompts: over its scorings, or by rank where there was one scoring only."""

from __future__ import annotations

from collections.abc import Sequence

from .markup import Markup, details, figure, fixed, inline, paragraph, plural, table, task_name, whole
from .run_data import Prompts, Scoring, Task
from .svg import Line, Point, line_chart, rank_chart, span_chart

# More lines are a grey area; those that are left out are said. Points are thinned evenly.
MAX_LINES = 64
MAX_POINTS = 400
# Told below a chart, and in the list of all prompts.
MAX_SWITCHES = 6
MAX_SWITCHES_LISTED = 500
MAX_SPANS = 12
# Scorings that the table of all prompts has columns for.
MAX_COLUMNS = 6


def loss_figure(task: Task, original: int | None) -> Markup:
    """Every prompt's loss at every scoring, switches marked; with one scoring the prompts by rank."""
    prompts = task.prompts
    scorings = prompts.scorings
    if not any(value is not None for scoring in scorings for value in scoring.loss):
        return paragraph("No scoring of this task has a loss.")
    tokens = f"{whole(sum(scorings[-1].tokens))} probe tokens at the last scoring, all prompts together."
    if len(scorings) == 1:
        chosen = scorings[0].chosen
        ranked = sorted((value, i) for i, value in enumerate(scorings[0].loss) if value is not None)
        label = (
            f"Losses of {len(ranked)} prompts by rank, from {ranked[0][0]:.4f} to {ranked[-1][0]:.4f} nats per token"
        )
        chart = rank_chart([(i, value) for value, i in ranked], chosen, original, label, "nats per token")
        unknown = len(scorings[0].loss) - len(ranked)
        missing = f" {plural(unknown, 'prompt')} without a loss." if unknown else ""
        if scorings[0].loss[chosen] is None:
            missing += f" Among them the chosen one, prompt {chosen}."
        if chosen == original:
            missing += " The original was chosen."
        return figure(chart, f"One scoring, at step {scorings[0].step}.{missing} {tokens}")
    switches = prompts.switches()
    values = [[scoring.loss[i] for scoring in scorings] for i in range(len(prompts.texts))]
    changes = f"{len(switches)} switch{'' if len(switches) == 1 else 'es'}"
    label = f"Losses of {len(values)} prompts over {len(scorings)} scorings, {changes}"
    chart, left = _over_time(prompts, values, original, label, "nats per token", None)
    caption = (
        "Heavy: the prompt in use, with a ring where its time begins. Broken: the original. Grey: the others. "
        f"{_switch_sentence(prompts, MAX_SWITCHES)} {left} {tokens}"
    )
    return figure(chart, caption)


def weight_figure(task: Task, original: int | None) -> Markup:
    """Every prompt's weight at every scoring; a sentence where a picture would show one dot."""
    prompts = task.prompts
    scorings = prompts.scorings
    last = scorings[-1]
    if len(scorings) == 1:
        positive = sorted({weight for weight in last.weights if weight > 0})
        if sum(weight > 0 for weight in last.weights) == 1:
            return paragraph(f"One scoring; all weight is on prompt {last.weights.index(positive[0])}.")
        if len(positive) == 1 and 0 not in last.weights:
            return paragraph(f"One scoring; all {len(last.weights)} prompts have the same weight.")
        if not positive:
            return paragraph("One scoring; no prompt has any weight.")
        ranked = sorted(((weight, -i) for i, weight in enumerate(last.weights)), reverse=True)
        label = f"Weights of {len(ranked)} prompts by rank, from {ranked[0][0]:.4g} to {ranked[-1][0]:.4g}"
        chart = rank_chart([(-i, weight) for weight, i in ranked], last.chosen, original, label, "weight")
        return figure(chart, f"One scoring, at step {last.step}.")
    if all(_one_hot(scoring) for scoring in scorings):
        return _use_figure(task, original)
    values = [[scoring.weights[i] for scoring in scorings] for i in range(len(prompts.texts))]
    shares = all(abs(sum(scoring.weights) - 1) < 1e-3 for scoring in scorings)
    label = f"Weights of {len(values)} prompts over {len(scorings)} scorings"
    chart, left = _over_time(prompts, values, original, label, "weight", (0.0, 1.0) if shares else None, staircase=True)
    return figure(chart, f"Heavy: the prompt in use. Weights hold until the next scoring. {left}")


def _one_hot(scoring: Scoring) -> bool:
    return scoring.weights[scoring.chosen] > 0 and sum(weight > 0 for weight in scoring.weights) == 1


def _use_figure(task: Task, original: int | None) -> Markup:
    """Where one prompt has all the weight: which one, from when to when."""
    prompts = task.prompts
    xs, title = _times(prompts)
    starts = [0, *(i for i, _, _ in prompts.switches())]
    # The last prompt stays until training ends.
    end = max([xs[-1], *(step for step, _ in (task.train or {}).get("losses", []))]) if title == "step" else xs[-1]
    spans: dict[int, list[tuple[float, float]]] = {}
    for start, stop in zip(starts, [*starts[1:], None], strict=True):
        until = end if stop is None else xs[stop]
        spans.setdefault(prompts.scorings[start].chosen, []).append((xs[start], until))
    shown = list(spans.items())[:MAX_SPANS]
    rows = [
        ("original" if i == original else f"prompt {i}", "bar-other" if i == original else "bar-accent", stretches)
        for i, stretches in shown
    ]
    label = f"The prompt in use over {len(xs)} scorings: " + ", ".join(
        f"{name} from {', '.join(f'{start:.0f}' for start, _ in stretches[:MAX_SWITCHES])}"
        for name, _, stretches in rows
    )
    left = f" {plural(len(spans) - len(shown), 'prompt')} more were in use." if len(spans) > len(shown) else ""
    return figure(
        span_chart(rows, label, title), f"At every scoring one prompt has all the weight; the bars say which.{left}"
    )


def _over_time(
    prompts: Prompts,
    values: Sequence[Sequence[float | None]],
    original: int | None,
    label: str,
    y_title: str,
    y_range: tuple[float, float] | None,
    staircase: bool = False,
) -> tuple[Markup, str]:
    """(chart, what it leaves out). values: [K][scorings]."""
    scorings = prompts.scorings
    xs, x_title = _times(prompts)
    switches = prompts.switches()
    kept = _thin(len(xs), {0, *(i for i, _, _ in switches[:MAX_POINTS])})
    used = list(dict.fromkeys([scorings[-1].chosen, *(scoring.chosen for scoring in reversed(scorings))]))
    shown = _lines_shown(values, used, original)
    lines = []
    for i in shown:
        kind = "original" if i == original else "used" if i in used else "faint"
        name = ("original" if i == original else f"prompt {i}") if kind == "original" or i in used[:5] else ""
        title = f"prompt {i}{' (original)' if i == original else ''}: {prompts.texts[i]}"
        points = [(xs[s], values[i][s]) for s in kept]
        lines.append(Line(_stairs(points) if staircase else points, kind, title, name))
    path = []
    starts = [0, *(i for i, _, _ in switches)]
    for start, stop in zip(starts, [*starts[1:], len(xs) - 1], strict=True):
        chosen = scorings[start].chosen
        points = [(xs[s], values[chosen][s]) for s in kept if start <= s <= stop]
        path.append(_stairs(points)[: 2 * len(points) - 2 if start < stop else None] if staircase else points)
    marks = [(xs[i], f"{old} \u2192 {new}") for i, old, new in switches]
    chart = line_chart(lines, label, x_title, y_title, path, marks, y_range)
    left = []
    if len(shown) < len(values):
        left.append(f"{plural(len(values) - len(shown), 'line')} of prompts that were never in use are left out.")
    if len(kept) < len(xs):
        left.append(f"{len(kept)} of {len(xs)} scorings are drawn.")
    return chart, " ".join(left)


def _times(prompts: Prompts) -> tuple[list[int], str]:
    """Where each scoring stands in time, and what that axis is called: steps, or numbers if steps do not rise."""
    steps = [scoring.step for scoring in prompts.scorings]
    if all(a < b for a, b in zip(steps, steps[1:], strict=False)):
        return steps, "step"
    return list(range(1, len(steps) + 1)), "scoring"


def _stairs(points: Sequence[Point]) -> list[Point]:
    """Each value held until the next point."""
    held: list[Point] = []
    for (x, y), (following, _) in zip(points, [*points[1:], points[-1]], strict=True):
        held += [(x, y), (following, y)]
    return held


def _thin(count: int, always: set[int]) -> list[int]:
    """At most about `MAX_POINTS` of the indices below `count`, the ends and `always` among them."""
    if count <= MAX_POINTS:
        return list(range(count))
    even = {round(i * (count - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)}
    return sorted(even | always)


def _lines_shown(values: Sequence[Sequence[float | None]], used: list[int], original: int | None) -> list[int]:
    if len(values) <= MAX_LINES:
        return list(range(len(values)))
    first = [*used[:MAX_LINES], *([original] if original is not None else [])]
    rest = sorted(
        (i for i in range(len(values)) if i not in first),
        key=lambda i: min((v for v in values[i] if v is not None), default=float("inf")),
    )
    return sorted({*first, *rest[: max(0, MAX_LINES - len(first))]})


def _switch_sentence(prompts: Prompts, most: int) -> str:
    switches = prompts.switches()
    if not switches:
        return f"No switch in {len(prompts.scorings)} scorings."
    told = [
        f"step {prompts.scorings[i].step} ({inline(prompts.scorings[i].reason)}): {old} \u2192 {new}"
        for i, old, new in switches[:most]
    ]
    more = f"; {whole(len(switches) - most)} more" if len(switches) > most else ""
    return f"Switches: {'; '.join(told)}{more}."


def prompt_table(task: Task, original: int | None) -> Markup:
    """All prompts with their texts and losses, folded away."""
    prompts = task.prompts
    scorings = prompts.scorings
    count = len(scorings)
    columns = sorted({round(i * (count - 1) / max(1, MAX_COLUMNS - 1)) for i in range(MAX_COLUMNS)})
    if count <= MAX_COLUMNS:
        columns = list(range(count))
    rows = []
    for i, text in enumerate(prompts.texts[:MAX_LINES]):
        marks = [*(["original"] if i == original else []), *(["in use at the end"] if i == scorings[-1].chosen else [])]
        name = f"{i} ({', '.join(marks)})" if marks else str(i)
        losses = [fixed(scorings[s].loss[i], 4) for s in columns]
        rows.append([name, f'<span class="wide">{inline(text, 1000)}</span>', *losses])
    head = ["prompt", "text", *(f"step {scorings[s].step}" for s in columns)]
    caption = "Losses in nats per token"
    if count > len(columns):
        caption += f", {len(columns)} of {count} scorings"
    if len(prompts.texts) > MAX_LINES:
        caption += f", the first {MAX_LINES} of {len(prompts.texts)} prompts"
    title = f"Task {task.number}, {task_name(task.name)}: all {plural(len(prompts.texts), 'prompt')}"
    sentence = paragraph(_switch_sentence(prompts, MAX_SWITCHES_LISTED), kind="note")
    return details(title, table(head, rows, caption, (0, 1)) + sentence)
