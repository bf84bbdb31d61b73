"""PromptScores: the loss matrix of K prompts x M examples and what follows from it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..files import DataError, excerpt, read_json, write_json
from .race_report import RaceReport

logger = logging.getLogger("sapo_kernels")
SCHEMA = "sapo_kernels.PromptScores/1"
REDUCTIONS = ("token", "example", "batch")


@dataclass(eq=False)
class PromptScores:
    """Result of `score_prompts`.

    Attributes:
        nll: [K, M] float64 on the CPU, negative log-likelihood of each cell's response in nats, summed over its tokens.
            NaN where a cell was not scored, or where the model gave NaN.
        tokens: [K, M] int64, response tokens of each cell; 0 where it was not scored. This alone tells the two apart.
        prompts: K strings.
        stats: how it was made: "seconds", "dense_tokens" (of all K * M cells), "trie_tokens" (computed), "impl",
            "path" ("tree", "padded" or "alone"), "reason" (why not a faster one), "verified" (cells that were compared
            with the plain model), "difference" (the largest seen there, nats).
        race: what a race found, if there was one; then prompts were scored on different numbers of examples.
    """

    nll: torch.Tensor
    tokens: torch.Tensor
    prompts: list[str]
    stats: dict[str, Any] = field(default_factory=dict)
    race: RaceReport | None = None

    def spread(self, kept: Sequence[bool]) -> PromptScores:
        """The scores of all M examples of which `kept` [M] were scored; the others have NaN and 0 tokens."""
        kept = torch.tensor(kept)
        places = kept.nonzero().flatten()
        nll = torch.full((len(self.prompts), len(kept)), torch.nan, dtype=torch.float64)
        tokens = torch.zeros(nll.shape, dtype=torch.int64)
        nll[:, places], tokens[:, places] = self.nll, self.tokens
        skipped = (~kept).nonzero().flatten().tolist()
        if skipped:
            logger.warning("%d examples (first: %d) have an empty target and were skipped", len(skipped), skipped[0])
        return PromptScores(nll, tokens, self.prompts, {**self.stats, "skipped_examples": skipped}, self.race)

    @property
    def scored(self) -> torch.Tensor:
        """[K, M] bool, the cells that were scored."""
        return self.tokens > 0

    def reduce(self, kind: str = "token", batch_size: int = 8) -> torch.Tensor:
        """[K] float64 mean loss in nats per response token of each prompt, over its scored cells.

        Args:
            kind: "token": sum of nll / sum of tokens. "example": mean over examples of their token means. "batch": mean
                over consecutive batches of `batch_size` examples of their token means, weighted by their numbers of
                examples, as Hugging Face's ``Trainer.evaluate`` computes it (the published score; it depends on the
                batch size).
            batch_size: for "batch".

        A prompt with a non-finite cell has a non-finite loss; one with no scored cell has NaN.

        After a race prompts have seen different examples, and means over them could not be compared. The winner's loss
        is then the mean over its own examples, another's that plus the mean difference on the examples that both have.
        """
        if kind not in REDUCTIONS:
            raise ValueError(f"kind: expected one of {REDUCTIONS}, got {kind!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        size = {"token": self.nll.shape[1], "example": 1, "batch": batch_size}[kind]
        loss = _mean_loss(self.nll, self.tokens, size, kind == "batch")
        winner = -1 if self.race is None else self.race.winner
        for k in range(len(loss)) if winner >= 0 else ():
            common = self.scored[k] & self.scored[winner]
            if not common.all():
                pair = [k, winner]
                means = _mean_loss(self.nll[pair], torch.where(common, self.tokens[pair], 0), size, kind == "batch")
                loss[k] = loss[winner] + (means[0] - means[1])
        return loss

    @property
    def loss(self) -> torch.Tensor:
        """[K] float64, ``reduce("token")``."""
        return self.reduce("token")

    @property
    def nonfinite(self) -> list[int]:
        """Prompts with a scored cell whose nll is NaN or infinite; they are never chosen."""
        return torch.nonzero(((self.tokens > 0) & ~self.nll.isfinite()).any(1)).flatten().tolist()

    def ranking(self, kind: str = "token", batch_size: int = 8) -> list[int]:
        """Prompt indices from lowest to highest loss, ties by index, those without a finite loss last.

        After a race its winner stands first in the ranking by tokens, which is what it was run for.
        """
        loss = [x if math.isfinite(x) else math.inf for x in self.reduce(kind, batch_size).tolist()]
        first = self.race.winner if self.race is not None and kind == "token" else -1
        return sorted(range(len(loss)), key=lambda k: (k != first, loss[k], k))

    @property
    def best(self) -> int:
        """Index of the prompt with the lowest finite loss, ties to the lowest index; the winner, if there was a race.

        Raises:
            ValueError: if no prompt has a finite loss; there is nothing to choose then.
        """
        first = self.ranking()[0]
        if not math.isfinite(float(self.loss[first])):
            raise ValueError(f"best: none of the {len(self.prompts)} prompts has a finite loss")
        return first

    def warn_nonfinite(self) -> None:
        """Log which prompts have non-finite cells and how many."""
        for k in self.nonfinite:
            bad = (self.tokens[k] > 0) & ~self.nll[k].isfinite()
            logger.warning(
                "prompt %d: %d of %d cells are not finite (first: example %d); it cannot be chosen",
                k, int(bad.sum()), int((self.tokens[k] > 0).sum()), int(torch.nonzero(bad)[0]),
            )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; non-finite numbers become strings ("nan", "inf", "-inf"), cells not scored null."""
        nll, tokens = self.nll.tolist(), self.tokens.tolist()
        data = {
            "schema": SCHEMA,
            "prompts": list(self.prompts),
            "nll": [[_plain(*cell) for cell in zip(*rows, strict=True)] for rows in zip(nll, tokens, strict=True)],
            "tokens": tokens,
            "stats": dict(self.stats),
        }
        return data if self.race is None else {**data, "race": self.race.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PromptScores:
        """The inverse of `to_dict`; raises `DataError` naming the field that does not fit."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            got = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise DataError(f"scores: schema: expected {SCHEMA!r}, got {str(got)[:80]!r}")
        prompts, stats = data.get("prompts"), data.get("stats", {})
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise DataError(f"scores: prompts: expected a list of strings, got {excerpt(prompts)}")
        if not isinstance(stats, dict):
            raise DataError(f"scores: stats: expected an object, got {excerpt(stats)}")
        counts = _matrix(data, "tokens", lambda value, _k, _m: _count(value))
        tokens = torch.tensor(counts, dtype=torch.int64)
        nll = torch.tensor(_matrix(data, "nll", lambda value, k, m: _loss(value, counts, k, m)), dtype=torch.float64)
        if nll.shape != tokens.shape or nll.shape[0] != len(prompts):
            raise DataError(
                f"scores: expected {len(prompts)} prompts with nll and tokens [{len(prompts)}, M], got "
                f"{list(nll.shape)} and {list(tokens.shape)}"
            )
        race = None if "race" not in data else RaceReport.from_dict(data["race"], len(prompts))
        return cls(nll, tokens, prompts, stats, race)

    def save(self, path: str | os.PathLike) -> None:
        """Write as JSON, atomically: the file is the old one or the new one, never half a file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> PromptScores:
        """Read what `save` wrote; raises `DataError` naming the file."""
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        lines = [f"PromptScores({len(self.prompts)} prompts x {self.nll.shape[1]} examples, nats per token)"]
        loss, order = self.loss.tolist(), self.ranking()
        for place, k in enumerate(order[:5]):
            text = " ".join(self.prompts[k].split())
            text = text if len(text) <= 72 else text[:71] + "…"
            lines.append(f"  {place + 1:>2}. [{k}] {loss[k]:.4f}  {text}")
        if len(order) > 5:
            lines.append(f"  ... {len(order) - 5} more")
        return "\n".join(lines)


def _mean_loss(nll: torch.Tensor, tokens: torch.Tensor, size: int, by_examples: bool) -> torch.Tensor:
    """[K] means, over runs of `size` examples, of their token means, each run counted once or once an example."""
    nll = torch.where(tokens > 0, nll, torch.zeros_like(nll))
    sums = torch.stack([part.sum(1) for part in nll.split(size, dim=1)], 1)
    counts = torch.stack([part.sum(1) for part in tokens.split(size, dim=1)], 1)
    means = torch.where(counts > 0, sums / counts, torch.zeros_like(sums))
    examples = torch.stack([(part > 0).sum(1) for part in tokens.split(size, dim=1)], 1)
    weights = examples if by_examples else (counts > 0).long()
    return (means * weights).sum(1) / weights.sum(1)


def _plain(nll: float, tokens: int) -> float | str | None:
    if tokens == 0 and math.isnan(nll):
        return None
    return nll if math.isfinite(nll) else str(nll)


def _loss(value: Any, counts: list[list[int]], k: int, m: int) -> float | None:
    """A cell's loss, a word where JSON has no number; null is NaN, only in cells that were not scored."""
    if value is None:
        return None if k >= len(counts) or m >= len(counts[k]) or counts[k][m] > 0 else math.nan
    if type(value) not in (int, float) and value not in ("nan", "inf", "-inf"):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None


def _matrix(data: dict[str, Any], name: str, read) -> list[list]:
    """``data[name]`` as K lists of M values each, none of them None after ``read(value, k, m)``."""
    rows = data.get(name)
    well = isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)
    if not well or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise DataError(f"scores: {name}: expected K lists of M numbers each, got {excerpt(rows)}")
    result = [[read(value, k, m) for m, value in enumerate(row)] for k, row in enumerate(rows)]
    for k, row in enumerate(result):
        if None in row:
            m = row.index(None)
            raise DataError(f"scores: {name}[{k}][{m}]: expected a number, got {excerpt(rows[k][m])}")
    return result
