"""Charts as inline SVG: points and lines over two axes.

Coordinates are about CSS pixels: a chart is 360 wide and is never drawn much smaller, so that 12 units stay legible.
Whatever a colour shows, a dash, a shape or a word shows too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .text import MINUS, fixed, line, visible

WIDTH, HEIGHT = 360, 232
LEFT, RIGHT, TOP, BOTTOM = 50, WIDTH - 72, 26, HEIGHT - 40
LABEL_GAP = 14
MAX_POINTS = 400

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """Points (x, y), None for a gap, as a line or as `dots`.

    kind: a class of the style sheet; name: at its right end; title: the tooltip.
    """

    points: Sequence[Point]
    kind: str
    name: str = ""
    title: str = ""
    dots: bool = False


def plot(series: Sequence[Series], label: str, x_title: str, y_title: str) -> Markup:
    """All series over one pair of axes, the first one at the back; `label` says in words what is seen."""
    places = [point for one in series for point in one.points if point[1] is not None]
    if not places:
        return Markup("")
    x = _Scale([px for px, _ in places], LEFT + 8, RIGHT - 8, 0.0)
    y = _Scale([py for _, py in places], BOTTOM, TOP, 0.06)
    parts = []
    for tick, shown in _numbered(y.ticks()):
        parts += [_line(LEFT, y(tick), RIGHT, y(tick), "grid"), _text(LEFT - 7, y(tick) + 4, shown, "end")]
    parts.append(_line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"))
    for tick, shown in _numbered([tick for tick in x.ticks() if tick == round(tick)]):
        parts.append(_text(x(tick), BOTTOM + 16, shown, "middle"))
    parts += [_text((LEFT + RIGHT) / 2, BOTTOM + 33, x_title, "middle"), _text(4, 12, y_title)]
    parts += [part for one in series for part in _drawn(one, x, y)]
    ends = [(one, next((py for _, py in reversed(one.points) if py is not None), None)) for one in series if one.name]
    parts += _names(sorted((y(py), one.name, one.kind) for one, py in ends if py is not None))
    told = visible(line(label, 1000))
    size = f"0 0 {WIDTH} {HEIGHT}"
    return _element("svg", Markup("").join(parts), viewBox=size, role="img", aria_label=told)


def thinned(values: Sequence[Any], most: int = MAX_POINTS) -> list[Any]:
    """At most about so many of them, spread evenly, both ends among them."""
    return [*values[: -1 : max(1, math.ceil(len(values) / most))], *values[-1:]]


class _Scale:
    """Maps the range of `values`, widened by a share `pad` of it, to start..end."""

    def __init__(self, values: Sequence[float], start: float, end: float, pad: float):
        low, high = min(values), max(values)
        if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
            low, high, pad = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5), 0.0
        extra = pad * (high - low)
        self.low, self.high, self.start, self.end = low - extra, high + extra, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside the range, at most about 5."""
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [tick * step for tick in range(first, last + 1)]


def _numbered(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Each with its text, all with the same number of decimals."""
    digits = max((len(f"{tick:.6f}".rstrip("0").partition(".")[2]) for tick in ticks), default=0)
    big = any(abs(tick) >= 1e6 for tick in ticks)
    return [(tick, f"{tick:.2g}".replace("-", MINUS) if big else fixed(tick, digits)) for tick in ticks]


def _drawn(one: Series, x: _Scale, y: _Scale) -> list[Markup]:
    title = _element("title", visible(line(one.title))) if one.title else ""
    if one.dots:
        return [_mark(one, x(px), y(py), title) for px, py in one.points if py is not None]
    parts, stretch = [], []
    for px, py in [*thinned(one.points), (0, None)]:
        if py is not None:
            stretch.append((x(px), y(py)))
            continue
        if len(stretch) > 1:
            places = " ".join(f"{a:.1f},{b:.1f}" for a, b in stretch)
            parts.append(_element("polyline", title, points=places, class_=f"line {one.kind}"))
        parts += [_mark(one, *stretch[0], title)] if len(stretch) == 1 else []
        stretch = []
    return parts


def _mark(one: Series, px: float, py: float, title: Markup | str) -> Markup:
    return _element("circle", title, cx=px, cy=py, r=3 if one.kind == "faint" else 4.5, class_=f"dot {one.kind}")


def _names(wanted: Sequence[tuple[float, str, str]]) -> list[Markup]:
    """Names at the right end of their lines, from top to bottom, pushed apart where they would touch."""
    placed, parts = TOP - LABEL_GAP, []
    for i, (py, name, kind) in enumerate(wanted):
        room = BOTTOM - 5 - LABEL_GAP * (len(wanted) - 1 - i)
        placed = max(placed + LABEL_GAP, min(py, room))
        parts.append(_text(RIGHT - 3, placed + 4, line(name, 12), kind=kind))
    return parts


def _text(px: float, py: float, text: str, anchor: str = "start", kind: str = "") -> Markup:
    return _element("text", visible(text), x=px, y=py, text_anchor=anchor, class_=kind)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return _element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _element(tag: str, body: Markup | str = "", **attributes: Any) -> Markup:
    """An element; body and attributes are escaped unless they are markup, numbers get one decimal."""
    told = Markup("")
    for name, value in attributes.items():
        shown = f"{value:.1f}" if isinstance(value, float) else value
        told += Markup(' %s="%s"') % (name.rstrip("_").replace("_", "-"), shown)
    return Markup("<%s%s>%s</%s>") % (tag, told, body, tag)
