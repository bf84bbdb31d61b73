"""What a run found: its matrix, what that says about learning, forgetting and transfer, choices and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .schema import Evaluation, FinishedTask, Scores

Matrix = Sequence[Sequence[float | None]]


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


def sequence_metrics(matrix: Matrix) -> dict[str, Any]:
    """AP, BWT, FWT of the matrix R of one sequence.

    ``R[i][j]`` is the score on task j after task i, i from 0 (before training) to N, j from 1 to N; None where it was
    not measured. With N tasks::

        AP       = mean over j of R[N][j]
        BWT      = mean over i = 2..N of the mean over j < i of R[i][j] - R[j][j]
        BWT_last = mean over j < N of R[N][j] - R[j][j]
        FWT      = mean over i = 1..N-1 of the mean over j > i of R[i][j] - R[0][j]

    A metric that needs an entry which is missing, or a sequence of one task has none of, is None.

    Args:
        matrix: N + 1 rows of N numbers or None; a row that is missing at the end counts as not measured.
    """
    count = len(matrix[0])
    # None becomes NaN, and so does whatever is made of it.
    found = np.full((count + 1, count), np.nan)
    found[: len(matrix)] = np.array(matrix, dtype=np.float64)
    learnt = np.diagonal(found[1:])
    metrics = {
        "AP": _mean(found[-1]),
        "BWT": _mean([_mean(found[i, : i - 1] - learnt[: i - 1]) for i in range(2, count + 1)]),
        "BWT_last": _mean(found[-1, :-1] - learnt[:-1]),
        "FWT": _mean([_mean(found[i, i:] - found[0, i:]) for i in range(1, count)]),
    }
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
