"""Choice: which prompt each task trains on now, in memory that dataloader workers share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sapo_kernels import PromptState
from sapo_kernels.reweight.prompt_state import DTYPES

from ..data.prompt_pool import PromptPool
from .records import numbers, unpacked


class Choice:
    """The pools of all tasks, their `PromptState`, and what follows from it for one example.

    All numbers live in shared memory, so that workers (forked or spawned) see a new choice as soon as it is made. What
    a worker has rendered before that is marked with the old `round` and rendered again where it is used.

    Attributes:
        pools: by task name, in order; pool p of `state` is the p-th.
        state: `PromptState` on the CPU.
        chosen: [P] int64, the prompt that mode "hard" trains with: the best one, or the last known.
        clock: [2] int64: how often the choice changed, and the epoch.
    """

    def __init__(self, pools: Mapping[str, PromptPool], mode: str, seed: int):
        self.pools, self.mode, self.seed = dict(pools), mode, seed
        self.tasks = list(self.pools)
        self._index = {task: p for p, task in enumerate(self.tasks)}
        self.state = PromptState(len(self.tasks), [len(pool.prompts) for pool in self.pools.values()])
        self.chosen = torch.zeros(len(self.tasks), dtype=torch.int64)
        self.clock = torch.zeros(2, dtype=torch.int64)
        for tensor in (self.chosen, self.clock, *(getattr(self.state, name) for name in DTYPES)):
            tensor.share_memory_()

    @property
    def round(self) -> tuple[int, int]:
        """What a rendered example is valid for; the epoch matters for draws only."""
        number, epoch = self.clock.tolist()
        return number, epoch if self.mode == "soft" else 0

    def reset(self) -> None:
        """Forget what was scored and chosen: the original prompt of every task, in a new round."""
        self.state.load_state_dict(PromptState(len(self.tasks), self.state.live.sum(1).tolist()).state_dict())
        self.take([0] * len(self.tasks))
        self.clock[1] = 0

    def take(self, chosen: Sequence[int]) -> list[tuple[str, int, int]]:
        """Choose these prompts, one for each task in order (-1: as before); a new round.

        Returns (task, old prompt, new prompt) of each switch.
        """
        before = self.chosen.tolist()
        after = [old if new < 0 else new for old, new in zip(before, chosen, strict=True)]
        self.chosen.copy_(torch.tensor(after))
        self.clock[0] += 1
        return [(task, old, new) for task, old, new in zip(self.tasks, before, after, strict=True) if old != new]

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain JSON values."""
        state = {name: numbers(value) for name, value in self.state.state_dict().items()}
        return {"state": state, "chosen": self.chosen.tolist(), "clock": self.clock.tolist()}

    def load(self, kept: Mapping[str, Any], clock: bool = True) -> list[tuple[str, int, int]]:
        """Take over what `record` returned, the clock only if it is that of the same run; the switches."""
        own = self.state.state_dict()
        state = {name: torch.tensor(unpacked(kept["state"][name]), dtype=own[name].dtype) for name in own}
        self.state.load_state_dict({name: value.view(own[name].shape) for name, value in state.items()})
        switches = self.take(kept["chosen"])
        if clock:
            self.clock.copy_(torch.tensor(kept["clock"]))
        return switches

    def task_of(self, feature: Mapping) -> str:
        """The task of an example: its "task" entry, or the only task there is."""
        if not isinstance(feature, Mapping):
            raise TypeError(f"example: expected a mapping with two texts, got {type(feature).__name__}")
        task = feature.get("task", self.tasks[0] if len(self.tasks) == 1 else None)
        if not isinstance(task, str) or task not in self._index:
            raise ValueError(f"example: expected a 'task' among {self.tasks[:20]}, got {task!r}")
        return task

    def prompt_for(self, task: str, example: Mapping[str, str], sample: bool = True) -> int:
        """The prompt that this example is trained on now; without `sample`, the chosen one in mode "soft" too.

        Draws depend on the seed, the epoch and the example's text only, so they are the same in every worker and after
        every resumption.
        """
        p = self._index[task]
        if self.mode == "hard" or not sample:
            return int(self.chosen[p])
        return draw(self.state.probs[p].tolist(), self.seed, int(self.clock[1]), task, example)


def draw(probs: Sequence[float], seed: int, epoch: int, task: str, example: Mapping[str, str]) -> int:
    """An index drawn by `probs` from a hash of everything else; 0 if nothing can be drawn."""
    text = "\0".join((str(seed), str(epoch), task, example["input"], example["target"]))
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    left = (int.from_bytes(digest, "big") >> 11) / 2**53 * sum(probs)
    last = 0
    for index, weight in enumerate(probs):
        if weight > 0:
            last = index
            if left < weight:
                return index
            left -= weight
    # Rounding may leave a little after the last one.
    return last
