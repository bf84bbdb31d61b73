"""How far a sequence is: a bar on a terminal; elsewhere a line a phase, and one every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from sapo_kernels.scoring.progress import Lines

from ..terminal import cut


class SequenceProgress:
    """Shows task, phase, step, loss and the time that is left; writes to stderr.

    Args:
        tasks: names in order.
        show: True: a bar on a terminal, lines elsewhere; None: a bar on a terminal; False: nothing.
        done: tasks that an earlier start has done.

    Time left is the time the tasks of this start took, times the tasks that are left.
    """

    def __init__(self, tasks: list[str], show: bool | None, done: int = 0):
        self.terminal = bool(getattr(sys.stderr, "isatty", lambda: False)())
        self.tasks, self.show, self.first = tasks, self.terminal if show is None else show, done
        self.started, self.ends = time.monotonic(), None
        self.bar = tqdm(disable=True)
        # Off a terminal: what says lines in this phase.
        self.lines: Lines | None = None
        self.index = self.count = 0

    @property
    def spoken(self) -> bool:
        return self.show and not self.terminal

    def phase(self, index: int, phase: str, total: int, unit: str) -> None:
        """Begin a phase of the `index`-th task (0: before training), of `total` steps or examples."""
        self.bar.close()
        now = time.monotonic()
        if phase == "train" and index - 1 > self.first:
            each = (now - self.started) / (index - 1 - self.first)
            self.ends = now + each * (len(self.tasks) - index + 1)
        head = f"{self._name(index)}: {phase}"
        self.index, self.count = index, 0
        self.lines = Lines(head, unit, total) if self.spoken else None
        if self.spoken:
            print(f"sapo: {head}, {total} {unit}s{self._left(', ')}", file=sys.stderr, flush=True)
        self.bar = tqdm(total=total, desc=head, unit=unit, leave=False, dynamic_ncols=True,
                        disable=not (self.show and self.terminal))  # fmt: skip

    def say(self, index: int, text: str) -> None:
        """One line about the `index`-th task."""
        self.bar.close()
        if self.show:
            print(f"sapo: {self._name(index)}: {text}", file=sys.stderr)

    def step(self, step: int, loss: float | None) -> None:
        """That many optimizer steps are done."""
        self.bar.set_postfix_str(("" if loss is None else f"loss {loss:.4f}") + self._left(", "), refresh=False)
        self.bar.update(step - self.bar.n)
        if self.lines is not None:
            self.lines.update(step)

    def examples(self, count: int) -> None:
        """So many more examples are done."""
        self.bar.update(count)
        self.count += count
        if self.lines is not None:
            self.lines.update(self.count)

    def scoring(self, what: str, cells: int) -> Callable[[int, int], None] | bool:
        """What `score_prompts` tells how far a scoring of that many cells is."""
        return Lines(f"{self._name(self.index)}: scoring", "cell", cells) if self.spoken else False

    def end(self) -> None:
        self.bar.close()

    def _name(self, index: int) -> str:
        return f"{index}/{len(self.tasks)} {cut(self.tasks[index - 1], 28) if index else 'all tasks'}"

    def _left(self, before: str) -> str:
        """The time left as text; nothing is known before a task is done."""
        left = "" if self.ends is None else tqdm.format_interval(max(self.ends - time.monotonic(), 0.0))
        return f"{before}about {left} left" if left else ""
