"""What the folder of a sequence run holds: one schema for the runner that writes it and the report that reads it.

=================================  =====================================================
``run.json``                       `RunRecord`: the configuration, what it ran on, when
``before.json``                    `Evaluation` before training, with ``evaluate="all"``
``tasks/NN-NAME/scores.json``      `Scores`: the prompts of a task and their scorings
``tasks/NN-NAME/metrics.json``     `Evaluation` after the task
``tasks/NN-NAME/train.json``       `Training`: losses by step, time, tokens
``tasks/NN-NAME/data.json``        `TaskData`: rows and what is to be known about them
``results.json``                   `Results`: the matrix, the choices, the cost so far
=================================  =====================================================

`read(kind, path)` checks a file; ``write_json(path, document.model_dump(mode="json"))`` writes one. Losses are nats per
token, times seconds; scores have the unit of their `MEASURES`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue, Strict, ValidationError, model_validator

from sapo_kernels.files import DataError, excerpt, read_json

from ..data.prompt_files import MAX_PROMPTS
from .metrics import sequence_metrics
from .tasks import MAX_NAME, MAX_TASKS

VERSION = 1
MAX_FILE_BYTES = 64 * 2**20
MAX_SCORINGS = 100_000
# One figure in two places: rounding of a sum in another order is all that may lie between them.
SAME = 1e-9
# "Input should be a valid list", "List should have at least 1 item after validation, not 0"
_WORDS = re.compile(r"^\w+ should (be|have) | after validation.*$")

Name = Annotated[str, Field(max_length=MAX_NAME)]
Count = Annotated[int, Field(ge=0)]
# So that sums of them are finite.
Amount = Annotated[float, Field(ge=0, le=1e15)]
# A row of a matrix, a column a task; null where it was not measured.
Row = Annotated[list[Amount | None], FailFast()]
# JSON has no tuples: these lists of two become one.
Logged = Annotated[tuple[Annotated[int, Strict(), Field(ge=0)], Annotated[float | None, Strict()]], Strict(False)]
Texts = Annotated[list[str], FailFast()]


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
    "loss": Measure("Loss of the targets", "nats per token", lower_is_better=True),
}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class _File(_Part):
    version: Literal[1]


class RunRecord(_File):
    """config: `SequenceConfig.as_dict()`. data: fingerprints of the base model, the tokenizer and each task's rows."""

    kind: Literal["sequence"]
    status: Literal["running", "done"]
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
    finished: Name | None
    warnings: Texts

    @model_validator(mode="after")
    def _check(self) -> RunRecord:
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"'tasks': expected each task once, got {excerpt(self.tasks)}")
        return self


class Scoring(_Part):
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
    scorings: Annotated[list[Scoring], FailFast(), Field(max_length=MAX_SCORINGS)]

    @model_validator(mode="after")
    def _check(self) -> Scores:
        count = len(self.prompts)
        _below(self.chosen, count, "'chosen'")
        for i, scoring in enumerate(self.scorings):
            _below(scoring.chosen, count, f"'scorings' {i}: 'chosen'")
            for name in ("loss", "tokens", "weights"):
                _length(getattr(scoring, name), count, f"'scorings' {i}: {name!r}")
        return self


class Answer(_Part):
    """A test example, and what the model answers to it."""

    input: str
    target: str
    answer: str


class Evaluation(_File):
    """Scores after one task (or before all): by measure a value a task, null where it was not asked for.

    examples: how many of each task. answers: by task the first few test examples, where the run keeps them.
    """

    row: dict[str, Row]
    examples: Annotated[list[Count], Field(max_length=MAX_TASKS)]
    seconds: Amount
    notes: Texts = []
    answers: list[list[Answer]] | None = Field(None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _check(self) -> Evaluation:
        for name, row in self.row.items():
            _measured(name, [row], len(self.examples), "'row'")
        if self.answers is not None:
            _length(self.answers, len(self.examples), "'answers'")
        return self


class Training(_File):
    """losses: (step, mean loss of the steps up to it); penalties: likewise ``lambda_1 * orthogonality``."""

    losses: Annotated[list[Logged], FailFast()]
    penalties: Annotated[list[Logged], FailFast()] = []
    seconds: Amount
    tokens: Count
    examples: Count
    notes: Texts = []


class TaskData(_File):
    """How many rows each split has, how many were used, and sentences about them."""

    rows: dict[str, Count]
    used: dict[str, Count] = {}
    notes: Texts


class Score(_Part):
    """A matrix [N + 1][N], row 0 before training, with what follows from it, see `sequence_metrics`."""

    R: Annotated[list[Row], FailFast()]
    AP: float | None
    BWT: float | None
    BWT_last: float | None
    FWT: float | None

    @model_validator(mode="after")
    def _check(self) -> Score:
        if not self.R or any(len(row) != len(self.R) - 1 for row in self.R):
            raise ValueError(f"'R': expected N + 1 rows of N entries, got {[len(row) for row in self.R[:5]]}")
        for name, expected in sequence_metrics(self.R).items():
            if not same(getattr(self, name), expected):
                raise ValueError(f"{name!r}: expected {expected}, which follows from 'R', got {getattr(self, name)}")
        return self


class Choice(_Part):
    """The chosen prompt of a task beside the original; the losses are those of the last scoring, null without one."""

    task: Name
    index: Count
    prompt: str
    original: str
    loss: float | None
    original_loss: float | None
    prompts: Annotated[int, Field(ge=1, le=MAX_PROMPTS)]

    @model_validator(mode="after")
    def _check(self) -> Choice:
        _below(self.index, self.prompts, "'index'")
        return self


class Cost(_Part):
    """Of the whole run so far. overhead_fraction: scoring by training."""

    score_seconds: Amount
    train_seconds: Amount
    eval_seconds: Amount
    score_dense_tokens: Count
    score_computed_tokens: Count
    train_tokens: Count
    overhead_fraction: Amount


class Results(_File):
    """What the tasks that are done add up to."""

    tasks: Annotated[list[Name], Field(min_length=1, max_length=MAX_TASKS)]
    metrics: dict[str, Score]
    choices: list[Choice]
    cost: Cost

    @model_validator(mode="after")
    def _check(self) -> Results:
        for name, score in self.metrics.items():
            _length(score.R, len(self.tasks) + 1, f"'metrics' {excerpt(name)}: 'R'")
            _measured(name, score.R, len(self.tasks), "'metrics'")
        names = [choice.task for choice in self.choices]
        if names != self.tasks[: len(names)]:
            raise ValueError(f"'choices': expected the tasks of the run in order, got {excerpt(names)}")
        return self


File = TypeVar("File", bound=_File)


def read(kind: type[File], path: str | os.PathLike) -> File:
    """The document in a file of a run's folder.

    Raises: `DataError` naming file, place, expected and got; `OSError` from reading.
    """
    content = read_json(path, max_bytes=MAX_FILE_BYTES)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{os.fspath(path)}: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """One line about the first thing that pydantic refused: place, expected, got."""
    fault = error.errors(include_url=False)[0]
    place = "".join(f"{excerpt(key) if isinstance(key, str) else key}: " for key in fault["loc"])
    if fault["type"] == "value_error":  # of this module
        return place + str(fault["ctx"]["error"])
    told = {"missing": "a value", "extra_forbidden": "no such key"}.get(fault["type"]) or _WORDS.sub("", fault["msg"])
    return f"{place}expected {told}, got {'none' if fault['type'] == 'missing' else excerpt(fault['input'])}"


def same(one: float | None, other: float | None) -> bool:
    """Whether two figures that should be one are, up to rounding."""
    if one is None or other is None:
        return one is other
    return abs(one - other) <= SAME * max(1.0, abs(one))


def _length(values: Sequence[Any], expected: int, place: str) -> None:
    if len(values) != expected:
        raise ValueError(f"{place}: expected {expected} entries, got {len(values)}")


def _below(value: int, count: int, place: str) -> None:
    if value >= count:
        raise ValueError(f"{place}: expected less than {count}, got {excerpt(value)}")


def _measured(name: str, rows: Sequence[Sequence[float | None]], length: int, place: str) -> None:
    if name not in MEASURES:
        raise ValueError(f"{place}: expected one of {', '.join(MEASURES)}, got {excerpt(name)}")
    for row in rows:
        _length(row, length, f"{place} {name!r}")
        highest = max((value for value in row if value is not None), default=0.0)
        if highest > (MEASURES[name].top or highest):
            raise ValueError(f"{place} {name!r}: expected at most {MEASURES[name].top:g}, got {highest}")
