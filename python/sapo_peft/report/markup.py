"""HTML from outside text and numbers. Nothing reaches the page but through these functions or as a literal.

Outside text is escaped, kept in its own direction, and bounded; characters that cannot be seen or that reorder a line
are shown as their escapes.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from ..terminal import plain

# Prompts are shown whole up to here; a longer one is no instruction any more.
MAX_BLOCK = 20_000
MAX_INLINE = 200
MINUS = "\u2212"
NONE = "\u2013"


class Markup(str):
    """Text that is HTML already."""


def escape(text: str) -> Markup:
    """`text` as HTML, with characters that do not print as marked escapes; line ends and tabs stay."""
    parts, run = [], []
    for character in text:
        shown = character if character in "\n\t" else plain(character)
        if shown == character:
            run.append(character)
            continue
        parts += [html.escape("".join(run)), f'<span class="esc">{html.escape(shown)}</span>']
        run = []
    return Markup("".join([*parts, html.escape("".join(run))]))


def attribute(text: str, limit: int = MAX_INLINE) -> Markup:
    """One line of `text` for a double-quoted attribute or an SVG text."""
    return Markup(html.escape(plain(_cut(" ".join(text.split()), limit))))


def inline(text: str, limit: int = MAX_INLINE) -> Markup:
    """One line of outside text within a sentence or a cell."""
    return Markup(f"<bdi>{escape(_cut(' '.join(text.split()), limit))}</bdi>")


def block(text: str, label: str) -> Markup:
    """A text in full, with its line ends, in a box that scrolls when it is long; `label` names it for readers."""
    left = len(text) - MAX_BLOCK
    rest = f'<p class="note">{whole(left)} further characters are not shown.</p>' if left > 0 else ""
    body = escape(text[:MAX_BLOCK]) if text else Markup('<span class="esc">empty</span>')
    box = f'<div class="prompt" dir="auto" tabindex="0" role="region" aria-label="{attribute(label)}">{body}</div>'
    return Markup(box + rest)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def paragraph(*sentences: str, kind: str = "") -> Markup:
    """A paragraph of sentences that are markup already or plain literals of this package."""
    start = f'<p class="{kind}">' if kind else "<p>"
    return Markup(f"{start}{' '.join(sentence for sentence in sentences if sentence)}</p>")


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str,
    text_columns: Iterable[int] = (0,),
    foot: bool = False,
) -> Markup:
    """A table that scrolls inside itself. Cells are markup; those outside `text_columns` are numbers, to the right.

    The first cell of a row is its heading. foot: the last row is a sum.
    """
    left = set(text_columns)
    rows = list(rows)

    def cell(tag: str, column: int, body: str, scope: str = "") -> str:
        kind = ' class="text"' if column in left else ""
        return f"<{tag}{scope}{kind}>{body}</{tag}>"

    lines = []
    for number, row in enumerate(rows):
        first = cell("th", 0, row[0], ' scope="row"')
        rest = "".join(cell("td", column, body) for column, body in enumerate(row[1:], 1))
        total = ' class="total"' if foot and number == len(rows) - 1 else ""
        lines.append(f"<tr{total}>{first}{rest}</tr>")
    top = "".join(cell("th", column, title, ' scope="col"') for column, title in enumerate(head))
    return scroll(
        f"<table><caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
        caption,
    )


def scroll(content: str, label: str) -> Markup:
    """A box that scrolls sideways; it can be reached with the keyboard, hence it has a name (plain text or markup)."""
    name = html.escape(html.unescape(_without_tags(label)))
    return Markup(f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{content}</div>')


def _without_tags(markup: str) -> str:
    """The text of markup made here; quotes stay as entities, so that "<" is always a tag."""
    parts = [part.partition(">")[2] if i else part for i, part in enumerate(markup.split("<"))]
    return "".join(parts)


def details(summary: str, content: str) -> Markup:
    return Markup(f"<details><summary>{summary}</summary>{content}</details>")


def figure(svg: str, caption: str) -> Markup:
    return Markup(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")


def task_name(text: str) -> Markup:
    """A task's name, which may be broken behind an underscore."""
    return Markup(inline(text).replace("_", "_<wbr>"))


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage without its sign, so that columns line up."""
    return fixed(None if value is None else 100 * value, digits)


def fixed(value: float | None, digits: int) -> str:
    if value is None:
        return NONE
    text = f"{value:.{digits}f}"
    # "-0.0" is noise.
    text = text.lstrip("-") if not float(text) else text
    return text.replace("-", MINUS)


def signed(value: float | None, digits: int) -> str:
    if value is None:
        return NONE
    text = fixed(value, digits)
    return text if text.startswith(MINUS) or not float(text) else f"+{text}"


def whole(value: float | None) -> str:
    """A count with thin spaces between thousands."""
    return NONE if value is None else f"{round(value):,}".replace(",", "\u202f")


def seconds(value: float | None) -> str:
    return NONE if value is None else whole(value) if value >= 1000 else fixed(value, 1 if value >= 10 else 2)


def plural(count: int, noun: str) -> str:
    return f"{whole(count)} {noun}{'' if count == 1 else 's'}"
