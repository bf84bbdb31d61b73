"""A quiet progress bar: prompts x examples done, tokens per second, tokens saved."""

from __future__ import annotations

import sys
import time


class Progress:
    """tqdm on stderr if it is a terminal (or if asked for), otherwise nothing.

    Args:
        cells: K * M.
        dense_tokens: tokens that separate forwards would compute.
        trie_tokens: tokens that will be computed, None if not known ahead.
        show: True, False, or None to look whether stderr is a terminal.
    """

    def __init__(self, cells: int, dense_tokens: int, trie_tokens: int | None, show: bool | None):
        self.saved = None if not trie_tokens else 1.0 - trie_tokens / dense_tokens
        self.started, self.bar = time.perf_counter(), None
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
        if self.bar is None:
            return
        rate = tokens_done / max(time.perf_counter() - self.started, 1e-9)
        saved = {} if self.saved is None else {"saved": f"{self.saved:.0%}"}
        self.bar.set_postfix({"tokens/s": f"{rate:,.0f}", **saved}, refresh=False)
        self.bar.update(cells_done - self.bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc) -> None:
        if self.bar is not None:
            self.bar.close()
