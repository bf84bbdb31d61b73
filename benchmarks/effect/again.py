"""Why scoring again inside a task did harm: the same runs with more rows to score on, and with longer tasks.

    python -m benchmarks.effect.again --work DIR     # 50 runs, about 35 minutes of one core; then the table

LoRAInc, the orders and seeds of the reported experiment; `again16` repeats its `sapo-again` and records the choices. A
pair is one order and seed, scored again less scored once. docs/effect.md reads the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from sapo_kernels.files import read_json, write_json

from . import design
from .statistics import bootstrap_mean

RESULTS = Path(__file__).resolve().parent / "results"
LONG = {"max_steps": 60, "train_examples": 480}
VARIANTS: dict[str, dict[str, Any]] = {
    "again16": {"every_steps": 5},
    "sapo64": {"probe_examples": 64},
    "again64": {"probe_examples": 64, "every_steps": 5},
    "sapo60": LONG,
    "again60": {**LONG, "every_steps": 15},
}
# What is compared: told as, scored again, scored once (None: the reported rows).
PAIRS = (
    ("16 rows, 20 steps (as reported)", "again16", None),
    ("64 rows, 20 steps", "again64", "sapo64"),
    ("16 rows, 60 steps", "again60", "sapo60"),
)


def run(work: Path) -> None:
    """All runs that are missing in `work`, then the rows."""
    from sapo_peft.sequence import SequenceConfig, run_sequence
    from sapo_peft.tiny_base import load_tiny_base, sequence_tasks

    base, tokenizer = load_tiny_base()
    rows = []
    for seed in design.SEEDS:
        for order, names in design.ORDERS.items():
            for variant, options in VARIANTS.items():
                given = {**design.SEQUENCE_OPTIONS, **options}
                config = SequenceConfig(method="lora-inc", policy="sapo", seed=seed, **given)
                tasks = sequence_tasks(names, seed, config.test_examples)
                folder = work / f"{variant}_{order}_{seed}"
                found = run_sequence(
                    (base, tokenizer), tasks, folder, config, order=order, name="tiny-base", progress=False
                )
                scores = [read_json(path / "scores.json") for path in sorted((folder / "tasks").glob("[0-9]*"))]
                chosen = [[scoring["chosen"] for scoring in one["scorings"]] for one in scores]
                rows.append(row(variant, order, seed, found.metrics, chosen))
                print(f"{folder.name}: rougeL AP {found.metrics['rougeL']['AP']:.3f}", flush=True)
    write_json(RESULTS / "again.json", {"version": 1, "rows": rows})


def row(variant: str, order: str, seed: int, metrics: dict, chosen: list[list[int]]) -> dict[str, Any]:
    """One run: AP in ROUGE-L, the matrix of losses (nats per token), the prompt chosen at each scoring of each task."""
    losses = [[round(value, 5) for value in line] for line in metrics["loss"]["R"]]
    return {"variant": variant, "order": order, "seed": seed, "AP": round(metrics["rougeL"]["AP"], 5), "loss": losses,
            "chosen": chosen}  # fmt: skip


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


def table(results: Path = RESULTS) -> list[str]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the runs; those that are done there are not run again")
    options = parser.parse_args()
    if options.work is not None:
        run(options.work)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
