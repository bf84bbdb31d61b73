"""Thousands of scorings in one process: memory, open files and threads stay as they are."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.trainer.training_helpers import environment

CALLS_A_SAMPLE = 20


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def score(calls: int) -> dict:
    """Score in every way in turn, with caches made anew, raced, by each path; samples of what the process holds."""
    import torch

    import sapo_kernels as sk
    from tests.oracles import CHATML, byte_tokenizer, small_qwen3
    from tests.trainer.training_helpers import PHRASINGS, colours

    torch.set_num_threads(1)
    model, tokenizer = small_qwen3(), byte_tokenizer(chat_template=CHATML)
    prompts, examples = list(PHRASINGS[:3]), colours(8)
    cache = sk.ResponseCache.build(tokenizer, prompts, examples)
    ways = (
        lambda: sk.score_prompts(model, prompts, examples, tokenizer=tokenizer, progress=False),
        lambda: sk.score_prompts(model, cache, progress=False),
        lambda: sk.score_prompts(model, cache, impl="padded", progress=False),
        lambda: sk.score_prompts(model, cache, race=sk.Race(), progress=False),
    )
    found = {"memory": [], "files": [], "threads": []}
    first = [float(way().loss[0]) for way in ways]
    for call in range(calls):
        assert abs(float(ways[call % len(ways)]().loss[0]) - first[call % len(ways)]) < 1e-4
        if (call + 1) % CALLS_A_SAMPLE == 0:
            found["memory"].append(resident())
            found["files"].append(len(os.listdir("/proc/self/fd")))
            found["threads"].append(threading.active_count())
    return found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("calls", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_score_calls_leave_memory_flat(calls):
    code = f"import json; from tests.endurance.test_soak import score; print(json.dumps(score({calls})))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    memory = found["memory"]
    quarter = len(memory) // 4
    # The first quarter fills what is kept on purpose.
    grown = statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter])
    print(f"\n{calls} score calls: {grown / 2**20:+.2f} MiB from the second quarter to the last")
    assert grown < 2 * 2**20, memory
    assert found["files"][-1] == found["files"][0] and found["threads"][-1] == found["threads"][0]
