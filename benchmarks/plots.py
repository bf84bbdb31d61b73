"""Bar charts as SVG text: the same rows give the same bytes, on any machine, so that a test can compare them.

No font is measured and no library draws, hence nothing moves between versions. Readable in light and dark.
"""

from __future__ import annotations

from xml.etree import ElementTree

WIDTH, LABEL, VALUE, BAR, GAP, TOP = 760, 190, 60, 14, 10, 62
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f; }
.title { font-size: 14px; font-weight: 600; }
.a { fill: #2f6fb2; } .b { fill: #d08a1d; } .c { fill: #5b8f47; } .d { fill: #8d5fa8; }
.line { stroke: #8a9099; stroke-dasharray: 3 3; }
@media (prefers-color-scheme: dark) {
  text { fill: #d7dde4; }
  .a { fill: #6aa5e3; } .b { fill: #e8b04f; } .c { fill: #8cc277; } .d { fill: #c096dd; }
}
"""


def bars(title: str, series: list[str], groups: list[tuple[str, list[float | None]]], line: float | None = None) -> str:
    """Horizontal bars: a group for each (label, one value for each of at most four series; None is left out).

    line: a dashed vertical line at that value. Values must not be negative.
    """
    if not groups or not 1 <= len(series) <= 4 or any(len(values) != len(series) for _, values in groups):
        raise ValueError("bars: expected at least one group, one to four series and a value of each in every group")
    numbers = [value for _, values in groups for value in values if value is not None]
    if any(not 0 <= value < float("inf") for value in numbers):
        raise ValueError("bars: expected finite values of at least 0")
    most = max([*numbers, line or 0.0]) or 1.0
    room = WIDTH - LABEL - VALUE
    height = TOP + sum(BAR * len(series) + GAP for _ in groups) + GAP
    given = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {height}", "role": "img"}
    root = ElementTree.Element("svg", given | {"width": str(WIDTH), "height": str(height)})
    ElementTree.SubElement(root, "title").text = title
    ElementTree.SubElement(root, "style").text = STYLE
    _text(root, 8, 20, title, "title")
    at = 8
    for place, name in enumerate(series):
        _box(root, at, 32, 12, 12, "abcd"[place])
        _text(root, at + 17, 42, name)
        at += 30 + 7 * len(name)
    y = TOP
    for label, values in groups:
        _text(root, LABEL - 8, y + BAR * len(series) / 2 + 4, label, anchor="end")
        for place, value in enumerate(values):
            if value is not None:
                _box(root, LABEL, y + place * BAR, room * value / most, BAR - 2, "abcd"[place])
                _text(root, LABEL + room * value / most + 5, y + place * BAR + 10, f"{value:.2f}")
        y += BAR * len(series) + GAP
    if line is not None:
        x = f"{LABEL + room * line / most:.1f}"
        ElementTree.SubElement(root, "line", {"class": "line", "x1": x, "x2": x, "y1": str(TOP - 6), "y2": str(y)})
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _box(root, x: float, y: float, width: float, height: float, kind: str) -> None:
    ElementTree.SubElement(
        root,
        "rect",
        {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"},
    )


def _text(root, x: float, y: float, text: str, kind: str | None = None, anchor: str | None = None) -> None:
    given = {"x": f"{x:.1f}", "y": f"{y:.1f}"}
    given |= {"class": kind} if kind else {}
    given |= {"text-anchor": anchor} if anchor else {}
    ElementTree.SubElement(root, "text", given).text = text
