"""SequenceResult: what a run found, as it stands in its folder and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .metrics import sequence_metrics
from .schema import MEASURES, Evaluation, FinishedTask, Scores


@dataclass(frozen=True)
class SequenceResult:
    """The result of `run_sequence`.

    run: the content of ``run.json``. tasks, metrics, choices, cost: that of ``results.json``, see `results_of`.
    folder: where all of it is, or None.
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


def results_of(names: Sequence[str], before: Evaluation | None, done: Sequence[FinishedTask]) -> dict[str, Any]:
    """The content of ``results.json``: what follows from the evaluation before training and the tasks that are done.

    metrics: by metric ("rougeL", "exact_match", "normalised_match", all 0 to 1, and "loss", nats per token) "R", "AP",
    "BWT", "BWT_last", "FWT", see `sequence_metrics`. choices: one dict a task; the losses are those of the last
    scoring. cost: seconds and tokens; "overhead_fraction" is scoring by training.
    """
    empty = [None] * len(names)
    rows = [before, *(task.metrics for task in done)]
    metrics = {}
    for measure in dict.fromkeys(name for row in rows if row for name in row.row):
        matrix = [row.row.get(measure, empty) if row else empty for row in rows]
        matrix += [empty] * (len(names) + 1 - len(matrix))
        metrics[measure] = {"R": matrix, **sequence_metrics(matrix)}
    scorings = [scoring for task in done for scoring in task.scores.scorings]
    score, train = math.fsum(one.seconds for one in scorings), math.fsum(task.train.seconds for task in done)
    cost = {
        "score_seconds": score,
        "train_seconds": train,
        "eval_seconds": math.fsum(row.seconds for row in rows if row),
        "score_dense_tokens": sum(one.dense_tokens for one in scorings),
        "score_computed_tokens": sum(one.computed_tokens for one in scorings),
        "train_tokens": sum(task.train.tokens for task in done),
        "overhead_fraction": score / train if train > 0 else 0.0,
    }
    choices = [_choice(task.scores) for task in done]
    return {"version": 1, "tasks": list(names), "metrics": metrics, "choices": choices, "cost": cost}


def _choice(scores: Scores) -> dict[str, Any]:
    index, prompts = scores.chosen, scores.prompts
    losses = scores.scorings[-1].loss if scores.scorings else [None] * len(prompts)
    return {"task": scores.task, "index": index, "prompt": prompts[index], "original": prompts[0],
            "loss": losses[index], "original_loss": losses[0], "prompts": len(prompts)}  # fmt: skip


def _block(name: str, entry: Mapping[str, Any], tasks: Sequence[str]) -> str:
    scale, unit = (100.0, "0 to 100") if MEASURES[name].top else (1.0, "nats per token, lower is better")
    labels = ["before", *(f"after {i}" for i in range(1, len(tasks) + 1))]
    width = max(map(len, labels))
    lines = [f"{name} ({unit})", " " * width + "".join(f"{f'task {j}':>9}" for j in range(1, len(tasks) + 1))]
    for label, row in zip(labels, entry["R"], strict=True):
        lines.append(f"{label:<{width}}" + "".join(f"{_cell(value, scale):>9}" for value in row))
    lines.append("  ".join(f"{key} {_cell(entry[key], scale)}" for key in ("AP", "BWT", "BWT_last", "FWT")))
    return "\n".join(lines)


def _cell(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.2f}"
