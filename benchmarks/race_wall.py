"""Seconds to choose a task's prompt on a pretrained model: the published loop, every cell, and a race, in one run.

    python -m benchmarks.race_wall --data DIR --tasks task195 task141 [--model smollm2] [--examples 250] [--no-loop]

All read one cache of token ids, which nobody's time contains. The loop (`Trainer.evaluate` for each prompt, batches of
8, padded on the left: `peers/trainer_loop.py`) and every cell must agree on each prompt's published loss before a time
is printed. What each chose is printed with how far its loss over all cells is above the lowest. Processor seconds stand
beside wall seconds: on a shared machine they are the steadier of the two.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch

import sapo_kernels as sk

from .peers.trainer_loop import trainer_loop
from .real_matrices import INPUT_TOKENS, cut, load
from .workload import Task, load_tasks

TOLERANCE = 1e-3  # nats per token, fp32
COLUMNS = ("task", "provider", "wall_s", "cpu_s", "cells", "prompt", "above")


def timed(run) -> tuple[object, float, float]:
    """(what it made, wall seconds, processor seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = run()
    return made, time.perf_counter() - wall, time.process_time() - cpu


def compare(task: Task, model, tokenizer, examples: int, with_loop: bool) -> list[list]:
    """One row of `COLUMNS` for each provider."""
    rows = cut(task, tokenizer, INPUT_TOKENS)[:examples]
    cache = sk.ResponseCache.build(tokenizer, task.prompts, rows, suffix=task.suffix)
    # The check of the model and the imports of the loop are nobody's time.
    small = sk.ResponseCache.from_token_ids([row[:2] for row in cache.contexts[:2]], [cache.responses[0][:2]] * 2)
    sk.score_prompts(model, small, progress=False)
    full, *seconds = timed(lambda: sk.score_prompts(model, cache, progress=False))
    raced, *raced_seconds = timed(lambda: sk.score_prompts(model, cache, progress=False, race=sk.Race()))
    found = [
        ("every cell", seconds, full.nll.numel(), full.best),
        ("race", raced_seconds, raced.race.cells, raced.best),
    ]
    if with_loop:
        trainer_loop(model, small)
        losses, *loop_seconds = timed(lambda: trainer_loop(model, cache))
        worst = float((losses - full.reduce("batch", 8)).abs().max())
        if not worst < TOLERANCE:
            raise SystemExit(f"{task.name}: loop and every cell differ by {worst:.3g} nats per token")
        found.insert(0, ("loop", loop_seconds, full.nll.numel(), int(losses.argmin())))
    return [
        [task.name.split("_")[0], name, wall, cpu, cells, best, float(full.loss[best] / full.loss.min() - 1)]
        for name, (wall, cpu), cells, best in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3-270m or a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="folder with SUPERNI/")
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--examples", type=int, default=250)
    parser.add_argument("--no-loop", action="store_true", help="leave the published loop out")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.examples} examples")
    print("task      provider      wall s   cpu s   cells  prompt  its loss above the best")
    rows = []
    for task in load_tasks(args.data, args.tasks):
        for row in compare(task, model, tokenizer, args.examples, not args.no_loop):
            rows.append(row)
            name, provider, wall, cpu, cells, best, above = row
            print(f"{name:<10}{provider:<12}{wall:>8.1f}{cpu:>8.1f}{cells:>8}{best:>8}{above:>12.2%}", flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([[round(v, 4) if isinstance(v, float) else v for v in row] for row in rows])


if __name__ == "__main__":
    main()
