"""Tests and tools of the compiled modules."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What the compiled in-place operators and the planner are tested by, from `tests/` on.
NATIVE_TESTS = (
    "kernels/test_accumulate.py", "kernels/test_reweight.py", "kernels/test_in_place.py",
    "kernels/test_prompt_state.py", "kernels/test_planner.py", "kernels/test_passes.py",
    "kernels/test_trie.py", "native/test_native_attacks.py",
)  # fmt: skip


def run(*command: str | Path, cwd: Path = ROOT, minutes: float = 10.0, shown: bool = False, **environment: str) -> str:
    """What a command prints, its errors too, or nothing if it is `shown` as it comes; `RuntimeError` if it fails."""
    words = [str(part) for part in command]
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **environment}, timeout=60 * minutes, text=True, errors="replace",
        stdout=None if shown else subprocess.PIPE, stderr=None if shown else subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)[:300]}: exit {done.returncode}\n{(done.stdout or '')[-15_000:]}")
    return done.stdout or ""
