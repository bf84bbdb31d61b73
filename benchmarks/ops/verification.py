"""What verification costs, in processor time, which other load on the machine moves less than wall time.

``ours`` is a job whose way was verified before, ``first`` one that has to be verified, ``without`` one that is not. The
shape says the verified cells' tokens over those of the trie: what to expect.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import sapo_kernels as sk
from sapo_kernels.scoring import score, verified_paths
from sapo_kernels.scoring.model_state import compilation_off, scoring_mode

from ..registry import Op, Setting
from ..timing import Case
from ..workload import build_cache
from .end_to_end import model_of, tasks_of, tokenizer_of


def make(setting: Setting, name: str):
    """About 1,000 cells of a task."""
    task, tokenizer = tasks_of(setting)[name], tokenizer_of(setting)
    cache = build_cache(task, tokenizer, 1 if setting.toy else -(-1000 // len(task.prompts)))
    # The longest cell is verified every time, the last in depth-first order at first.
    tokens = (cache.lengths[[int(cache.lengths.argmax()), cache.extremes[1]]] + 1) / len(cache.trie)
    shape = f"cells={len(cache.lengths)} again={tokens[0]:.2%} first={tokens.sum():.2%}"
    case = Case("verification", name, check=lambda wrong: float(wrong), shape=shape, clock=time.process_time,
                tokens=len(cache.trie))  # fmt: skip
    model = model_of(2816, 128, 2) if setting.toy else model_of(50257, 256, 4)
    return case, SimpleNamespace(model=model, cache=cache)


verification = Op("verification", make, names=lambda setting: list(tasks_of(setting)), share=0.0)


@verification.provider("without")
def without(x):
    def run() -> bool:
        job = score.ScoringJob(x.model, x.cache, "auto", None, False)
        with scoring_mode(x.model), compilation_off():
            job.run("tree", [], None)
        return False

    return run


@verification.provider("first")
def first(x):
    def run() -> bool:
        verified_paths._known.clear()
        return len(sk.score_prompts(x.model, x.cache, progress=False).stats["verified"]) != 2

    return run


@verification.provider("ours")
def ours(x):
    return lambda: len(sk.score_prompts(x.model, x.cache, progress=False).stats["verified"]) != 1
