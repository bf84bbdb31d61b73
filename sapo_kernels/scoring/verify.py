"""verify: show how far the scores of some cells are from the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .response_cache import ResponseCache
from .score import ScoringJob, check_choices
from .verification import Check, chosen_cells


@dataclass(frozen=True)
class CellDifference:
    """One cell by a scoring path and by the plain model.

    Attributes:
        prompt, example: its indices.
        tokens: response tokens.
        difference: the largest difference of a log-probability in nats, over all entries of all its response rows.
        bound: what that may be: 1e-4 in float32 (an entry far below zero a little more), in low precision a multiple of
            what the plain model errs itself on this cell.
        nll: the plain model's negative log-likelihood of the response, nats.
    """

    prompt: int
    example: int
    tokens: int
    difference: float
    bound: float
    nll: float


@dataclass(frozen=True)
class Verification:
    """What `verify` found: `path` is the one that `score_prompts` takes, `reason` why not a faster one."""

    path: str
    reason: str | None
    cells: list[CellDifference]

    @property
    def difference(self) -> float:
        """The largest of all cells, nats."""
        return max(cell.difference for cell in self.cells)

    def __iter__(self) -> Iterator[CellDifference]:
        return iter(self.cells)

    def __str__(self) -> str:
        lines = [f"path: {self.path}" + (f" ({self.reason})" if self.reason else "")]
        lines += [
            f"prompt {one.prompt}, example {one.example}: {one.tokens} tokens, {one.nll:.4f} nats, off by "
            f"{one.difference:.2g} (bound {one.bound:.2g})"
            for one in self.cells
        ]
        return "\n".join(lines)


def verify(
    model, cache: ResponseCache, cells: int = 8, *, impl: str = "auto", max_tokens: int | None = None
) -> Verification:
    """Score some cells as `score_prompts` would and compare each with the plain model on that sequence alone.

    Args:
        model: as for `score_prompts`; it is left as it was.
        cache: the job; of it the longest cell, the shortest, and others between them by length.
        cells: how many.
        impl, max_tokens: as for `score_prompts`.

    Returns:
        `Verification`: the path, and a `CellDifference` for each cell.

    Raises:
        As `score_prompts`.
    """
    check_choices(impl, max_tokens)
    if type(cells) is not int or cells < 1:
        raise ValueError(f"cells: expected a whole number of at least 1, got {cells!r}")
    if not isinstance(cache, ResponseCache):
        raise TypeError(f"cache: expected a ResponseCache, got {type(cache).__name__}")
    chosen = np.sort(chosen_cells(cache, cells))
    job = _AllVerified(model, cache.select(chosen), impl, max_tokens, False)
    with job.prepared():
        settled = job.measure().settled
    # Equal cells are verified once.
    found = [(divmod(int(chosen[check.cell]), cache.num_examples), check) for check in job.checks]
    differences = [
        CellDifference(*place, len(check.logits), check.worst, check.bound, check.nll)
        for place, check in sorted(found, key=lambda pair: pair[0])
    ]
    return Verification(settled.name, settled.reason, differences)


class _AllVerified(ScoringJob):
    checks: list[Check] = []

    def _cells(self, path, before, foreign) -> list[int]:
        return np.unique(self.cache.first_equal).tolist()

    def _checks(self, checks, cells, before, plain) -> list[Check]:
        self.checks = super()._checks(checks, cells, None, plain)
        return self.checks
