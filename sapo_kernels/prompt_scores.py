"""PromptScores: the loss matrix of K prompts x M examples and what is read from it."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from ._io import DataError, excerpt, read_json, write_json

logger = logging.getLogger("sapo_kernels")
SCHEMA = "sapo_kernels.PromptScores/1"
REDUCTIONS = ("token", "example", "batch")


@dataclass(eq=False)
class PromptScores:
    """Result of `score_prompts`.

    Attributes:
        nll: [K, M] float64 on the CPU, negative log-likelihood of each cell's response in nats, summed over its tokens.
            NaN where a cell was not scored, or where the model gave NaN.
        tokens: [K, M] int64, response tokens of each cell; 0 where it was not scored.
        prompts: K strings.
        stats: how it was made: "seconds", "dense_tokens", "trie_tokens", "road" ("tree" or "padded"), "impl", "reason".
    """

    nll: torch.Tensor
    tokens: torch.Tensor
    prompts: list[str]
    stats: dict[str, Any] = field(default_factory=dict)

    def reduce(self, kind: str = "token", batch_size: int = 8) -> torch.Tensor:
        """[K] float64 mean loss in nats per response token of each prompt, over its scored cells.

        Args:
            kind: "token": sum of nll / sum of tokens. "example": mean over examples of their token means. "batch": mean
                over consecutive batches of `batch_size` examples of their token means, weighted by their numbers of
                examples, as Hugging Face's ``Trainer.evaluate`` computes it (the published score; it depends on the
                batch size).
            batch_size: for "batch".

        A prompt with a non-finite cell has a non-finite loss; one with no scored cell has NaN.
        """
        if kind not in REDUCTIONS:
            raise ValueError(f"kind: wanted one of {REDUCTIONS}, got {kind!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
        size = {"token": self.nll.shape[1], "example": 1, "batch": batch_size}[kind]
        nll = torch.where(self.tokens > 0, self.nll, torch.zeros_like(self.nll))
        sums = torch.stack([part.sum(1) for part in nll.split(size, dim=1)], 1)
        counts = torch.stack([part.sum(1) for part in self.tokens.split(size, dim=1)], 1)
        means = torch.where(counts > 0, sums / counts, torch.zeros_like(sums))
        examples = torch.stack([(part > 0).sum(1) for part in self.tokens.split(size, dim=1)], 1)
        weights = examples if kind == "batch" else (counts > 0).long()
        return (means * weights).sum(1) / weights.sum(1)

    @property
    def loss(self) -> torch.Tensor:
        """[K] float64, ``reduce("token")``."""
        return self.reduce("token")

    @property
    def nonfinite(self) -> list[int]:
        """Prompts with a scored cell whose nll is NaN or infinite; they are never chosen."""
        return torch.nonzero(((self.tokens > 0) & ~self.nll.isfinite()).any(1)).flatten().tolist()

    def ranking(self, kind: str = "token", batch_size: int = 8) -> list[int]:
        """Prompt indices from lowest to highest loss, ties by index, those without a finite loss last."""
        loss = [x if math.isfinite(x) else math.inf for x in self.reduce(kind, batch_size).tolist()]
        return sorted(range(len(loss)), key=lambda k: (loss[k], k))

    @property
    def best(self) -> int:
        """Index of the prompt with the lowest finite loss, ties to the lowest index.

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
        """Plain JSON types; non-finite numbers become strings ("nan", "inf", "-inf")."""
        nll = [[x if math.isfinite(x) else str(x) for x in row] for row in self.nll.tolist()]
        return {
            "schema": SCHEMA,
            "prompts": list(self.prompts),
            "nll": nll,
            "tokens": self.tokens.tolist(),
            "stats": dict(self.stats),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PromptScores:
        """The inverse of `to_dict`; raises `DataError` naming the field that does not fit."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            got = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise DataError(f"scores: schema: wanted {SCHEMA!r}, got {str(got)[:80]!r}")
        prompts, stats = data.get("prompts"), data.get("stats", {})
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise DataError(f"scores: prompts: wanted a list of strings, got {excerpt(prompts)}")
        if not isinstance(stats, dict):
            raise DataError(f"scores: stats: wanted an object, got {excerpt(stats)}")
        nll = torch.tensor(_matrix(data, "nll", _nats), dtype=torch.float64)
        tokens = torch.tensor(_matrix(data, "tokens", _count), dtype=torch.int64)
        if nll.shape != tokens.shape or nll.shape[0] != len(prompts):
            raise DataError(
                f"scores: wanted {len(prompts)} prompts with nll and tokens [{len(prompts)}, M], got "
                f"{list(nll.shape)} and {list(tokens.shape)}"
            )
        return cls(nll, tokens, prompts, stats)

    def save(self, path: str | os.PathLike) -> None:
        """Write as JSON, atomically: the file is the old one or the new one, never half of it."""
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


def _nats(value: Any) -> float | None:
    """A number or one of the strings that stand for the numbers JSON does not have; None for anything else."""
    if type(value) not in (int, float) and value not in ("nan", "inf", "-inf"):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None


def _matrix(data: dict[str, Any], name: str, read) -> list[list]:
    """``data[name]`` as K lists of M values each, none of them None after `read`."""
    rows = data.get(name)
    well = isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)
    if not well or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise DataError(f"scores: {name}: wanted K lists of M numbers each, got {excerpt(rows)}")
    result = [[read(value) for value in row] for row in rows]
    for k, row in enumerate(result):
        if None in row:
            m = row.index(None)
            raise DataError(f"scores: {name}[{k}][{m}]: wanted a number, got {excerpt(rows[k][m])}")
    return result
