"""Scores of one answer, and what the matrix of a sequence says about learning, forgetting and transfer."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

Matrix = Sequence[Sequence[float | None]]

_ASCII_WORD = re.compile(r"[a-z0-9]", re.IGNORECASE)
# Words of letters and digits of any script; scripts that are written without spaces by the character.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_ANY_WORD = re.compile(rf"[{_UNSPACED}\U00020000-\U0003ffff]|[^\W_{_UNSPACED}\U00020000-\U0003ffff]+")


class _AnyScript:
    """A tokenizer for `rouge_score`, whose own knows nothing but a-z and 0-9."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return _ANY_WORD.findall(text.lower()) or [character for character in text if not character.isspace()]


@functools.cache
def _scorer(any_script: bool):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_AnyScript() if any_script else None)


def check_scorer() -> None:
    """Find out before hours of training that rouge-score is missing.

    Raises: `ImportError` naming the package.
    """
    try:
        _scorer(False)
    except ModuleNotFoundError as error:
        raise ImportError(f"ROUGE-L: expected rouge-score, got: {error}; pip install rouge-score") from error


def rouge_l(answer: str, target: str) -> float:
    """ROUGE-L F1 of one answer, 0 to 1, by the package rouge-score without stemming.

    Where the target has letters or digits beyond ASCII, or none at all, words are those of Unicode (Chinese, Japanese,
    Thai and their like character by character, signs alone sign by sign): rouge-score's own would be none or pieces.
    """
    foreign = any(ord(character) > 127 and character.isalnum() for character in target)
    any_script = foreign or not _ASCII_WORD.search(target)
    return float(_scorer(any_script).score(target, answer)["rougeL"].fmeasure)


def exact_match(answer: str, target: str) -> float:
    """1.0 if the texts are equal, white space at the ends aside and any run of it counting as one space; else 0.0."""
    return float(answer.split() == target.split())


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
    tasks = len(matrix[0])
    rows = [list(row) for row in matrix] + [[None] * tasks] * (tasks + 1 - len(matrix))

    def entry(i: int, j: int) -> float:
        value = rows[i][j - 1]
        return math.nan if value is None else float(value)

    def backward(i: int) -> list[float]:
        return [entry(i, j) - entry(j, j) for j in range(1, i)]

    def forward(i: int) -> list[float]:
        return [entry(i, j) - entry(0, j) for j in range(i + 1, tasks + 1)]

    return {
        "AP": _mean([entry(tasks, j) for j in range(1, tasks + 1)]),
        "BWT": _mean([_mean_or_nan(backward(i)) for i in range(2, tasks + 1)]),
        "BWT_last": _mean(backward(tasks)),
        "FWT": _mean([_mean_or_nan(forward(i)) for i in range(1, tasks)]),
    }


def _mean_or_nan(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _mean(values: list[float]) -> float | None:
    mean = _mean_or_nan(values)
    return mean if math.isfinite(mean) else None
