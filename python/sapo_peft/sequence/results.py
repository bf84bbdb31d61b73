"""SequenceResult: what a run found, as it stands in its folder and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError, excerpt

from .metrics import sequence_metrics

VERSION = 1
# Metrics that are better when they are lower.
LOWER_IS_BETTER = ("loss",)


@dataclass(frozen=True)
class SequenceResult:
    """The result of `run_sequence`.

    run: the content of ``run.json``. tasks: their names. metrics: by metric ("rougeL", "exact_match", both 0 to 1, and
    "loss", nats per token) "R", "AP", "BWT", "BWT_last", "FWT", see `sequence_metrics`. choices: one dict a task.
    cost: seconds and tokens. folder: where all of it is, or None.
    """

    run: Mapping[str, Any]
    tasks: list[str]
    metrics: Mapping[str, Mapping[str, Any]]
    choices: list[dict[str, Any]]
    cost: Mapping[str, float]
    folder: Path | None

    def matrix(self, metric: str = "rougeL") -> list[list[float | None]]:
        """R: row 0 before training, row i after task i; a column a task."""
        return self.metrics[metric]["R"]

    def table(self) -> str:
        """R and the metrics in plain text, a block a metric."""
        return "\n\n".join(_block(name, entry, self.tasks) for name, entry in self.metrics.items())


def result_document(
    names: Sequence[str],
    before: Mapping[str, Any] | None,
    done: Sequence[Mapping[str, Any]],
    choices: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of ``results.json``.

    before: the evaluation before training, a ``metrics.json``, or None. done: for each task that is done its "metrics",
    "scores" and "train" documents.
    """
    count = len(names)
    rows = [before, *(one["metrics"] for one in done)]
    found = dict.fromkeys(name for row in rows if row for name in row["row"])
    metrics = {}
    for metric in found:
        matrix = [row["row"].get(metric, [None] * count) if row else [None] * count for row in rows]
        for row in matrix:
            if len(row) != count or not all(value is None or type(value) in (int, float) for value in row):
                raise DataError(f"{metric}: expected rows of {count} numbers or null, got {excerpt(row)}")
        matrix += [[None] * count] * (count + 1 - len(matrix))
        metrics[metric] = {"R": matrix, **sequence_metrics(matrix)}
    scorings = [scoring for one in done for scoring in one["scores"]["scorings"]]
    score = math.fsum(scoring["seconds"] for scoring in scorings)
    train = math.fsum(one["train"]["seconds"] for one in done)
    return {
        "version": VERSION,
        "tasks": list(names),
        "metrics": metrics,
        "choices": list(choices),
        "cost": {
            "score_seconds": score,
            "train_seconds": train,
            "eval_seconds": math.fsum(row["seconds"] for row in rows if row),
            "score_dense_tokens": sum(scoring["dense_tokens"] for scoring in scorings),
            "score_computed_tokens": sum(scoring["computed_tokens"] for scoring in scorings),
            "train_tokens": sum(one["train"]["tokens"] for one in done),
            "overhead_fraction": score / train if train > 0 else 0.0,
        },
    }


def _block(name: str, entry: Mapping[str, Any], tasks: Sequence[str]) -> str:
    scale = 1.0 if name in LOWER_IS_BETTER else 100.0
    unit = "nats per token, lower is better" if name in LOWER_IS_BETTER else "0 to 100"
    labels = ["before", *(f"after {i}" for i in range(1, len(tasks) + 1))]
    lines = [f"{name} ({unit})"]
    width = max(map(len, labels))
    lines.append(" " * width + "".join(f"{f'task {j}':>9}" for j in range(1, len(tasks) + 1)))
    for label, row in zip(labels, entry["R"], strict=True):
        lines.append(f"{label:<{width}}" + "".join(f"{_cell(value, scale):>9}" for value in row))
    lines.append("  ".join(f"{key} {_cell(entry[key], scale)}" for key in ("AP", "BWT", "BWT_last", "FWT")))
    return "\n".join(lines)


def _cell(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.2f}"
