"""How far a job is: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

LINE_SECONDS = 30.0


class Lines:
    """Every half minute a line on stderr: how much is done, and about how long the rest takes.

    what: the job, in front of each line. unit: of what is counted. total: how many in all; done: how many of them an
    earlier start has done.
    """

    def __init__(self, what: str, unit: str, total: int, done: int = 0):
        self.what, self.unit, self.total, self.first = what, unit, total, done
        self.started = self.said = time.monotonic()
        self._before = self._newest = 0

    def update(self, done: int) -> None:
        """So many are done in all."""
        now = time.monotonic()
        if now - self.said < LINE_SECONDS or not self.first < done < self.total:
            return
        left = (now - self.started) / (done - self.first) * (self.total - done)
        print(
            f"sapo: {self.what}: {done} of {self.total} {self.unit}s, {duration(left)} left",
            file=sys.stderr,
            flush=True,
        )
        self.said = now

    def __call__(self, cells: int, tokens: int) -> None:
        """For `score_prompts`, whose count starts over with each round of a race."""
        if cells < self._newest:
            self._before += self._newest
        self._newest = cells
        self.update(self.first + self._before + cells)


def duration(seconds: float) -> str:
    """About how long, in a fitting unit."""
    minutes = seconds / 60
    return f"about {minutes / 60:.1f} h" if minutes >= 90 else f"about {max(1, round(minutes))} min"


class Progress:
    """tqdm on stderr if it is a terminal (or if asked for), otherwise nothing.

    Args:
        cells: K * M.
        dense_tokens: tokens that separate forwards would compute.
        trie_tokens: tokens that will be computed, None if not known ahead.
        show: True, False, None to look whether stderr is a terminal; or a function (cells done, tokens done).
    """

    def __init__(
        self, cells: int, dense_tokens: int, trie_tokens: int | None, show: bool | Callable[[int, int], None] | None
    ):
        self.saved = None if not trie_tokens else 1.0 - trie_tokens / dense_tokens
        self.started, self.bar = time.perf_counter(), None
        self.told, show = (show, False) if callable(show) else (None, show)
        if show is None:
            show = bool(getattr(sys.stderr, "isatty", lambda: False)())
        if show:
            try:
                from tqdm import tqdm
            except ImportError:  # a nicety, not a need
                return
            self.bar = tqdm(total=cells, desc="scoring", unit="cell", leave=False)

    def update(self, cells_done: int, tokens_done: int) -> None:
        """Set how far the job is."""
        if self.told is not None:
            self.told(cells_done, tokens_done)
        if self.bar is None:
            return
        rate = tokens_done / max(time.perf_counter() - self.started, 1e-9)
        saved = {} if self.saved is None else {"saved": f"{self.saved:.0%}"}
        self.bar.set_postfix({"tokens/s": f"{rate:,.0f}", **saved}, refresh=False)
        self.bar.update(cells_done - self.bar.n)

    def __enter__(self) -> Progress:
        if self.told is not None:
            # So that whoever counts over the rounds of a race knows where one begins.
            self.told(0, 0)
        return self

    def __exit__(self, *exc) -> None:
        if self.bar is not None:
            self.bar.close()
