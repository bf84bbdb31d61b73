"""Races inside a run: how each scoring of a task is raced, and what the next race remembers of it."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sapo_kernels import PromptScores, Race, RaceReport, ResponseCache

# So many scorings still to come make up for a first one of every cell, whose losses later races take the noise out
# with. Replays of `benchmarks.racing`'s matrices over four states: from 3 on with 64 examples, from 5 on with 250.
FULL_PAYS = 4


class Races:
    """The race of every scoring of a run, or none at all.

    The first scoring of a task has no memory. Where the schedule holds `FULL_PAYS` more it is one of every cell, else a
    race. Later ones are races with the last scores of every cell, if there are any, and the last race as memory.

    Each scoring has an order of the examples of its own, by seed, task and step: what a memory was chosen by must not
    be what the next race sees first.

    Args:
        race: the options; None: every scoring is one of every cell, and nothing is remembered.
        caches: what is scored, by task.
    """

    def __init__(self, race: Race | None, caches: Mapping[str, ResponseCache]):
        self.race, self.caches = race, caches
        self.forget()

    def forget(self) -> None:
        self.memory: dict[str, tuple[PromptScores, ...]] = {}
        self._records: dict[str, list[dict[str, Any]]] = {}

    def next(self, task: str, step: int, more: int) -> Race | None:
        """The race of a task's scoring at `step`; None: score every cell. `more`: scorings planned after this one."""
        if self.race is None:
            return None
        memory = self.memory.get(task, ())
        if not memory and more >= FULL_PAYS:
            return None
        digest = hashlib.blake2b(f"{self.race.seed} {step} {task}".encode("utf-8", "surrogatepass"), digest_size=7)
        return replace(self.race, seed=int.from_bytes(digest.digest(), "big"), memory=memory)

    def seen(self, task: str, scores: PromptScores) -> None:
        """Remember the scores of a task, made with what `next` returned."""
        if self.race is None:
            return
        whole = () if _whole(scores) else tuple(one for one in self.memory.get(task, ()) if _whole(one))
        self.memory[task] = (*whole, scores)
        # Made once here and not at every save.
        self._records[task] = [_record(one) for one in self.memory[task]]

    def record(self) -> dict[str, Any]:
        """What is remembered, as plain JSON values; empty without a race."""
        return dict(self._records)

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take over what `record` returned; without a race, nothing.

        Raises:
            ValueError: naming what does not fit.
        """
        self.forget()
        if self.race is None:
            return
        for task, records in kept.items():
            if task not in self.caches or not isinstance(records, list):
                raise ValueError(f"checkpoint: sapo state: memory: wanted lists by task, got {task[:80]!r}")
            self.memory[task] = tuple(_scores(one, self.caches[task]) for one in records)
            self._records[task] = list(records)


def _whole(scores: PromptScores) -> bool:
    return bool(scores.scored.all())


def _record(scores: PromptScores) -> dict[str, Any]:
    """All bits of a memory in little room. Response tokens and prompts are those of the cache."""
    nll, scored = scores.nll.numpy().astype("<f8"), np.packbits(scores.scored.numpy())
    return {
        "nll": base64.b64encode(nll.tobytes()).decode("ascii"),
        "scored": base64.b64encode(scored.tobytes()).decode("ascii"),
        "race": None if scores.race is None else scores.race.to_dict(),
    }


def _scores(record: Any, cache: ResponseCache) -> PromptScores:
    shape = (cache.num_prompts, cache.num_examples)
    size = shape[0] * shape[1]
    try:
        nll, scored = (base64.b64decode(record[name], validate=True) for name in ("nll", "scored"))
        race = record["race"]
    except (TypeError, KeyError, binascii.Error, ValueError) as error:
        raise ValueError(f"checkpoint: sapo state: memory: wanted scores, got {type(error).__name__}") from None
    if len(nll) != 8 * size or len(scored) != -(-size // 8):
        raise ValueError(
            f"checkpoint: sapo state: memory: wanted the scores of {shape[0]} prompts x {shape[1]} examples, got "
            f"{len(nll)} and {len(scored)} bytes"
        )
    mask = np.unpackbits(np.frombuffer(scored, np.uint8), count=size).astype(bool).reshape(shape)
    tokens = np.where(mask, cache.response_lengths.reshape(shape), 0)
    return PromptScores(
        nll=torch.from_numpy(np.frombuffer(nll, "<f8").astype(np.float64).reshape(shape)),
        tokens=torch.from_numpy(tokens),
        prompts=list(cache.prompts),
        race=None if race is None else RaceReport.from_dict(race, shape[0]),
    )
