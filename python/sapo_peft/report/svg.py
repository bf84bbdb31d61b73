"""Small charts as SVG text: lines over time, ranked dots, bars with a point for each run, and one interval.

Coordinates are user units that are about CSS pixels: a chart is 360 wide and is never drawn much smaller, so that 12
units stay legible. Texts are literals of this package or went through `markup.attribute`. What a colour says is said
again by a dash, a shape or a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .markup import Markup, attribute
from .measures import Measure

WIDTH = 360
HEIGHT = 244
LEFT, RIGHT, TOP, BOTTOM = 46, 72, 34, 40
LABEL_GAP = 14
# About how wide a letter of 12 units is; a switch is named where that leaves room, all stand in the text as well.
LETTER = 8.4
# More switches than this are short marks above the lines.
MAX_RULES = 12
_ROW = 26

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """One series: points (x, y) with None for a gap; kind is a class of the style sheet; title is its tooltip."""

    points: Sequence[Point]
    kind: str
    title: str
    label: str = ""


class Scale:
    """Maps low..high to start..end; a range without extent is widened first."""

    def __init__(self, low: float, high: float, start: float, end: float):
        if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
            pad = abs(low) * 0.1 or 0.5
            low, high = low - pad, high + pad
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 5, whole: bool = False) -> list[float]:
        """Round numbers inside the range, at most about `most`; whole: no fractions."""
        raw = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
        if whole:
            step = max(1.0, math.ceil(step))
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + i) * step for i in range(count)]


def _svg(width: float, height: float, label: str, parts: Iterable[str]) -> Markup:
    body = "".join(parts)
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{attribute(label, 1000)}">{body}</svg>'
    )


def _n(value: float) -> str:
    return f"{value:.1f}"


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{style}>{text}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" class="{kind}"/>'


def _title(text: str) -> str:
    return f"<title>{attribute(text)}</title>"


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "\u2212")


def _decimals(ticks: Sequence[float]) -> Callable[[float], str]:
    """All ticks of an axis with the same number of decimals."""
    texts = [f"{tick:.6f}".rstrip("0") for tick in ticks]
    digits = max((len(text.partition(".")[2]) for text in texts), default=0)
    return lambda value: f"{value:.{digits}f}".replace("-", "\u2212")


def _frame(x: Scale, y: Scale, x_ticks: Sequence[float], x_title: str, y_title: str) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    y_ticks = y.ticks()
    shown = _decimals(y_ticks)
    parts = []
    for tick in y_ticks:
        parts.append(_rule(LEFT, y(tick), right, y(tick), "gridline"))
        parts.append(_text(LEFT - 7, y(tick) + 4, shown(tick), "end"))
    parts.append(_rule(LEFT, bottom, right, bottom, "axis"))
    for tick in x_ticks:
        parts.append(_text(x(tick), bottom + 16, _number(tick), "middle"))
    parts.append(_text((LEFT + right) / 2, bottom + 33, x_title, "middle"))
    parts.append(_text(4, 11, y_title))
    return parts


def line_chart(
    lines: Sequence[Line],
    label: str,
    x_title: str,
    y_title: str,
    path: Sequence[Sequence[Point]] = (),
    switches: Sequence[tuple[float, str]] = (),
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """Series over time. path: stretches that are drawn heavily, each with a ring where it starts.

    switches: (x, text) of vertical marks. y_range: fixed ends of the axis, otherwise those of the data.
    """
    xs = [x for line in lines for x, _ in line.points]
    x = Scale(min(xs), max(xs), LEFT + 8, WIDTH - RIGHT - 8)
    y = _y_scale([value for line in lines for _, value in line.points if value is not None], y_range)
    only = sorted(set(xs))
    parts = _frame(x, y, only if len(only) <= 5 else x.ticks(5, whole=True), x_title, y_title)
    # Lines that say less are drawn first.
    for line in sorted(lines, key=lambda line: line.kind != "faint"):
        parts += _series(line, x, y)
    last = -math.inf
    foot = HEIGHT - BOTTOM if len(switches) <= MAX_RULES else TOP + 4
    for place, text in switches:
        parts.append(_rule(x(place), TOP - 2, x(place), foot, "switch"))
        if x(place) - LETTER * len(text) / 2 > last:
            parts.append(_text(x(place), TOP - 5, text, "middle", "strong"))
            last = x(place) + LETTER * len(text) / 2
    for stretch in path:
        parts += [_polyline(run, x, y, "path") for run in _runs(stretch)]
    size = 4 if len(switches) <= MAX_RULES else 2.5
    for stretch in path:
        if stretch and stretch[0][1] is not None:
            place = f'cx="{_n(x(stretch[0][0]))}" cy="{_n(y(stretch[0][1]))}"'
            parts.append(f'<circle {place} r="{size}" class="ring"/>')
    ends = [(line, next((v for _, v in reversed(line.points) if v is not None), None)) for line in lines if line.label]
    parts += _labels([(y(v), line.label, line.kind) for line, v in ends if v is not None])
    return _svg(WIDTH, HEIGHT, label, parts)


def span_chart(rows: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], label: str, x_title: str) -> Markup:
    """When each of a few things was in use: (name, kind of the bar, stretches from..to) from top to bottom."""
    ends = [end for _, _, spans in rows for span in spans for end in span]
    left, right = 80, WIDTH - 12
    x = Scale(min(ends), max(ends), left, right)
    height = 6 + _ROW * len(rows) + BOTTOM
    bottom = height - BOTTOM
    parts = []
    for tick in x.ticks(5, whole=True):
        parts.append(_rule(x(tick), 4, x(tick), bottom, "gridline"))
        parts.append(_text(x(tick), bottom + 16, _number(tick), "middle"))
    parts.append(_text((left + right) / 2, bottom + 33, x_title, "middle"))
    for i, (name, kind, spans) in enumerate(rows):
        middle = 6 + _ROW * i + _ROW / 2
        parts.append(_text(left - 10, middle + 4, attribute(name, 12), "end", "strong"))
        for start, end in spans:
            place, title = f'x="{_n(x(start))}" y="{_n(middle - 6)}"', _title(f"{name}: {start:.0f} to {end:.0f}")
            width = max(x(end) - x(start) - 1, 3)
            parts.append(f'<rect {place} width="{_n(width)}" height="12" class="{kind}">{title}</rect>')
    return _svg(WIDTH, height, label, parts)


def _y_scale(values: Sequence[float], fixed: tuple[float, float] | None) -> Scale:
    low, high = fixed or (min(values, default=0.0), max(values, default=1.0))
    pad = 0.0 if fixed else 0.06 * (high - low)
    return Scale(low - pad, high + pad, HEIGHT - BOTTOM - 2, TOP + 4)


def _runs(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """Stretches without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _polyline(run: Sequence[tuple[float, float]], x: Scale, y: Scale, kind: str, title: str = "") -> str:
    if len(run) == 1:
        dot = {"faint": "dot", "original": "dot-other"}.get(kind, "dot-accent")
        (px, py), size = run[0], 2.5 if kind == "faint" else 3
        return f'<circle cx="{_n(x(px))}" cy="{_n(y(py))}" r="{size}" class="{dot}">{title}</circle>'
    places = " ".join(f"{_n(x(px))},{_n(y(py))}" for px, py in run)
    return f'<polyline points="{places}" class="{kind}">{title}</polyline>'


def _series(line: Line, x: Scale, y: Scale) -> list[str]:
    return [_polyline(run, x, y, line.kind, _title(line.title)) for run in _runs(line.points)]


def _labels(wanted: Sequence[tuple[float, str, str]]) -> list[str]:
    """Names at the right end of their lines, pushed apart where they would touch."""
    placed, parts = TOP - LABEL_GAP, []
    room = HEIGHT - BOTTOM - 5 - LABEL_GAP * (len(wanted) - 1)
    for i, (y, text, kind) in enumerate(sorted(wanted)):
        placed = max(placed + LABEL_GAP, min(y, room + LABEL_GAP * i))
        parts.append(
            _text(WIDTH - RIGHT - 3, placed + 4, attribute(text), kind={"original": "t-other"}.get(kind, "t-accent"))
        )
    return parts


def rank_chart(
    values: Sequence[tuple[int, float]], chosen: int, original: int | None, label: str, y_title: str
) -> Markup:
    """(prompt, value) by rank as dots, for one scoring; the chosen prompt and the original carry their names."""
    x = Scale(1, max(len(values), 2), LEFT + 8, WIDTH - RIGHT - 8)
    y = _y_scale([value for _, value in values], None)
    parts = _frame(x, y, [tick for tick in x.ticks(5, whole=True) if tick >= 1], "rank among the prompts", y_title)
    marked = []
    for rank, (prompt, value) in enumerate(values, 1):
        px, py, title = x(rank), y(value), _title(f"prompt {prompt}: {value:.4f}")
        if prompt not in (chosen, original):
            parts.append(f'<circle cx="{_n(px)}" cy="{_n(py)}" r="3" class="dot">{title}</circle>')
            continue
        # The dots rise to the right, so a line to the right edge meets none of them.
        kind = "path-lead" if prompt == chosen else "original-lead"
        parts.append(_rule(px, py, WIDTH - RIGHT - 7, py, kind))
        if prompt == chosen:
            parts.append(f'<circle cx="{_n(px)}" cy="{_n(py)}" r="6" class="dot-accent">{title}</circle>')
            marked.append((py, f"chosen: {prompt}", "used"))
        else:
            parts.append(f'<path d="M{_n(px)} {_n(py - 6)}l6 6l-6 6l-6 -6z" class="dot-other">{title}</path>')
            marked.append((py, "original", "original"))
    return _svg(WIDTH, HEIGHT, label, [*parts, *_labels(marked)])


@dataclass(frozen=True)
class Bar:
    """A mean with the values of the runs behind it, as shares; None where there is nothing to draw."""

    label: str
    value: float | None
    runs: Sequence[float]
    strong: bool = False


def bar_chart(bars: Sequence[Bar], measure: Measure, metric: str, label: str) -> Markup:
    """Horizontal bars from 0 in the unit of the measure, one dot a run; where AP has a largest value, up to that."""
    values = [v for bar in bars for v in (*bar.runs, bar.value) if v is not None]
    low, high = min([0.0, *values]), max([0.0, *values])
    if metric == "AP" and measure.top is not None:
        high = measure.top
    if high - low < 0.01:
        high = low + 0.01
    left, right = 104, WIDTH - 56
    x = Scale(low * measure.scale, high * measure.scale, left, right)
    height = 6 + _ROW * len(bars) + 24
    parts = []
    ticks = x.ticks(4)
    shown = _decimals(ticks)
    for tick in ticks:
        parts.append(_rule(x(tick), 4, x(tick), height - 22, "gridline"))
        parts.append(_text(x(tick), height - 6, shown(tick), "middle"))
    for i, bar in enumerate(bars):
        middle = 6 + _ROW * i + _ROW / 2
        parts.append(_text(left - 12, middle + 4, attribute(bar.label, 14), "end", "strong" if bar.strong else ""))
        if bar.value is None:
            parts.append(_text(left + 6, middle + 4, "not there"))
            continue
        start, end = sorted((x(0), x(bar.value * measure.scale)))
        kind, told = "bar-accent" if bar.strong else "bar", measure.figure(metric, bar.value)
        parts.append(
            f'<rect x="{_n(start)}" y="{_n(middle - 7)}" width="{_n(max(end - start, 1))}" height="14" class="{kind}">'
            f"{_title(f'{bar.label}: {told}')}</rect>"
        )
        if len(bar.runs) > 1:
            places = [x(value * measure.scale) for value in bar.runs]
            parts += [f'<circle cx="{_n(place)}" cy="{_n(middle)}" r="3.2" class="ring"/>' for place in places]
        parts.append(_text(WIDTH, middle + 4, told, "end", "strong"))
    parts.append(_rule(x(0), 2, x(0), height - 22, "zero"))
    return _svg(WIDTH, height, label, parts)


def interval_mark(mean: float, interval: tuple[float, float] | None, reach: float, measure: Measure) -> Markup:
    """A difference and its interval about 0, on an axis from -reach to reach."""
    x = Scale(-reach, reach, 6, 164)
    parts = [_rule(x(0), 1, x(0), 21, "zero"), _rule(6, 11, 164, 11, "gridline")]
    label = f"{measure.change(mean)} {measure.change_unit}"
    if interval:
        label += f", interval {measure.interval(interval)}"
        parts.append(_rule(x(interval[0]), 11, x(interval[1]), 11, "whisker"))
        parts += [_rule(x(end), 6, x(end), 16, "whisker") for end in interval]
    parts.append(f'<circle cx="{_n(x(mean))}" cy="11" r="4.5" class="dot-accent"/>')
    return _svg(170, 22, label, parts)


def share_bar(values: Sequence[float], label: str) -> Markup:
    """Parts of a whole from left to right."""
    total, start, parts = sum(values) or 1.0, 0.0, []
    for i, value in enumerate(values):
        width = 720 * value / total
        if width > 0:
            parts.append(
                f'<rect x="{_n(start)}" y="0" width="{_n(max(width - 1.5, 0.5))}" height="18" class="seg{i}"/>'
            )
        start += width
    return _svg(720, 18, label, parts)
