"""How far a sequence is: a bar on a terminal, a line a phase elsewhere."""

from __future__ import annotations

import sys
import time

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
        terminal = bool(getattr(sys.stderr, "isatty", lambda: False)())
        self.tasks, self.show = tasks, terminal if show is None else show
        self.bar = None
        self.terminal = terminal and self.show
        self.first, self.started = done, time.monotonic()
        # Seconds of a task, when the present one began, and how many are left with it.
        self.per_task: float | None = None
        self.marked, self.remaining = self.started, len(tasks)

    def phase(self, index: int, phase: str, total: int, unit: str) -> None:
        """Begin a phase of the `index`-th task (0: before training), of `total` steps or examples."""
        self.end()
        if not self.show:
            return
        if phase == "train":
            self.marked, self.remaining = time.monotonic(), len(self.tasks) - index + 1
            if index - 1 > self.first:
                self.per_task = (self.marked - self.started) / (index - 1 - self.first)
        name = cut(self.tasks[index - 1], 28) if index else "all tasks"
        head = f"{index}/{len(self.tasks)} {name}: {phase}"
        if not self.terminal:
            left = f", {self._left()}" if self._left() else ""
            print(f"sapo: {head}, {total} {unit}s{left}", file=sys.stderr, flush=True)
            return
        try:
            from tqdm import tqdm
        except ImportError:  # a nicety, not a need
            return
        self.bar = tqdm(total=total, desc=head, unit=unit, leave=False, dynamic_ncols=True)
        self.bar.set_postfix_str(self._left(), refresh=False)

    def say(self, index: int, text: str) -> None:
        """One line about the `index`-th task."""
        if self.show:
            self.end()
            print(f"sapo: {index}/{len(self.tasks)} {cut(self.tasks[index - 1], 28)}: {text}", file=sys.stderr)

    def step(self, step: int, loss: float | None) -> None:
        """That many optimizer steps are done."""
        if self.bar is not None:
            parts = [f"loss {loss:.4f}"] if loss is not None else []
            self.bar.set_postfix_str(", ".join([*parts, *filter(None, [self._left()])]), refresh=False)
            self.bar.update(step - self.bar.n)

    def examples(self, count: int) -> None:
        """So many more examples are done."""
        if self.bar is not None:
            self.bar.update(count)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _left(self) -> str:
        """The time left as text; nothing is known before a task is done."""
        if self.per_task is None:
            return ""
        left = self.per_task * self.remaining - (time.monotonic() - self.marked)
        hours, rest = divmod(int(max(left, 0.0)), 3600)
        return f"about {hours}:{rest // 60:02d}:{rest % 60:02d} left"
