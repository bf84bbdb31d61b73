"""The page: head, summary, comparison, the runs in detail. The same runs give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

from .compare import Group, group_runs
from .comparison import answer, comparison
from .markup import Markup, attribute, details, inline, paragraph, plural, table, task_name
from .measures import MEASURES, METRICS
from .run_data import Run
from .run_sections import cards, sections
from .style import style_sheet

MAX_GROUPS = 12
# More rows than this are folded away.
MAX_OPEN_ROWS = 12
# Nothing is fetched, run, framed or sent; the style sheet is the page's own.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
LEAD = (
    "State-Adaptive Prompt Optimization (arXiv 2606.01967): which prompts were chosen, what came of it, what it cost."
)


def render(runs: Sequence[Run], detailed: Sequence[Run]) -> str:
    """The whole document. detailed: the runs with sections of their own, at least one; all of them are in `runs`."""
    single = detailed[0] if len(detailed) == 1 else None
    groups = group_runs(runs)
    if single:
        groups = [group for group in groups if any(single in arm.runs.values() for arm in group.arms)]
    title = _title(single) if single else f"SAPO report of {plural(len(runs), 'run')}"
    parts = [
        ("summary", "Summary", _summary(detailed, groups)),
        ("comparison", "Comparison with other runs", _comparison(runs, detailed, groups)),
    ]
    if single:
        parts += sections(single)
    else:
        parts += [(f"run{i}", f"Run {i}: {_title(run)}", _article(run, f"run{i}")) for i, run in enumerate(detailed, 1)]
    links = "".join(f'<li><a href="#{name}">{inline(heading)}</a></li>' for name, heading, _ in parts)
    body = "".join(_section(2, *part) for part in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{attribute(title)}</title>\n<style>{style_sheet()}</style>\n</head>\n<body>\n"
        f'<header><h1>{inline(title, 1500)}</h1><p class="lead">{LEAD}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main>{body}</main>\n'
        f"<footer>{_footer(runs)}</footer>\n</body>\n</html>\n"
    )


def _section(level: int, name: str, heading: str, content: str) -> str:
    head = f'<h{level} id="{name}-h">{inline(heading, 1500)}</h{level}>'
    return f'<section id="{name}" aria-labelledby="{name}-h">{head}{content}</section>\n'


def _title(run: Run) -> str:
    order = f", order {run.order}" if run.order else ""
    return f"{run.method}, policy {run.policy}{order}, seed {run.seed}"


def _heading(groups: Sequence[Group], group: Group) -> str:
    """A heading where there are several groups."""
    if len(groups) == 1:
        return ""
    order = f", order {inline(group.order)}" if group.order else ""
    return f"<h3>{inline(group.method)}{order}, {plural(len(group.tasks), 'task')}</h3>"


def _footer(runs: Sequence[Run]) -> Markup:
    dates = [run.finished or run.started for run in runs if run.finished or run.started]
    when = f"The latest of these runs is of {inline(max(dates))}." if dates else ""
    return paragraph("Written by <code>sapo report</code>; this file needs no other.", when)


def _summary(detailed: Sequence[Run], groups: Sequence[Group]) -> Markup:
    parts = []
    if len(detailed) == 1:
        parts += [_status(detailed[0]), cards(detailed[0])]
    for group in groups[:MAX_GROUPS]:
        arm = group.arm_of(detailed[0]) if len(detailed) == 1 else group.arms[0]
        parts += [_heading(groups, group), answer(group, arm)]
    if len(detailed) == 1:
        parts.append(_facts(detailed[0]))
    return Markup("".join(parts))


def _status(run: Run) -> str:
    if run.status == "done":
        return ""
    return paragraph(
        f"This run is not finished: {run.done} of {plural(len(run.tasks), 'task')} are done. What follows is what its "
        "folder holds so far.",
        kind="status",
    )


def _facts(run: Run) -> str:
    facts = {
        "Method": inline(run.method),
        "Prompt policy": inline(run.policy),
        "Order": inline(run.order) if run.order else "no name",
        "Tasks in order": ", ".join(f"{i}. {task_name(task)}" for i, task in enumerate(run.tasks, 1)),
        "Model": inline(run.model),
        "Seed": str(run.seed),
        "Started": inline(run.started) if run.started else "not recorded",
        "Finished": inline(run.finished) if run.finished else "not finished",
        "Folder": inline(run.name),
    }
    return f'<dl class="facts">{"".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts.items())}</dl>'


def _comparison(runs: Sequence[Run], detailed: Sequence[Run], groups: Sequence[Group]) -> Markup:
    single = detailed[0] if len(detailed) == 1 else None
    parts = []
    for group in groups[:MAX_GROUPS]:
        arm = group.arm_of(single) if single else group.arms[0]
        parts += [_heading(groups, group), comparison(group, arm)]
    if len(groups) > MAX_GROUPS:
        parts.append(paragraph(f"{len(groups) - MAX_GROUPS} more combinations of method and order are not shown."))
    apart = len(runs) - sum(len(arm.runs) for group in groups for arm in group.arms)
    if apart:
        told = f"{plural(apart, 'run')} given, of another method, order, model or data: not compared with this one."
        parts.append(paragraph(told, kind="note"))
    if len(runs) > 1:
        parts.append(_run_table(runs, detailed))
    return Markup("".join(parts))


def _run_table(runs: Sequence[Run], detailed: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        name = run.headline
        measure = MEASURES[name] if name else None
        figures = [measure.figure(m, run.figure(name, m)) if measure else "" for m in METRICS]
        state = "done" if run.status == "done" else f"running, {run.done} of {len(run.tasks)}"
        told = [inline(text) for text in (run.name, run.method, run.policy, run.order)]
        score = f"{measure.title}, {measure.unit}" if measure else "none yet"
        rows.append([*told, str(run.seed), state, score, *figures, "yes" if run in detailed else "no"])
    head = ("folder", "method", "policy", "order", "seed", "status", "score", *METRICS, "in detail")
    body = table(head, rows, "Runs of this report", (0, 1, 2, 3, 5, 6, 10))
    return details(f"The {len(runs)} runs of this report", body) if len(rows) > MAX_OPEN_ROWS else body


def _article(run: Run, name: str) -> Markup:
    """A run among several: its sections one level down."""
    body = "".join(_section(3, f"{name}-{key}", title, content) for key, title, content in sections(run))
    return Markup(_status(run) + cards(run) + _facts(run) + body)
