"""End to end on one machine, in one run, interleaved: score_prompts against the padded loop and tuned transformers.

    python -m benchmarks.end_to_end --data DIR --tasks task141 --examples 16 --vocab 50257
    python -m benchmarks.end_to_end --data DIR --examples 6            # every task of the folder

Every provider's cell sums are compared with the others before a time is printed. Times are the median over rounds; on a
shared CPU only the ratios mean something. "of ratio" is the speed-up over tuned_plain divided by dense / trie tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch

import sapo_kernels as sk
from sapo_kernels import plan_trie

from . import peers
from .workload import build_cache, load_tasks, load_tokenizer, qwen3_shaped

HEADER = "task             tokens/trie   ours s  tuned s   loop s  x tuned of ratio  x loop"
TOLERANCE = 1e-3  # nats per cell, fp32


def measure(model, cache, rounds: int, loop: bool, tuned_batches=(8, 32)) -> dict[str, float]:
    """Median seconds of each provider and the dense and trie tokens; raises if the numbers disagree."""
    providers = {"ours": lambda: sk.score_prompts(model, cache).nll.flatten()}
    for size in tuned_batches:
        providers[f"tuned_plain_{size}"] = lambda size=size: peers.tuned_plain(model, cache, size)
    if loop:
        providers["padded_loop"] = lambda: peers.padded_loop(model, cache)
    results = {name: run() for name, run in providers.items()}  # warm-up, and the check
    for name, nll in results.items():
        worst = float((nll - results["ours"]).abs().max())
        if not worst < TOLERANCE:
            raise SystemExit(f"{name} and ours differ by {worst:.3g} nats; no time is worth printing")
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, run in providers.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    row = {name: statistics.median(times) for name, times in seconds.items()}
    row["tuned_plain"] = min(row[f"tuned_plain_{size}"] for size in tuned_batches)
    trie = plan_trie(cache.ids, cache.offsets, cache.context_lengths)
    return {**row, "dense": trie.dense_tokens, "trie": len(trie)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with SUPERNI/ and paraphrases.json (default: bundled)")
    parser.add_argument("--tasks", nargs="*", help="task names, or their part before the first underscore")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-loop", action="store_true", help="leave out the padded loop, the slowest")
    args = parser.parse_args()

    data = args.data
    if data is None:
        from sapo_peft.bundled import BUNDLED_DIR as data
    folder = data / "gpt2tokenizer"
    tokenizer = load_tokenizer(folder if folder.exists() else None)
    model = qwen3_shaped(args.vocab, args.hidden, args.layers)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, hidden {args.hidden}, layers {args.layers}, "
          f"vocabulary {args.vocab}, {args.examples} examples, median of {args.rounds}")  # fmt: skip
    print(HEADER)
    speedups = []
    for task in load_tasks(data, args.tasks):
        row = measure(model, build_cache(task, tokenizer, args.examples), args.rounds, not args.no_loop)
        ratio, tuned = row["dense"] / row["trie"], row["tuned_plain"] / row["ours"]
        loop = row.get("padded_loop", math.nan)
        speedups.append(tuned)
        print(f"{task.name[:15]:<16}{ratio:>12.2f}{row['ours']:>9.2f}{row['tuned_plain']:>9.2f}{loop:>9.2f}{tuned:>9.2f}"
              f"{tuned / ratio:>9.0%}{loop / row['ours']:>8.2f}", flush=True)  # fmt: skip
    if len(speedups) > 1:
        print(f"geometric mean over tuned_plain: {statistics.geometric_mean(speedups):.2f}")


if __name__ == "__main__":
    main()
