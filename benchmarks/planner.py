"""The compiled trie planner: its curve over job sizes, ratios to numpy in one run, adversarial shapes, peak memory.

    python -m benchmarks.planner                       # 10 k to 10 M tokens
    python -m benchmarks.planner --tokens 1050000 --rounds 51

Jobs are 21 prompts x M examples, about 200 tokens a sequence, the instruction first. `plan_trie` (arguments checked, a
TokenTrie returned) and `plan_numpy` (int64 arrays in, a dict of arrays returned) take turns on the same arrays, and
their outputs are compared before a time is printed. "alone" repeats `plan_trie` without numpy in between, so that the
allocator hands out memory it already has. Peak memory is that of a fresh process that plans the largest job.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from sapo_kernels import native, plan_trie
from sapo_kernels.trie.numpy_planner import plan_numpy

PROMPTS = 21
MEAN_TOKENS = 200
SIZES = (10_000, 100_000, 1_050_000, 10_000_000)
HEADER = "    tokens sequences      trie   ms p50    best  ns/token   numpy p50      best  x p50  x best   alone p50"


def make_job(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """About `tokens` dense tokens, written in place so that building them needs no second copy."""
    rng = np.random.default_rng(0)
    examples = max(1, round(tokens / (PROMPTS * MEAN_TOKENS)))
    head = rng.integers(31, 91, PROMPTS)
    text, answer = rng.integers(60, 210, examples), rng.integers(1, 6, examples)
    full = (head[:, None] + text + answer).ravel()
    offsets = np.concatenate([[0], np.cumsum(full)])
    ids = np.empty(offsets[-1], dtype=np.int64)
    texts = [rng.integers(0, 50_000, n) for n in text + answer]
    cell = 0
    for n in head:
        prompt = np.concatenate([np.arange(5), rng.integers(0, 50_000, n - 5)])
        for own in texts:
            at = offsets[cell]
            ids[at : at + n] = prompt
            ids[at + n : offsets[cell + 1]] = own
            cell += 1
    return ids, offsets, (head[:, None] + text).ravel()


def equal_lengths(sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The job of a [C, n] matrix of tokens with one token of context each."""
    cells, n = sequences.shape
    return sequences.ravel(), np.arange(0, cells * n + 1, n), np.ones(cells, np.int64)


def nested(tokens: int, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences of which each is a prefix of the next, shortest (step 1) or longest (step -1) first."""
    cells = int((2 * tokens) ** 0.5)
    lengths = np.arange(2, cells + 2)[::step]
    return np.ones(lengths.sum(), np.int64), np.concatenate([[0], np.cumsum(lengths)]), np.ones(cells, np.int64)


def comb(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences that leave one long one after 1, 2, 3, ... tokens, in no order."""
    ids, offsets, contexts = nested(tokens, 1)
    order = np.random.default_rng(0).permutation(len(contexts))
    lengths = np.diff(offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
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


def check(trie, wanted: dict) -> None:
    for name, value in wanted.items():
        ours = getattr(trie, name)
        same = ours == value if name == "dense_tokens" else ours.dtype == value.dtype and np.array_equal(ours, value)
        if not same:
            raise SystemExit(f"{name} differs from the numpy planner's; no time is worth printing")


def seconds(run, results: list[float]) -> None:
    started = time.perf_counter()
    kept = run()
    results.append(time.perf_counter() - started)
    del kept


def measure(tokens: int, rounds: int) -> None:
    job = make_job(tokens)
    trie = plan_trie(*job)
    check(trie, plan_numpy(*job))
    sequences, unique = len(trie.leaf), len(trie)
    del trie
    rounds = max(3, min(rounds, 15_000_000 // len(job[0])))
    ours, numpy, alone = [], [], []
    for _ in range(rounds):
        seconds(lambda: plan_trie(*job), ours)
        seconds(lambda: plan_numpy(*job), numpy)
    for _ in range(rounds):
        seconds(lambda: plan_trie(*job), alone)
    size, p50, best = len(job[0]), statistics.median(ours) * 1e3, min(ours) * 1e3
    slow, slow_best, again = statistics.median(numpy) * 1e3, min(numpy) * 1e3, statistics.median(alone) * 1e3
    print(f"{size:>10}{sequences:>10}{unique:>10}{p50:>9.2f}{best:>8.2f}{p50 / size * 1e6:>10.2f}{slow:>12.2f}"
          f"{slow_best:>10.2f}{slow / p50:>7.1f}{slow_best / best:>8.1f}{again:>12.2f}", flush=True)  # fmt: skip


def measure_shapes(sizes: tuple[int, ...]) -> None:
    """Nanoseconds per token of shapes that make other algorithms quadratic; the best of five."""
    print(f"\n{'ns/token, best of 5':<30}" + "".join(f"{size:>12}" for size in sizes))
    for name, make in SHAPES.items():
        row = ""
        for size in sizes:
            job, times = make(size), []
            check(plan_trie(*job), plan_numpy(*job))
            for _ in range(5):
                seconds(lambda job=job: plan_trie(*job), times)
            row += f"{min(times) / len(job[0]) * 1e9:>12.2f}"
        print(f"{name:<30}{row}", flush=True)


def status_mib(field: str) -> float:
    """VmRSS or VmHWM, the peak, of this process; Linux only."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def report_memory(tokens: int) -> None:
    """What planning adds to this process, which should be a fresh one."""
    job = make_job(tokens)
    before, peak_before = status_mib("VmRSS"), status_mib("VmHWM")
    started = time.perf_counter()
    trie = plan_trie(*job)
    took, peak = time.perf_counter() - started, status_mib("VmHWM")
    held = sum(a.nbytes for a in vars(trie).values() if isinstance(a, np.ndarray)) / 2**20
    print(f"{len(job[0])} tokens in a fresh process: {before:.0f} MiB before (peak {peak_before:.0f}; the job is "
          f"{sum(a.nbytes for a in job) / 2**20:.0f}), peak {peak:.0f} MiB, of which the plan is {held:.0f}; "
          f"first plan {took * 1e3:.1f} ms")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=SIZES)
    parser.add_argument("--rounds", type=int, default=31, help="at most; large jobs take fewer, at least 3")
    parser.add_argument("--shapes", type=int, nargs="*", default=(250_000, 1_000_000, 4_000_000))
    parser.add_argument("--memory", type=int, metavar="TOKENS", help="only plan one job and print the peak memory")
    args = parser.parse_args()
    if native.planner() is None:
        raise SystemExit(f"the compiled planner is {native.status()['_planner']}")
    if args.memory:
        return report_memory(args.memory)
    print(HEADER)
    for tokens in args.tokens:
        measure(tokens, args.rounds)
    if args.shapes:
        measure_shapes(tuple(args.shapes))
    command = [sys.executable, "-m", "benchmarks.planner", "--memory", str(max(args.tokens))]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1])


if __name__ == "__main__":
    main()
