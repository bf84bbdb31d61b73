"""Markdown tables, and those inside documents: what stands between two markers is replaced.

``<!-- KIND: NAME -->`` begins a table and ``<!-- end of table -->`` or ``<!-- /KIND -->`` ends it. Every page of the
checkout is looked at, so that a table may move.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sapo_kernels.files import DataError, atomic_write, read_text

from .rows import ROOT

MARKED = re.compile(
    r"(?P<begin><!-- (?P<kind>table|effect): (?P<name>[a-z0-9 -]+) -->\n)(?P<blank>\n?)"
    r"(?:(?!<!-- (?:table|effect): ).)*?(?P<end><!-- (?:end of table|/effect) -->)",
    re.DOTALL,
)


def table(header: list[str], rows: list[list[str]], align: str = "---:") -> list[str]:
    """Markdown lines; the first column is text, the others numbers or as `align` says."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + [align] * (len(header) - 1)) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]


def seconds(value: float) -> str:
    """With its unit and three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}"
    raise AssertionError("the last unit takes everything")


def size(count: int) -> str:
    return "-" if count < 0 else f"{count / 2**20:.1f} MiB"


def filled(text: str, kind: str, make: Callable[[str], list[str]]) -> str:
    """`text` with every table of a kind made anew; ``make(name)`` gives its lines and refuses an unknown name."""
    whole = sum(match["kind"] == kind for match in MARKED.finditer(text))
    if whole != len(re.findall(rf"<!-- {kind}: ", text)):
        raise DataError(f"a {kind} table has no end, or a name with other characters than a-z, 0-9, blanks and hyphens")

    def fill(match: re.Match) -> str:
        if match["kind"] != kind:
            return match[0]
        return match["begin"] + match["blank"] + "\n".join(make(match["name"])) + "\n" + match["blank"] + match["end"]

    return MARKED.sub(fill, text)


def outdated(kind: str, make: Callable[[str], list[str]], write: bool, root: Path = ROOT) -> list[str]:
    """The pages whose tables are not those of the rows; with `write` they are written."""
    changed = []
    for path in sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")]):
        text = read_text(path)
        if (new := filled(text, kind, make)) != text:
            changed.append(path.relative_to(root).as_posix())
            if write:
                atomic_write(path, new)
    return changed
