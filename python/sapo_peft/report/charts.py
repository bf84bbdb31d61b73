"""Charts as inline SVG: points and lines over an axis, and one interval about 0.

Coordinates are about CSS pixels: a chart is 360 wide and is never drawn much smaller, so that 12 units stay legible.
What a colour says is said again by a dash, a shape or a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .text import MINUS, fixed, line, visible

WIDTH, HEIGHT = 360, 232
LEFT, RIGHT, TOP, BOTTOM = 50, 72, 26, 40
LABEL_GAP = 14
MAX_POINTS = 400

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """Points (x, y), None for a gap. kind: a class of the style sheet; name: at its right end; title: the tooltip.

    shape: "line", "dot" (a circle each) or "diamond".
    """

    points: Sequence[Point]
    kind: str
    name: str = ""
    title: str = ""
    shape: str = "line"


def plot(series: Sequence[Series], label: str, x_title: str, y_title: str) -> Markup:
    """All series over one pair of axes, the first one at the back; `label` says in words what is seen."""
    places = [point for one in series for point in one.points if point[1] is not None]
    if not places:
        return Markup("")
    x = _Scale([px for px, _ in places], LEFT + 8, WIDTH - RIGHT - 8, 0.0)
    y = _Scale([py for _, py in places], HEIGHT - BOTTOM, TOP, 0.06)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    ticks = y.ticks()
    for tick, shown in zip(ticks, _numbers(ticks), strict=True):
        parts.append(_line(LEFT, y(tick), right, y(tick), "grid"))
        parts.append(_text(LEFT - 7, y(tick) + 4, shown, "end"))
    parts.append(_line(LEFT, bottom, right, bottom, "axis"))
    whole = [tick for tick in x.ticks() if tick == round(tick)]
    parts += [_text(x(tick), bottom + 16, shown, "middle") for tick, shown in zip(whole, _numbers(whole), strict=True)]
    parts += [_text((LEFT + right) / 2, bottom + 33, x_title, "middle"), _text(4, 12, y_title)]
    for one in series:
        parts += _drawn(one, x, y)
    named = [(one, next((py for _, py in reversed(one.points) if py is not None), None)) for one in series if one.name]
    parts += _names(sorted((y(py), one.name, one.kind) for one, py in named if py is not None))
    return _svg(WIDTH, HEIGHT, label, parts)


def interval(mean: float, ends: tuple[float, float] | None, reach: float, kind: str, label: str) -> Markup:
    """A difference and its interval about 0, on an axis from -reach to reach; kind: "better", "worse" or "open"."""
    x = _Scale([-reach, reach], 6, 164, 0.0)
    parts = [_line(6, 11, 164, 11, "grid"), _line(x(0), 1, x(0), 21, "zero")]
    if ends:
        low, high = (min(max(end, -reach), reach) for end in ends)
        parts.append(_line(x(low), 11, x(high), 11, f"whisker {kind}"))
    parts.append(_circle(x(mean), 11, 4.5, f"dot {kind}"))
    return _svg(170, 22, label, parts)


def thinned(values: Sequence[Any], most: int = MAX_POINTS) -> list[Any]:
    """At most about so many of them, spread evenly, both ends among them."""
    return [*values[: -1 : max(1, math.ceil(len(values) / most))], *values[-1:]]


class _Scale:
    """Maps the range of `values`, widened by a share `pad` of it, to start..end."""

    def __init__(self, values: Sequence[float], start: float, end: float, pad: float):
        low, high = min(values), max(values)
        if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
            low, high, pad = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5), 0.0
        # Halves: the difference of two huge numbers overflows.
        extra = 2 * pad * (high / 2 - low / 2)
        self.low, self.high, self.start, self.end = low - extra, high + extra, start, end

    def __call__(self, value: float) -> float:
        share = (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside the range, at most about 5."""
        raw = self.high / 5 - self.low / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [tick * step for tick in range(first, last + 1)]


def _numbers(ticks: Sequence[float]) -> list[str]:
    """All of an axis with the same number of decimals."""
    digits = max((len(f"{tick:.6f}".rstrip("0").partition(".")[2]) for tick in ticks), default=0)
    big = any(abs(tick) >= 1e6 for tick in ticks)
    return [f"{tick:.2g}".replace("-", MINUS) if big else fixed(tick, digits) for tick in ticks]


def _drawn(one: Series, x: _Scale, y: _Scale) -> list[Markup]:
    title = Markup("<title>{}</title>").format(visible(line(one.title))) if one.title else Markup("")
    if one.shape != "line":
        return [_mark(one, x(px), y(py), title) for px, py in one.points if py is not None]
    parts, stretch = [], []
    for px, py in [*thinned(one.points), (0, None)]:
        if py is not None:
            stretch.append((x(px), y(py)))
        elif len(stretch) == 1:
            parts.append(_mark(one, *stretch[0], title))
        elif stretch:
            places = " ".join(f"{a:.1f},{b:.1f}" for a, b in stretch)
            parts.append(Markup('<polyline points="{}" class="line {}">{}</polyline>').format(places, one.kind, title))
        if py is None:
            stretch = []
    return parts


def _mark(one: Series, px: float, py: float, title: Markup) -> Markup:
    if one.shape == "diamond":
        path = f"M{px:.1f} {py - 6:.1f}l6 6l-6 6l-6 -6z"
        return Markup('<path d="{}" class="dot {}">{}</path>').format(path, one.kind, title)
    return _circle(px, py, 3 if one.kind == "faint" else 4.5, f"dot {one.kind}", title)


def _names(wanted: Sequence[tuple[float, str, str]]) -> list[Markup]:
    """Names at the right end of their lines, from top to bottom, pushed apart where they would touch."""
    placed, parts = TOP - LABEL_GAP, []
    for i, (py, name, kind) in enumerate(wanted):
        room = HEIGHT - BOTTOM - 5 - LABEL_GAP * (len(wanted) - 1 - i)
        placed = max(placed + LABEL_GAP, min(py, room))
        parts.append(_text(WIDTH - RIGHT - 3, placed + 4, line(name, 12), kind=kind))
    return parts


def _text(px: float, py: float, text: str, anchor: str = "start", kind: str = "") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(
        px, py, anchor, kind, visible(text)
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, kind)


def _circle(px: float, py: float, radius: float, kind: str, title: Markup | str = "") -> Markup:
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" class="{}">{}</circle>').format(px, py, radius, kind, title)


def _svg(width: int, height: int, label: str, parts: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, visible(line(label, 1000)), Markup("").join(parts)
    )
