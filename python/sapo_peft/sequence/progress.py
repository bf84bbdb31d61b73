"""How far a sequence is: a bar on a terminal, a line a phase elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from ..terminal import cut


class SequenceProgress:
    """Shows task, phase, step, loss and the time that is left; writes to stderr.

    Args:
        tasks: names in order.
        show: True, False, or None: a bar if stderr is a terminal, else nothing.
        done: tasks that an earlier start has done.

    Time left is the time the tasks of this start took, times the tasks that are left.
    """

    def __init__(self, tasks: list[str], show: bool | None, done: int = 0):
        self.terminal = bool(getattr(sys.stderr, "isatty", lambda: False)())
        self.tasks, self.show, self.first = tasks, self.terminal if show is None else show, done
        self.started, self.ends = time.monotonic(), None
        self.bar = tqdm(disable=True)

    def phase(self, index: int, phase: str, total: int, unit: str) -> None:
        """Begin a phase of the `index`-th task (0: before training), of `total` steps or examples."""
        self.bar.close()
        now = time.monotonic()
        if phase == "train" and index - 1 > self.first:
            each = (now - self.started) / (index - 1 - self.first)
            self.ends = now + each * (len(self.tasks) - index + 1)
        head = f"{self._name(index)}: {phase}"
        if self.show and not self.terminal:
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

    def examples(self, count: int) -> None:
        """So many more examples are done."""
        self.bar.update(count)

    def end(self) -> None:
        self.bar.close()

    def _name(self, index: int) -> str:
        return f"{index}/{len(self.tasks)} {cut(self.tasks[index - 1], 28) if index else 'all tasks'}"

    def _left(self, before: str) -> str:
        """The time left as text; nothing is known before a task is done."""
        left = "" if self.ends is None else tqdm.format_interval(max(self.ends - time.monotonic(), 0.0))
        return f"{before}about {left} left" if left else ""
