"""Scoring in parts of the examples: what is scored is kept, and a stopped call can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from datetime import datetime
from typing import Any

import torch

import sapo_kernels as sk
from sapo_kernels.files import DataError, excerpt, read_json, remove_temporary, write_json
from sapo_kernels.scoring.progress import Lines
from sapo_kernels.scoring.render import STARTED

from .outputs import naming

# Examples of the first part and of the others. Each part computes the shared prefixes of the prompts anew; the first
# is short, so that the time that is left is known early.
FIRST, OTHERS = 16, 64
# The record, beside the scores in the same file: what a part must have been made with.
RECORD = "made_with"


class Parts:
    """Scores of one job as they grow, in ``FILE.part`` until the result is written; without a file nothing is kept.

    record: plain JSON values that decide the scores; a part with another record is not resumed.
    """

    def __init__(self, out: str | None, record: dict[str, Any], *, resume: bool, overwrite: bool):
        self.path = None if out is None else f"{out}.part"
        self.record, self.kept = record, 0
        there = self.path is not None and os.path.exists(self.path)
        if there and not resume and not overwrite:
            raise DataError(f"{self.path}: expected no scores of a stopped call, got some; --resume continues it, "
                            "--overwrite starts over")  # fmt: skip
        if self.path is not None:
            # Whoever writes to `out` has its lock.
            remove_temporary(self.path)
        self.begun = read_json(self.path) if there and resume else None

    def moment(self) -> datetime:
        """The date that a template shows: also on another day that of the call which is resumed."""
        begun = self.begun or {}
        try:
            now = datetime.fromisoformat(begun[RECORD]["now"]) if RECORD in begun else STARTED
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{self.path}: now: expected a date and time, got {excerpt(begun[RECORD])}") from None
        self.record["now"] = now.isoformat()
        return now

    def score(self, model: Any, cache: sk.ResponseCache, spoken: bool, **options: Any) -> sk.PromptScores:
        """`score_prompts` part by part; if `spoken`, a line on stderr every half minute says how far it is."""
        contexts, responses, size = cache.contexts, cache.responses, cache.num_examples
        self.record["cells"] = _digest(cache)
        found = self._read(cache)
        nll, tokens = found.nll, found.tokens
        lines = Lines("scoring", "cell", tokens.numel(), int((tokens > 0).sum())) if spoken else None
        for first, last in _bounds(size):
            if bool((tokens[:, first:last] > 0).all()):
                continue
            rows = [[row[first:last] for row in cells] for cells in (contexts, responses)]
            if lines is not None:
                before = int((tokens > 0).sum())
                options["progress"] = lambda cells, tokens, before=before: lines.update(before + cells)
            part = sk.score_prompts(model, sk.ResponseCache.from_token_ids(*rows, cache.prompts), **options)
            nll[:, first:last], tokens[:, first:last] = part.nll, part.tokens
            found.stats = _added(found.stats, part.stats)
            if last < size:
                with naming(self.path):
                    write_json(self.path, {**found.to_dict(), RECORD: self.record})
                self.kept = int((tokens > 0).sum())
        return found

    def done(self) -> None:
        """The result is written: the parts are not needed any more."""
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def _read(self, cache: sk.ResponseCache) -> sk.PromptScores:
        shape = (cache.num_prompts, cache.num_examples)
        if self.begun is None:
            nll, tokens = torch.full(shape, torch.nan, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64)
            return sk.PromptScores(nll, tokens, list(cache.prompts), {"seconds": 0.0})
        found, record = sk.PromptScores.load(self.path), self.begun.get(RECORD)
        for name, value in self.record.items():
            got = record.get(name) if isinstance(record, dict) else None
            if got != value:
                raise DataError(f"{self.path}: {name}: expected {excerpt(value)} as in this call, got {excerpt(got)}; "
                                "--overwrite starts over")  # fmt: skip
        self.kept = int((found.tokens > 0).sum())
        return found


def _bounds(size: int) -> list[tuple[int, int]]:
    ends = [*range(FIRST, size, OTHERS), size]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _digest(cache: sk.ResponseCache) -> str:
    """Of the token ids of all cells."""
    found = hashlib.sha256()
    for array in (cache.ids, cache.offsets, cache.context_lengths):
        found.update(array.astype("int64").tobytes())
    return found.hexdigest()


def _added(stats: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the parts are summed; texts are the newest part's."""
    counts = {name: stats.get(name, 0) + value for name, value in more.items()
              if isinstance(value, (int, float)) and not isinstance(value, bool)}  # fmt: skip
    if "difference" in more:
        counts["difference"] = max(stats.get("difference", 0.0), more["difference"])
    return {**more, **counts}
