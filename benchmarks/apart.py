"""Commands in processes of their own, within a time that they share: what fails or hangs takes nothing else with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from .rows import ROOT


def shared_out(shares: dict[str, float], total: float) -> Iterator[tuple[str, float, float]]:
    """(name, its seconds, seconds left in all): what earlier ones did not need is shared by those that follow."""
    started, waiting = time.monotonic(), dict(shares)
    for name, share in shares.items():
        left = total - (time.monotonic() - started)
        yield name, left * share / sum(waiting.values()), left
        del waiting[name]


def run_apart(command: list[str], log: Path | None, seconds: float, **options) -> str:
    """Run a command, its output in `log`; end it and everything it started after `seconds`. Returns how it ended.

    options: of `subprocess.Popen`.
    """
    with open(log, "wb") if log else contextlib.nullcontext() as output:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output and subprocess.STDOUT, start_new_session=True, **options
        )
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s"
        finally:
            # Also what a part left behind must not go on while the next one measures.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(timeout=60)
    return "passed" if code == 0 else f"failed (exit {code}{f'; {log.parent.name}/{log.name}' if log else ''})"
