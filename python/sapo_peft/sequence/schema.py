"""What the folder of a sequence run holds: one schema for the run that writes it and the report that reads it.

=================================  =====================================================
``run.json``                       `RunRecord`: the configuration, what it ran on, when
``before.json``                    `Evaluation` before training, with ``evaluate="all"``
``tasks/NN-NAME/scores.json``      `Scores`: the prompts of a task and their scorings
``tasks/NN-NAME/metrics.json``     `Evaluation` after the task
``tasks/NN-NAME/train.json``       `Training`: losses by step, time, tokens
``tasks/NN-NAME/data.json``        `TaskData`: rows and what is to be known about them
``results.json``                   what follows from the others so far, see `results_of`
=================================  =====================================================

Losses are nats per token, times seconds; scores have the unit of their `MEASURES`. Which files there must be, and their
bytes, is the matter of the manifests, see `folder.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue, model_validator

from sapo_kernels.files import excerpt, read_json

from ..data.prompt_files import MAX_PROMPTS
from ..data.schema import validated
from .config import MAX_NAME, MAX_TASKS

Name = Annotated[str, Field(max_length=MAX_NAME)]
Count = Annotated[int, Field(ge=0)]
# So that sums of them are finite.
Amount = Annotated[float, Field(ge=0, le=1e15)]
Texts = Annotated[list[str], FailFast()]
# A row of a matrix, a column a task; null where it was not measured.
MatrixRow = Annotated[list[Amount | None], FailFast()]
Logged = Annotated[list[tuple[Count, float | None]], FailFast()]


@dataclass(frozen=True)
class Measure:
    """A score that a run may hold. top: its largest value, None if there is none; shown as per cent where it is 1."""

    title: str
    unit: str
    top: float | None = None
    lower_is_better: bool = False


# In the order in which they are shown; the first that a run has is its headline.
MEASURES = {
    "rougeL": Measure("ROUGE-L", "%", 1.0),
    "exact_match": Measure("Exact match", "%", 1.0),
    "normalised_match": Measure("Exact match, normalised", "%", 1.0),
    "loss": Measure("Loss of the targets", "nats per token", lower_is_better=True),
}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class _File(_Part):
    version: Literal[1] = 1


class RunRecord(_Part):
    """config: `SequenceConfig.as_dict()`. data: fingerprints of the base model, the tokenizer and each task's rows."""

    # Folders of version 1 had no manifests.
    version: Literal[2] = 2
    kind: Literal["sequence"] = "sequence"
    status: Literal["running", "done"] = "running"
    method: Name
    policy: Name
    order: Name
    tasks: Annotated[list[Name], Field(min_length=1, max_length=MAX_TASKS)]
    seed: int
    model: str
    config: dict[str, JsonValue]
    data: dict[str, str]
    versions: dict[str, str]
    started: Name
    finished: Name | None = None
    warnings: Texts


class ScoringRecord(_Part):
    """One scoring of K prompts: loss [K] (null: not finite), probe tokens [K], weights [K], the prompt then chosen."""

    step: Count
    reason: Name
    loss: Annotated[list[float | None], FailFast()]
    tokens: Annotated[list[Count], FailFast()]
    weights: Annotated[list[Amount], FailFast()]
    chosen: Count
    seconds: Amount
    dense_tokens: Count
    computed_tokens: Count


class Scores(_File):
    """The prompts of a task, the original first; the prompt it ended with; the scorings in order."""

    task: Name
    prompts: Annotated[Texts, Field(min_length=1, max_length=MAX_PROMPTS)]
    suffix: str
    chosen: Count
    scorings: Annotated[list[ScoringRecord], FailFast()]

    @model_validator(mode="after")
    def _check(self) -> Scores:
        count = len(self.prompts)
        for chosen in (self.chosen, *(scoring.chosen for scoring in self.scorings)):
            if chosen >= count:
                raise ValueError(f"'chosen': expected less than {count}, got {excerpt(chosen)}")
        for i, scoring in enumerate(self.scorings):
            for name in ("loss", "tokens", "weights"):
                _length(getattr(scoring, name), count, f"'scorings' {i} {name!r}")
        return self


class KeptAnswer(_Part):
    """A test example, and what the model answers to it."""

    input: str
    target: str
    answer: str


class Evaluation(_File):
    """Scores after one task (or before all): by measure a value a task, null where it was not asked for.

    examples: how many of each task. answers: by task those to the first few test examples, where answers are made.
    """

    row: dict[Literal["rougeL", "exact_match", "normalised_match", "loss"], MatrixRow]
    examples: Annotated[list[Count], Field(max_length=MAX_TASKS)]
    seconds: Amount
    notes: Texts = []
    answers: list[list[KeptAnswer]] | None = Field(None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _check(self) -> Evaluation:
        for name, row in {**self.row, "answers": self.answers}.items():
            if row is not None:
                _length(row, len(self.examples), repr(name))
        return self


class Training(_File):
    """losses: (step, mean loss of the steps up to it); penalties: likewise ``lambda_1 * orthogonality``."""

    losses: Logged
    penalties: Logged = []
    seconds: Amount
    tokens: Count
    examples: Count
    notes: Texts = []


class TaskData(_File):
    """How many rows each split has, how many were used, and sentences about them."""

    rows: dict[str, Count]
    used: dict[str, Count] = {}
    notes: Texts


@dataclass(frozen=True)
class FinishedTask:
    """The files of a task that is done, by their names."""

    scores: Scores
    metrics: Evaluation
    train: Training
    data: TaskData


Document = TypeVar("Document", bound=BaseModel)


def read(kind: type[Document], path: str | os.PathLike) -> Document:
    """The document in a file of a run's folder.

    Raises: `DataError` naming file, place, expected and got; `OSError` from reading.
    """
    return validated(kind, read_json(path), os.fspath(path))


def finite(value: float) -> float | None:
    """A number as a file may hold it."""
    return value if math.isfinite(value) else None


def _length(values: Sequence[Any], expected: int, place: str) -> None:
    if len(values) != expected:
        raise ValueError(f"{place}: expected {expected} entries, got {len(values)}")
