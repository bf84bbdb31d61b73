"""Bar charts as SVG text: the same rows give the same bytes, on any machine, so that a test can compare them.

No font is measured and no library draws, hence nothing moves between versions. Readable in light and dark.
"""

from __future__ import annotations

from html import escape

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

    line: a dashed vertical line at that value.
    """
    numbers = [value for _, values in groups for value in values if value is not None]
    room = (WIDTH - LABEL - VALUE) / (max([*numbers, line or 0.0]) or 1.0)
    height = TOP + sum(BAR * len(series) + GAP for _ in groups) + GAP
    parts = [f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", _text(8, 20, title, 'class="title"')]
    x, y = 8, TOP
    for kind, name in zip("abcd", series, strict=False):
        parts += [_box(x, 32, 12, 12, kind), _text(x + 17, 42, name)]
        x += 30 + 7 * len(name)
    for label, values in groups:
        parts.append(_text(LABEL - 8, y + BAR * len(series) / 2 + 4, label, 'text-anchor="end"'))
        for place, value in enumerate(values):
            if value is not None:
                parts.append(_box(LABEL, y + place * BAR, room * value, BAR - 2, "abcd"[place]))
                parts.append(_text(LABEL + room * value + 5, y + place * BAR + 10, f"{value:.2f}"))
        y += BAR * len(series) + GAP
    if line is not None:
        x = LABEL + room * line
        parts.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{y}" />')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" width="{WIDTH}"'
    return "\n".join([f'{head} height="{height}">', *(f"  {part}" for part in parts), "</svg>"]) + "\n"


def _box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" />'


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{" " + more if more else ""}>{escape(text)}</text>'
