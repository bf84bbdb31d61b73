"""Why scoring again inside a task did harm: the same runs with more rows to score on, and with longer tasks.

LoRAInc, the orders and seeds of the reported experiment; `again16` repeats its `sapo-again` and records the choices. A
pair is one order and seed, scored again less scored once. docs/effect.md has the table.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sapo_kernels.files import read_json

from . import design
from .statistics import bootstrap_mean

# What is compared: told as, scored again, scored once (None: the reported rows).
PAIRS = (
    ("16 rows, 20 steps (as reported)", "again16", None),
    ("64 rows, 20 steps", "again64", "sapo64"),
    ("16 rows, 60 steps", "again60", "sapo60"),
)


def differences(results: Path, again: str, once: str | None) -> dict[str, list[float]]:
    """Scored again less scored once: AP by pair; own loss after a task and what is forgotten of it later, by task."""
    rows = read_json(results / "again.json")["rows"]
    by = {(r["variant"], r["order"], r["seed"]): r for r in rows}
    for r in read_json(results / "sequences.json")["rows"]:
        if r["method"] == "lora-inc" and r["policy"] == "sapo":
            by[None, r["order"], r["seed"]] = {"AP": r["rougeL"]["AP"], "loss": r["loss"]["R"]}
    found: dict[str, list[float]] = {
        "AP": [],
        "own kept": [],
        "own switched": [],
        "later kept": [],
        "later switched": [],
    }
    for order in design.ORDERS:
        for seed in design.SEEDS:
            more, less = by[again, order, seed], by[once, order, seed]
            found["AP"].append(100 * (more["AP"] - less["AP"]))
            last = len(more["chosen"])
            for task, chosen in enumerate(more["chosen"]):
                kind = "switched" if len(set(chosen)) > 1 else "kept"
                after, end = ([run["loss"][row][task] for run in (more, less)] for row in (task + 1, last))
                found[f"own {kind}"].append(after[0] - after[1])
                if task + 1 < last:
                    found[f"later {kind}"].append(end[0] - after[0] - (end[1] - after[1]))
    return found


def table(results: Path) -> list[str]:
    """Markdown lines, means with 95 % intervals by bootstrap."""
    heads = [
        "scored again less once",
        "AP, ROUGE-L",
        "own loss after a task, kept",
        "switched",
        "loss added later, kept",
    ]
    lines = [f"| {' | '.join([*heads, 'switched'])} |", "|" + "---|" * (len(heads) + 1)]
    for told, again, once in PAIRS:
        cells = []
        for name, values in differences(results, again, once).items():
            mean, low, high = bootstrap_mean(np.asarray(values))
            form = (
                "{:+.1f} [{:+.1f}, {:+.1f}]"
                if name == "AP"
                else "{:+.2f} [{:+.2f}, {:+.2f}] (" + str(len(values)) + ")"
            )
            cells.append(form.format(mean, low, high))
        lines.append(f"| {told} | {' | '.join(cells)} |")
    return lines
