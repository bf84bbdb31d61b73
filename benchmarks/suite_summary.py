"""summary.md of the GPU suite: how each part ended, and the rows as tables against ceilings and peers."""

from __future__ import annotations

import math

from .gpu_parts import PARTS
from .rows import Row


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown lines; the first column is text, the others numbers."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]


def cases(rows: list[Row], op: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.op == op:
            found.setdefault(row.case, []).append(row)
    return found


def seconds(value: float) -> str:
    """With its unit and three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}"
    raise AssertionError("the last unit takes everything")


def size(count: int) -> str:
    return "-" if count < 0 else f"{count / 2**20:.1f} MiB"


def ceilings(rows: list[Row]) -> dict[str, float]:
    """Bytes and operations a second of the ceilings' best quantile, by unit."""
    return {row.work_unit: row.work / row.p20_s for row in rows if row.op == "ceiling"}


def _of_ceiling(row: Row, reached: dict[str, float]) -> str:
    if row.work_unit not in reached or not row.work:
        return "-"
    return f"{row.work / row.p50_s / reached[row.work_unit]:.1%}"


def summary(rows: list[Row], outcomes, notes: dict[str, list[str]], took: float) -> str:
    """The whole text."""
    lines = ["# GPU suite", ""]
    if rows:
        where = rows[0].environment
        lines += [
            f"{where.device}, driver {where.driver}, torch {where.torch}, triton {where.triton}, transformers "
            f"{where.transformers}, Python {where.python}; commit {where.commit}, {where.date}; {took:.0f} s.", "",
        ]  # fmt: skip
    lines += table(["part", "how it ended", "s"], [[o.name, o.status, f"{o.seconds:.0f}"] for o in outcomes])
    reached = ceilings(rows)
    lines += ["", "## Ceilings", ""]
    lines += [f"- {unit}: {value / 1e12:.4g} T{unit}/s" for unit, value in reached.items()] or ["Not measured."]
    measured = dict.fromkeys(row.op for row in rows if row.op != "ceiling" and not row.op.endswith(" config"))
    for op in measured:
        for case, found in cases(rows, op).items():
            lines += ["", f"## {op}: {case}", "", f"{found[0].shape}; {found[0].dtype}; work = {found[0].formula}", ""]
            ours = next((row.p50_s for row in found if row.provider == "ours"), math.nan)
            lines += table(
                ["provider", "p20", "p50", "p80", "x ours", "of ceiling", "peak memory", "tokens", "error"],
                [
                    [r.provider, seconds(r.p20_s), seconds(r.p50_s), seconds(r.p80_s), f"{r.p50_s / ours:.2f}",
                     _of_ceiling(r, reached), size(r.peak_bytes), str(r.tokens), f"{r.error:.2g}"]
                    for r in found
                ],
            )  # fmt: skip
    for op in ("tree_attention config", "linear_logprob config"):
        for case, found in cases(rows, op).items():
            ranked = sorted(found, key=lambda row: row.p50_s)
            lines += ["", f"## {op}: {case}", ""]
            lines += table(
                ["configuration", "p50", "of ceiling"],
                [[r.provider, seconds(r.p50_s), _of_ceiling(r, reached)] for r in ranked],
            )
    for name in PARTS:
        if notes.get(name):
            lines += ["", f"## Notes: {name}", "", "```", *notes[name], "```"]
    return "\n".join(lines) + "\n"
