"""What one run's part of the report shows. Each section returns markup; what is missing is said in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable

from .markup import (
    NONE,
    Markup,
    attribute,
    block,
    details,
    fixed,
    inline,
    paragraph,
    percent,
    plural,
    scroll,
    seconds,
    signed,
    table,
    task_name,
    whole,
)
from .measures import MEASURES, METRICS
from .run_data import Choice, Run, Task
from .style import STEPS
from .svg import share_bar
from .task_charts import loss_figure, prompt_table, weight_figure

# Rows of notes that a run may fill the page with.
MAX_NOTES = 200


def sections(run: Run) -> list[tuple[str, str, Markup]]:
    """(name for links, title, content) of every section of a run."""
    return [
        ("chosen", "Chosen prompts", chosen_prompts(run)),
        ("matrix", "Scores after every task", matrices(run)),
        ("losses", "Losses of the prompts over time", losses(run)),
        ("weights", "Weights of the prompts over time", _per_task(run, weight_figure)),
        ("cost", "Cost", cost(run)),
        ("notes", "Data notes and warnings", notes(run)),
        ("settings", "Settings", settings(run)),
    ]


def cards(run: Run) -> Markup:
    """Headline numbers of a run."""
    shown = [("Tasks finished", f"{run.done} <small>of {len(run.tasks)}</small>")]
    # With policy sample every task is trained on all of its prompts.
    if run.choices and run.policy != "sample":
        other = sum(_left_the_original(run, choice) for choice in run.choices.values())
        shown.append(
            ("Tasks trained on another prompt than the original", f"{other} <small>of {len(run.choices)}</small>")
        )
    if run.headline:
        measure = MEASURES[run.headline]
        titles = {"AP": "AP: mean at the end", "BWT": "BWT: earlier tasks", "FWT": "FWT: tasks to come"}
        for metric in METRICS:
            value = run.figure(run.headline, metric)
            if value is not None:
                unit = measure.unit if metric == "AP" else measure.change_unit
                text = f"{measure.figure(metric, value)} <small>{unit}</small>"
                shown.append((f"{titles[metric]}, {measure.title}", text))
    fraction = (run.cost or {}).get("overhead_fraction")
    if fraction is not None:
        shown.append(("Scoring, share of training time", f"{percent(fraction)} <small>%</small>"))
    return Markup(f'<dl class="cards">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in shown)}</dl>')


def _left_the_original(run: Run, choice: Choice) -> bool:
    """Whether the task was trained on another prompt than the original, at the end or before a switch."""
    task = run.folders[run.tasks.index(choice.task)]
    used = [task.prompts.texts[scoring.chosen] for scoring in task.prompts.scorings] if task and task.prompts else []
    return any(prompt != choice.original for prompt in [*used, choice.prompt])


def chosen_prompts(run: Run) -> Markup:
    if not run.choices:
        return paragraph("No task is finished yet, so no choice is recorded.")
    parts = []
    if run.policy == "original":
        parts.append(paragraph("Policy original keeps every instruction as it is."))
    if run.policy == "sample":
        parts.append(
            paragraph(
                "Policy sample draws a prompt for every example; the one shown stands for the task in evaluation."
            )
        )
    if any(choice.loss is not None for choice in run.choices.values()):
        parts.append(
            paragraph(
                "Losses are in nats per token on the scored training examples, at the last scoring of the task.",
                kind="note",
            )
        )
    for number, task in enumerate(run.tasks, 1):
        parts.append(f"<h4>{number}. {task_name(task)}</h4>")
        choice = run.choices.get(task)
        parts.append(_choice(number, choice) if choice else paragraph("Not finished yet."))
    return Markup("".join(parts))


def _choice(number: int, choice: Choice) -> str:
    same = choice.prompt == choice.original
    which = f"prompt {choice.index} of {choice.count} (numbered from 0)"
    name = f"Chosen, the original itself: {which}" if same else f"Chosen: {which}"
    boxes = [_text_box(name, choice.loss, choice.prompt, f"Chosen prompt of task {number}", "chosen")]
    gain = ""
    if not same:
        label = f"Original prompt of task {number}"
        boxes.append(_text_box("Original", choice.original_loss, choice.original, label, "first"))
        if choice.loss is not None and choice.original_loss is not None:
            gap = signed(choice.loss - choice.original_loss, 4)
            gain = paragraph(f"Loss of the chosen prompt less that of the original: {gap} nats per token.", kind="note")
    return f'<div class="pair">{"".join(boxes)}</div>{gain}'


def _text_box(name: str, loss: float | None, text: str, label: str, kind: str) -> str:
    known = f"loss <b>{fixed(loss, 4)}</b>" if loss is not None else "loss not scored"
    return f'<div class="{kind}"><p class="label"><b>{name}</b>, {known}</p>{block(text, label)}</div>'


def matrices(run: Run) -> Markup:
    if not run.scores:
        return paragraph("There is no results.json yet: the run has not finished its first task.")
    parts = [
        paragraph(
            "A row holds the scores on all test examples after training on the row's task; columns are the "
            "tasks by number. Framed: the task just learnt. Italic: tasks not yet learnt. Dashed: not evaluated.",
            kind="note",
        )
    ]
    maps = "".join(_heat_map(run, name) for name in MEASURES if name in run.scores)
    parts.append(f'<div class="maps">{maps}</div>')
    missing = [measure.title for name, measure in MEASURES.items() if name not in run.scores and name != "loss"]
    if missing:
        parts.append(paragraph(f"{' and '.join(missing)}: not evaluated in this run.", kind="note"))
    return Markup("".join(parts))


def _heat_map(run: Run, name: str) -> str:
    matrix, size, measure = run.scores[name].matrix, len(run.tasks), MEASURES[name]
    top = measure.top or max((value for row in matrix for value in row if value is not None), default=0.0) or 1.0
    heads = "".join(f'<th scope="col" title="{attribute(task)}">{j}</th>' for j, task in enumerate(run.tasks, 1))
    rows = []
    for i, row in enumerate(matrix):
        head = f"{i}. {task_name(run.tasks[i - 1])}" if i else "before training"
        cells = []
        for j, value in enumerate(row, 1):
            place = " own" if i == j else " ahead" if j > i else ""
            if value is None:
                cells.append(f'<td class="none">{NONE}</td>')
            else:
                cells.append(f'<td class="h{round(value / top * STEPS)}{place}">{measure.level(value)}</td>')
        rows.append(f'<tr><th scope="row" class="text">{head}</th>{"".join(cells)}</tr>')
    better = ", lower is better" if measure.lower_is_better else ""
    steps = "".join(f'<i class="h{step}"></i>' for step in range(0, STEPS + 1, 2))
    scale = f'{measure.level(0.0)}<span class="scale" aria-hidden="true">{steps}</span>{measure.level(top)}'
    caption = f'<b>{measure.title}</b>, {measure.unit}{better}<br><span class="range">{scale}</span>'
    first = '<th scope="col" class="text">after task</th>'
    return scroll(
        f'<table class="heat"><caption>{caption}</caption><thead><tr>{first}{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>",
        f"{measure.title} of {plural(size, 'task')} before training and after each task",
    )


def losses(run: Run) -> Markup:
    tables = [prompt_table(task, _original(run, task)) for task in _scored(run)]
    return Markup(_per_task(run, loss_figure) + "".join(tables))


def _scored(run: Run) -> list[Task]:
    return [task for task in run.folders if task and task.prompts and task.prompts.scorings]


def _per_task(run: Run, make: Callable[[Task, int | None], Markup]) -> Markup:
    """A chart for every task with scorings, and why others have none."""
    parts = [
        f"<div><h4>{task.number}. {task_name(task.name)}</h4>{make(task, _original(run, task))}</div>"
        for task in _scored(run)
    ]
    charts = f'<div class="charts">{"".join(parts)}</div>' if parts else ""
    return Markup(charts + _without_scorings(run, bool(parts)))


def _original(run: Run, task: Task) -> int | None:
    """Where the original stands among a task's prompts, by its text; None where it is not known."""
    choice = run.choices.get(task.name)
    return task.prompts.texts.index(choice.original) if choice and choice.original in task.prompts.texts else None


def _without_scorings(run: Run, others: bool) -> str:
    if not run.done:
        return paragraph("No task is finished yet, so there are no scorings to show.")
    if not others and run.policy == "original":
        return paragraph("This run has no scorings: policy original trains with the instruction as it is.")
    sentences = []
    for number, (name, task) in enumerate(zip(run.tasks, run.folders, strict=True), 1):
        if task is None:
            sentences.append(f"Task {number} ({task_name(name)}) is not finished.")
        elif task.prompts is None:
            sentences.append(f"{inline(task.folder)} has no scores.json.")
        elif not task.prompts.scorings:
            sentences.append(f"{inline(task.folder)}/scores.json holds no scorings.")
    return paragraph(*sentences, kind="note") if sentences else ""


def cost(run: Run) -> Markup:
    done = [task for task in run.folders if task]
    if not done:
        return paragraph("No task is finished yet, so nothing has been measured.")
    rows = []
    for task in done:
        train = task.train or {}
        times = (task.score_seconds(), train.get("seconds"), task.eval_seconds)
        tokens = (train.get("tokens"), task.tokens("dense_tokens"), task.tokens("computed_tokens"))
        rows.append(_cost_row(f"{task.number}. {task_name(task.name)}", *times, *tokens))
    parts = []
    if run.cost is None:
        parts.append(paragraph("There is no results.json yet, hence no total."))
    else:
        known = [run.cost.get(key) for key in ("score_seconds", "train_seconds", "eval_seconds")]
        tokens = [run.cost.get(key) for key in ("train_tokens", "score_dense_tokens", "score_computed_tokens")]
        rows.append(_cost_row("whole run", *known, *tokens))
        if None not in known and sum(known) > 0:
            names = ("scoring", "training", "evaluation")
            shares = [f"{n} {seconds(v)} s ({percent(v / sum(known))} %)" for n, v in zip(names, known, strict=True)]
            label = f"From left to right: {', '.join(shares)}"
            bar = f'<figure class="full">{share_bar(known, label)}<figcaption>{label}.</figcaption></figure>'
            parts.append(bar)
    head = (
        "task", "scoring, s", "training, s", "evaluation, s", "scoring / training, %", "training tokens",
        "dense tokens", "computed tokens", "dense / computed",
    )  # fmt: skip
    parts.append(table(head, rows, "Seconds and tokens", foot=run.cost is not None))
    parts.append(
        paragraph(
            "Dense tokens: what scoring every prompt with every example alone would take. Computed tokens: what was "
            "computed, shared beginnings once. The whole run's evaluation includes that before training.",
            kind="note",
        )
    )
    return Markup("".join(parts))


def _cost_row(name, scoring, training, evaluation, train_tokens, dense, computed) -> list[str]:
    share = percent(scoring / training) if scoring is not None and training else NONE
    ratio = fixed(dense / computed, 2) if dense is not None and computed else NONE
    times = [seconds(value) for value in (scoring, training, evaluation)]
    return [name, *times, share, whole(train_tokens), whole(dense), whole(computed), ratio]


def notes(run: Run) -> Markup:
    parts = []
    if run.warnings:
        parts.append(f"<h4>{plural(len(run.warnings), 'warning')}</h4>{_bullets(run.warnings)}")
    else:
        parts.append(paragraph("The run gave no warnings."))
    rows = []
    for task in run.folders:
        if task and task.rows is not None:
            counts = [whole(task.rows.get(key)) for key in ("train", "dev", "test")]
            told = _bullets(task.notes) if task.notes else "none"
            rows.append([f"{task.number}. {task_name(task.name)}", *counts, told])
    if rows:
        parts.append(table(("task", "train rows", "dev rows", "test rows", "notes"), rows, "Data of the tasks", (0, 4)))
    missing = [task.folder for task in run.folders if task and task.rows is None]
    if missing:
        parts.append(paragraph("No data.json in", ", ".join(inline(name) for name in missing) + ".", kind="note"))
    return Markup("".join(parts))


def _bullets(texts: list[str]) -> str:
    items = "".join(f"<li>{inline(text, 2000)}</li>" for text in texts[:MAX_NOTES])
    left = len(texts) - MAX_NOTES
    return f"<ul>{items}</ul>" + (f'<p class="note">{whole(left)} more are not shown.</p>' if left > 0 else "")


def settings(run: Run) -> Markup:
    """The configuration and versions, as they stand in run.json."""

    def rows(values: dict) -> list[list[str]]:
        shown = {key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in values.items()}
        return [[inline(key), f'<span class="wide">{inline(v, 2000)}</span>'] for key, v in sorted(shown.items())]

    parts = [
        table(("name", "value"), rows(values), caption, (0, 1)) if values else paragraph(f"{caption}: none recorded.")
        for values, caption in ((run.config, "Options"), (run.versions, "Versions"))
    ]
    return details("Options and versions of this run", "".join(parts))
