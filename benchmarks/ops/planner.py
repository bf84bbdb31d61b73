"""plan_trie against the numpy planner: jobs of 21 prompts, and shapes that make other algorithms quadratic.

Jobs have about 200 tokens a sequence, the instruction first. Both planners take the same arrays; the first gives a
TokenTrie, the second a dict of arrays.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from sapo_kernels import native, plan_trie
from sapo_kernels.trie.numpy_planner import plan_numpy

from ..registry import Op, Setting
from ..timing import Case

Job = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, offsets, context lengths: int64


def prompts_first(tokens: int) -> Job:
    """About `tokens` dense tokens."""
    rng, prompts = np.random.default_rng(0), 21
    examples = max(1, round(tokens / (prompts * 200)))
    head = rng.integers(31, 91, prompts)
    text, answer = rng.integers(60, 210, examples), rng.integers(1, 6, examples)
    offsets = np.concatenate([[0], np.cumsum((head[:, None] + text + answer).ravel())])
    texts = [rng.integers(0, 50_000, n) for n in text + answer]
    starts = [np.concatenate([np.arange(5), rng.integers(0, 50_000, n - 5)]) for n in head]
    ids = np.concatenate([part for prompt in starts for own in texts for part in (prompt, own)])
    return ids, offsets, (head[:, None] + text).ravel()


def equal_lengths(sequences: np.ndarray) -> Job:
    """The job of a [C, n] matrix of tokens with one token of context each."""
    cells, n = sequences.shape
    return sequences.ravel(), np.arange(0, cells * n + 1, n), np.ones(cells, np.int64)


def nested(tokens: int, step: int) -> Job:
    """Sequences of which each is a prefix of the next, shortest (step 1) or longest (step -1) first."""
    cells = int((2 * tokens) ** 0.5)
    lengths = np.arange(2, cells + 2)[::step]
    return np.ones(lengths.sum(), np.int64), np.concatenate([[0], np.cumsum(lengths)]), np.ones(cells, np.int64)


def comb(tokens: int) -> Job:
    """Sequences that leave one long one after 1, 2, 3, ... tokens, in no order."""
    ids, offsets, contexts = nested(tokens, 1)
    order = np.random.default_rng(0).permutation(len(contexts))
    offsets = np.concatenate([[0], np.cumsum(np.diff(offsets)[order])])
    ids[offsets[1:] - 2] = 2 + order % 7
    return ids, offsets, contexts


SHAPES = {
    "all equal": lambda n: equal_lengths(np.tile(np.arange(200), (n // 200, 1))),
    "all distinct, 3 tokens each": lambda n: equal_lengths(np.random.default_rng(0).integers(0, 2**62, (n // 3, 3))),
    "two sequences": lambda n: equal_lengths(np.tile(np.arange(n // 2), (2, 1))),
    "prefixes, shortest first": lambda n: nested(n, 1),
    "prefixes, longest first": lambda n: nested(n, -1),
    "comb": comb,
}


def make(setting: Setting, name: str, tokens: int, build=prompts_first):
    job = build(tokens)
    exact = plan_numpy(*job)

    def check(plan) -> float:
        found = plan if isinstance(plan, dict) else {name: getattr(plan, name) for name in exact}
        dtypes = all(np.asarray(found[n]).dtype == np.asarray(v).dtype for n, v in exact.items() if n != "dense_tokens")
        return 0.0 if dtypes and all(np.array_equal(found[n], v) for n, v in exact.items()) else float("inf")

    dense, unique = len(job[0]), len(exact["tokens"])
    case = Case(
        "planner", name, check=check, tolerance=0.0, shape=f"dense={dense} trie={unique}", dtype="int64", tokens=dense,
        work=8.0 * dense + 16.0 * unique, work_unit="B", formula="8*dense tokens read + 16*trie tokens written",
        rounds=15 if tokens < 5_000_000 else 3,
    )  # fmt: skip
    return case, SimpleNamespace(job=job)


planner = Op(
    "planner", make, toy=(2_000,), share=0.04,
    cpu={
        "10 k tokens": (10_000,), "100 k tokens": (100_000,), "1 M tokens": (1_050_000,), "10 M tokens": (10_000_000,),
        **{f"{name}, 1 M tokens": (1_000_000, build) for name, build in SHAPES.items()},
    },
)  # fmt: skip


if native.planner() is not None:

    @planner.provider("ours")
    def ours(x):
        return lambda: plan_trie(*x.job)


@planner.provider("numpy")
def numpy_planner(x):
    return lambda: plan_numpy(*x.job)
