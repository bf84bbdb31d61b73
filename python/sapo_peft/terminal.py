"""Showing outside text on a terminal: it may not move the cursor, change colours or reverse the line."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

# Help of the option --model, of several commands.
MODEL_HELP = (
    "folder or hub name of a causal LM, a .gguf file, 'tiny' (random weights, the default), 'tiny-base' (a trained one "
    "of a million parameters that ships with the package), 'smollm2' or 'gemma3-270m' (if their packages are installed)"
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def plain(text: str) -> str:
    """`text` on one line, with control, format, bidirectional, private and unpaired characters as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if _shown(character) else _escape(character) for character in text)


def _shown(character: str) -> bool:
    # C* are the control, format, surrogate, private and unassigned characters; Z other than space are line,
    # paragraph and look-alike spaces.
    category = unicodedata.category(character)
    return category[0] not in "CZ" or character in " \u3000"


def _escape(character: str) -> str:
    code = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def width_of(text: str) -> int:
    """Columns of `text` on a terminal: wide East Asian characters take two, combining marks none."""
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    """`plain(text)` in at most `width` columns; three dots mark what is missing."""
    # Escaping a megabyte to show one line of it would be a waste; the factor leaves room for combining marks.
    whole, text = len(text) <= 4 * width, plain(text[: 4 * max(width, 1)])
    if whole and width_of(text) <= width:
        return text
    kept, used = [], 0
    for character in text:
        used += _columns(character)
        if used > width - 3:
            break
        kept.append(character)
    return ("".join(kept).rstrip() + "...")[: max(width, 0)]


def terminal_width() -> int:
    """Columns of the terminal, or of `COLUMNS`, or 100 where there is neither; at least 60."""
    return max(60, shutil.get_terminal_size((100, 24)).columns)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Aligned columns: numbers to the right, the last column as text cut to what is left of `width`."""
    body = [head, *rows]
    widths = [max(width_of(row[i]) for row in body) for i in range(len(head) - 1)]
    room = max(10, width - sum(widths) - 2 * len(widths))
    lines = []
    for row in body:
        cells = [" " * (widths[i] - width_of(row[i])) + row[i] for i in range(len(widths))]
        lines.append("  ".join([*cells, cut(row[-1], room)]).rstrip())
    return "\n".join(lines)


# What tells notes of one kind apart: the place in front, numbers, and what is quoted.
_PARTICULAR = re.compile(r"""\A[^:]{1,200}: |\d+(?:[.,]\d+)*|'[^']*'|"[^"]*\"""")


def _kind(note: str) -> str:
    return _PARTICULAR.sub("#", note)


class _Notes(logging.StreamHandler):
    """Log messages as notes, of each kind of warning the first; `close` says how many more there were.

    They quote prompts, answers and file names, which are not to be trusted on a terminal.
    """

    def __init__(self):
        super().__init__(sys.stderr)
        self.found: dict[str, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            note = record.getMessage()
            found = self.found.setdefault(_kind(note), [])
            found.append(note)
            if len(found) > 1:
                return
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return f"sapo: note: {plain(record.getMessage())}"

    def close(self) -> None:
        for first, *others in self.found.values():
            if others:
                say_notes([f"{len(others)} more like this one: {first}"])
        super().close()


@contextmanager
def log_on_stderr(name: str, quiet: bool, level: int | None = None) -> Iterator[None]:
    """Show what the logger `name` says as notes (nothing if `quiet`), for as long as this lasts; see `_Notes`.

    level: the logger's own level meanwhile; None leaves it.
    """
    logger = logging.getLogger(name)
    handler = logging.NullHandler() if quiet else _Notes()
    before = logger.propagate, logger.level
    logger.propagate = False
    if level is not None:
        logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.propagate = before[0]
        if level is not None:
            logger.setLevel(before[1])


def say_notes(notes: Iterable[str], quiet: bool = False) -> None:
    """Notes on stderr, a line each; nothing if `quiet`."""
    for note in () if quiet else notes:
        print(f"sapo: note: {plain(note)}", file=sys.stderr)
