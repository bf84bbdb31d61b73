"""What verification costs: a job without it, verified for the first time and again, in turn.

    python -m benchmarks.verification --data DIR --vocab 50257      # ten tasks, about 1,000 cells each

Processor time of one thread, which other load on the machine moves less than wall time; shares are of the job without
verification, medians over the rounds. The tokens of the verified cells beside those of the trie say what to expect.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

import sapo_kernels as sk
from sapo_kernels.scoring import score, verified_paths
from sapo_kernels.scoring.model_state import compilation_off, scoring_mode

from .documents import table
from .workload import build_cache, data_folder, load_tasks, load_tokenizer, qwen3_shaped

ROUNDS = 5


def without(model, cache) -> None:
    job = score.ScoringJob(model, cache, "auto", None, False)
    with scoring_mode(model), compilation_off():
        job.run("tree", [], None)


def first(model, cache) -> None:
    verified_paths._known.clear()
    assert len(sk.score_prompts(model, cache, progress=False).stats["verified"]) == 2


def again(model, cache) -> None:
    assert len(sk.score_prompts(model, cache, progress=False).stats["verified"]) == 1


def expected(cache, number: int) -> float:
    """Tokens of the verified cells over those of the trie: the longest cell, and the last in depth-first order."""
    cells = [int(cache.lengths.argmax()), cache.extremes[1]][:number]
    return float((cache.lengths[cells] + 1).sum() / len(cache.trie))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--vocab", type=int, default=50257)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = data_folder(args.data)
    tokenizer = load_tokenizer(data / "gpt2tokenizer")
    model, kinds = qwen3_shaped(args.vocab, 256, 4), (without, first, again)
    body = []
    for task in load_tasks(data):
        cache = build_cache(task, tokenizer, -(-1000 // len(task.prompts)))
        times: dict[str, list[float]] = {kind.__name__: [] for kind in kinds}
        without(model, cache)  # plans
        for _ in range(ROUNDS):
            for kind in kinds:
                begin = time.process_time()
                kind(model, cache)
                times[kind.__name__].append(time.process_time() - begin)
        shares = [
            statistics.median(a / b - 1 for a, b in zip(times[name], times["without"], strict=True))
            for name in ("first", "again")
        ]
        row = [*shares, expected(cache, 2), expected(cache, 1)]
        body.append([task.name[:20], str(len(cache.lengths)), *(f"{share:.2%}" for share in row)])
        print(*body[-1], flush=True)
    print("\n".join(table(["task", "cells", "first", "again", "tokens: first", "again"], body)))


if __name__ == "__main__":
    main()
