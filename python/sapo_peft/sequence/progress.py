"""How far a sequence is: a line a phase, and one every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from sapo_kernels.scoring.progress import Lines, duration

from ..terminal import cut


class SequenceProgress:
    """Shows task, phase, step and the time that is left; writes to stderr.

    Args:
        tasks: names in order.
        show: None: on a terminal only.
        done: tasks that an earlier start has done.

    Time left is the time the tasks of this start took, times the tasks that are left.
    """

    def __init__(self, tasks: list[str], show: bool | None, done: int = 0):
        terminal = bool(getattr(sys.stderr, "isatty", lambda: False)())
        self.tasks, self.show, self.first = tasks, terminal if show is None else show, done
        self.started = time.monotonic()
        # What says lines in this phase.
        self.lines: Lines | None = None
        self.index = self.count = 0

    def phase(self, index: int, phase: str, total: int, unit: str) -> None:
        """Begin a phase of the `index`-th task (0: before training), of `total` steps or examples."""
        self.index, self.count, head, left = index, 0, f"{self._name(index)}: {phase}", ""
        if not self.show:
            return
        if phase == "train" and (done := index - 1 - self.first) > 0:
            each = (time.monotonic() - self.started) / done
            left = f", {duration(each * (len(self.tasks) - index + 1))} left"
        self.lines = Lines(head, unit, total)
        print(f"sapo: {head}, {total} {unit}s{left}", file=sys.stderr, flush=True)

    def say(self, index: int, text: str) -> None:
        """One line about the `index`-th task."""
        if self.show:
            print(f"sapo: {self._name(index)}: {text}", file=sys.stderr)

    def step(self, step: int) -> None:
        """That many optimizer steps are done."""
        if self.lines is not None:
            self.lines.update(step)

    def examples(self, count: int) -> None:
        """So many more examples are done."""
        self.count += count
        self.step(self.count)

    def scoring(self, what: str, cells: int) -> Callable[[int, int], None] | bool:
        """What `score_prompts` tells how far a scoring of that many cells is."""
        return Lines(f"{self._name(self.index)}: scoring", "cell", cells) if self.show else False

    def _name(self, index: int) -> str:
        return f"{index}/{len(self.tasks)} {cut(self.tasks[index - 1], 28) if index else 'all tasks'}"
