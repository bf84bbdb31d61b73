"""Numbers and outside text as the page shows them. Escaping itself is jinja's and markupsafe's."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Any

from markupsafe import Markup, escape

from ..sequence.schema import MEASURES
from ..terminal import plain

# Prompts are shown whole up to here; a longer one is no instruction any more.
MAX_TEXT = 20_000
MAX_LINE = 200
# More words are not compared: the time grows with their square.
MAX_WORDS = 500
MINUS, NONE = "\u2212", "\u2013"


def visible(value: Any) -> Any:
    """Text with characters that do not print or that reorder a line as escapes; line ends and tabs stay.

    Every expression of a template goes through this before it is escaped.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"[^\n\t]+", lambda match: plain(match[0]), value)


def line(text: str, limit: int = MAX_LINE) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text[: 4 * limit].split()) + (" " if len(text) > 4 * limit else "")
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def name(text: str) -> Markup:
    """A task's name, which may be broken behind an underscore."""
    return Markup(escape(visible(line(text))).replace("_", Markup("_<wbr>")))


def word_diff(one: str, other: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in pieces (text, whether it is missing from the other one), word by word."""
    one, other = (
        text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}\u2026 ({whole(len(text) - MAX_TEXT)} more characters)"
        for text in (one, other)
    )
    words = [re.findall(r"\S+\s*|\s+", text) for text in (one, other)]
    if max(map(len, words)) > MAX_WORDS:
        return [(one, False)], [(other, False)]
    bare = [[word.strip() for word in text] for text in words]
    pieces: tuple[list, list] = [], []
    for kind, a, b, c, d in SequenceMatcher(None, *bare, autojunk=False).get_opcodes():
        for found, text in zip(pieces, (words[0][a:b], words[1][c:d]), strict=True):
            if text:
                found.append(("".join(text), kind != "equal"))
    return pieces


def fixed(value: float | None, digits: int = 1) -> str:
    if value is None:
        return NONE
    shown = f"{value:.{digits}f}" if abs(value) < 1e9 else f"{value:.3g}"
    # "-0.0" is noise.
    return (shown if float(shown) else shown.lstrip("-")).replace("-", MINUS)


def signed(value: float | None, digits: int = 1) -> str:
    shown = fixed(value, digits)
    return f"+{shown}" if value is not None and value > 0 and float(shown) else shown


def percent(value: float | None) -> str:
    """A share as a percentage without its sign, so that columns line up."""
    return fixed(None if value is None else 100 * value)


def whole(value: float) -> str:
    return f"{round(value):,}"


def seconds(value: float) -> str:
    return whole(value) if value >= 1000 else fixed(value, 1 if value >= 10 else 2)


def plural(count: int, noun: str) -> str:
    return f"{whole(count)} {noun}{'' if count == 1 else 's'}"


def level(value: float | None, measure: str) -> str:
    """A score without its unit, so that columns line up."""
    return _scaled(fixed, value, measure)


def change(value: float | None, measure: str) -> str:
    """A difference of two scores, with its sign."""
    return _scaled(signed, value, measure)


def figure(value: float | None, measure: str, metric: str) -> str:
    """AP is a level; BWT and FWT are changes."""
    return (level if metric == "AP" else change)(value, measure)


def unit(measure: str, metric: str) -> str:
    return "points" if MEASURES[measure].top and metric != "AP" else MEASURES[measure].unit


def _scaled(shown, value: float | None, measure: str) -> str:
    share = MEASURES[measure].top is not None
    return shown(100 * value if share and value is not None else value, 1 if share else 3)
