"""The part of the page that sets runs side by side: bars, paired differences, and what they show in words."""

from __future__ import annotations

from .compare import FEW, Arm, Difference, Group, difference, differing
from .markup import Markup, details, figure, inline, paragraph, plural, table
from .measures import MEASURES, METRICS
from .svg import Bar, bar_chart, interval_mark

# An arm and how another one differs from it, by measure and metric.
Pair = tuple[Arm, dict[tuple[str, str], Difference]]
# More rows than this are folded away.
MAX_OPEN_ROWS = 30


def pairs(group: Group, arm: Arm) -> list[Pair]:
    """The other arms of the group that share finished seeds with `arm`, and the differences by measure and metric."""
    found = []
    for other in group.arms:
        if other is arm:
            continue
        by_metric = {(name, m): difference(arm, other, name, m) for name in group.measures for m in METRICS}
        known = {key: value for key, value in by_metric.items() if value is not None}
        if known:
            found.append((other, known))
    return found


def answer(group: Group, arm: Arm) -> Markup:
    """Did choosing the prompt help, against each of the other arms, by the headline measure."""
    against = pairs(group, arm)
    if not against:
        return paragraph(
            "<b>Did choosing the prompt help?</b> This cannot be said from the runs given: none of another policy with "
            "the same method, order, tasks, data, model and seed is finished. Give such runs as further folders. One "
            "run alone has no interval either.",
            kind="verdict",
        )
    name = group.measures[0]
    measure = MEASURES[name]
    better = ", lower is better" if measure.lower_is_better else ""
    lines = []
    for other, by_metric in against:
        known = {metric: by_metric[(name, metric)] for metric in METRICS if (name, metric) in by_metric}
        if known:
            told = "; ".join(f"{metric} {_told(name, value)}" for metric, value in known.items())
            count = max(len(value.values) for value in known.values())
            lead = f"<b>{inline(arm.label)} against {inline(other.label)}</b>, {plural(count, 'pair')}: {told}."
            lines.append(f"<li>{lead} {_conclusion(known, count)}</li>")
    question = (
        "Did choosing the prompt help?"
        if arm.policy == "sapo"
        else f"Policy {inline(arm.policy)} does not choose by the lowest loss; this is how it does beside the others."
    )
    head = (
        f"<b>{question}</b> {measure.title} ({measure.change_unit}{better}), differences of runs with the same seed, "
        "with 95 % intervals:"
    )
    return Markup(f'<div class="verdict"><p>{head}</p><ul>{"".join(lines)}</ul></div>')


def _told(name: str, value: Difference) -> str:
    measure = MEASURES[name]
    return measure.change(value.mean) + (f" ({measure.interval(value.interval)})" if value.interval else "")


def _conclusion(known: dict[str, Difference], count: int) -> str:
    if count < 2:
        return "One pair has no interval: this does not tell an effect from chance."
    words = {"higher": "Higher", "lower": "Lower", "open": "No difference shown"}
    parts = []
    for verdict, word in words.items():
        metrics = [metric for metric, value in known.items() if value.verdict == verdict]
        if metrics:
            parts.append(f"{word}: {', '.join(metrics)}.")
    few = f"Intervals of {count} pairs are usually too narrow; take this as a hint." if count < FEW else ""
    return " ".join([*parts, few]).rstrip()


def comparison(group: Group, arm: Arm) -> Markup:
    """Bars of every arm, then the table of differences to `arm`."""
    if not group.measures:
        return paragraph("No run has results yet, so there is nothing to compare.")
    bars = []
    for name in group.measures:
        for metric in METRICS:
            measure = MEASURES[name]
            if not any(other.values(name, metric) for other in group.arms):
                continue
            unit = measure.unit if metric == "AP" else measure.change_unit
            caption = f"<b>{measure.title} {metric}</b>, {unit}: {measure.meaning(metric)}."
            bars.append(figure(_bars(group, arm, name, metric), caption))
    unfinished = sum(run.status != "done" for other in group.arms for run in other.runs.values())
    notes = []
    if any(len(other.runs) > 1 for other in group.arms):
        notes.append("A bar is the mean over the finished runs of a policy, a ring is one run.")
    if unfinished:
        notes.append(f"{plural(unfinished, 'run')} not finished: not compared, because AP, BWT and FWT need all tasks.")
    if not bars:
        notes.append("No AP, BWT or FWT is known yet.")
    content = f'<div class="charts">{"".join(bars)}</div>' if bars else ""
    return Markup(content + (paragraph(*notes, kind="note") if notes else "") + _differences(group, arm))


def _bars(group: Group, arm: Arm, name: str, metric: str) -> Markup:
    measure, bars = MEASURES[name], []
    for other in group.arms:
        values = list(other.values(name, metric).values())
        bars.append(Bar(other.label, sum(values) / len(values) if values else None, values, other is arm))
    told = ", ".join(f"{bar.label} {measure.figure(metric, bar.value)}" for bar in bars)
    return bar_chart(bars, measure, metric, f"{measure.title} {metric} by policy: {told}")


def _differences(group: Group, arm: Arm) -> str:
    against = pairs(group, arm)
    if not against:
        return paragraph("There is no pair of finished runs, hence no difference and no interval.")
    rows = []
    for name in group.measures:
        measure = MEASURES[name]
        for metric in METRICS:
            found = [(other, by_metric[(name, metric)]) for other, by_metric in against if (name, metric) in by_metric]
            reach = max((abs(v) for _, d in found for v in (d.mean, *(d.interval or ()))), default=0.0) or 0.01
            for other, value in found:
                mark = interval_mark(value.mean, value.interval, reach * 1.05, measure)
                shown = [measure.change(value.mean), measure.interval(value.interval), str(len(value.values)), mark]
                rows.append([f"{measure.title} {metric}", inline(other.label), *shown])
    units = {MEASURES[name].change_unit for name in group.measures}
    unit = "percentage points" if units == {"points"} else "percentage points, and the loss in nats per token"
    caption = f"{inline(arm.label)} less the other policy, {unit}, paired by seed"
    head = ("score", "against", "difference", "95 % interval", "pairs", "about 0 (one width a score)")
    body = table(head, rows, caption, (0, 1))
    parts = [
        details(f"{plural(len(rows), 'difference')} in a table", body) if len(rows) > MAX_OPEN_ROWS else body,
        paragraph(
            "Percentile bootstrap intervals of the mean difference, the pairs resampled 10,000 times. They are not "
            "corrected for looking at several scores and policies at once. A single pair has none.",
            kind="note",
        ),
    ]
    apart: dict[str, list[str]] = {}
    for other, _ in against:
        keys = differing(arm.config, other.config)
        told = "; ".join(f"{key}: {arm.config.get(key, 'none')} and {other.config.get(key, 'none')}" for key in keys)
        apart.setdefault(told, []).append(other.label)
    for told, labels in apart.items():
        if told:
            lead = f"Besides the policy, {inline(arm.label)} and {inline(', '.join(labels))} differ in"
            parts.append(paragraph(lead, f"{inline(told, 2000)}.", kind="status"))
    return "".join(parts)
