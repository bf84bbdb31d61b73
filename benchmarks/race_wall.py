"""Exact levers and a race together, end to end: seconds to choose a task's prompt on a trained model, in one run.

    python -m benchmarks.race_wall --tasks task01 task04 [--base DIR] [--data DIR] [--examples 250] [--rounds 1]

For each task on the base as it is: the published loop (`Trainer.evaluate` for each prompt, batches of 8, padded on the
left: `peers/trainer_loop.py`), `score_prompts` on every cell, and `score_prompts` with a race. With `--steps N` then N
steps of LoRA training on the task, and the loop, every cell, and a race with the first matrix as memory. All providers
read one cache of token ids, which nobody's time contains.

The loop and every cell must agree on each prompt's published loss before a time is printed. What each provider chose is
printed with how far its loss over all cells is above the lowest. Processor seconds stand beside wall seconds: on a
shared machine they are the steadier of the two.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import sapo_kernels as sk
from sapo_kernels.files import atomic_write

from .effect.design import RATE
from .peers.trainer_loop import trainer_loop
from .race_matrices import lora, shortened, train
from .workload import data_folder, load_tasks

TOLERANCE = 1e-3  # nats per token, fp32
COLUMNS = (
    "task", "state", "vocabulary", "provider", "wall_s", "cpu_s", "x_loop_wall", "x_loop_cpu", "cells", "prompt",
    "above",
)  # fmt: skip


def timed(providers: dict[str, Callable], rounds: int) -> tuple[dict, dict[str, tuple[float, float]]]:
    """(what each provider made, median wall and processor seconds of each); they run in turns."""
    seconds = {name: ([], []) for name in providers}
    made = {}
    for turn in range(rounds):
        names = list(providers)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            made[name] = providers[name]()
            seconds[name][0].append(time.perf_counter() - wall)
            seconds[name][1].append(time.process_time() - cpu)
    return made, {name: tuple(statistics.median(part) for part in parts) for name, parts in seconds.items()}


def compare(task: str, state: int, model, cache: sk.ResponseCache, race: sk.Race, rounds: int):
    """(one row of `COLUMNS` for each provider, the scores of every cell)."""
    providers = {
        "loop": lambda: trainer_loop(model, cache),
        "full": lambda: sk.score_prompts(model, cache, progress=False),
        "race": lambda: sk.score_prompts(model, cache, progress=False, race=race),
    }
    # The probe of the model and the imports of the loop are nobody's time.
    small = sk.ResponseCache.from_token_ids(
        [row[:2] for row in cache.contexts[:2]], [row[:2] for row in cache.responses[:2]]
    )
    trainer_loop(model, small)
    sk.score_prompts(model, small, progress=False)
    made, seconds = timed(providers, rounds)
    full = made["full"]
    worst = float((made["loop"] - full.reduce("batch", 8)).abs().max())
    if not worst < TOLERANCE:
        raise SystemExit(f"{task}: loop and full differ by {worst:.3g} nats per token; no time is worth printing")
    best = {"loop": int(made["loop"].argmin()), "full": full.best, "race": made["race"].best}
    rows = []
    for name, (wall, cpu) in seconds.items():
        cells = made["race"].race.cells if name == "race" else full.nll.numel()
        above = float(full.loss[best[name]] / full.loss.min() - 1)
        loop = seconds["loop"]
        label = "race, memory" if name == "race" and race.memory else name
        rows.append([
            task.split("_")[0], state, model.config.vocab_size, label, wall, cpu, loop[0] / wall, loop[1] / cpu, cells,
            best[name], above,
        ])  # fmt: skip
        ratios = f"{loop[0] / wall:>10.1f}{loop[1] / cpu:>7.1f}"
        print(
            f"{rows[-1][0]:<10}{state:>5}  {label:<13}{wall:>8.2f}{cpu:>8.2f}{ratios}{cells:>8}{best[name]:>8}"
            f"{above:>12.2%}", flush=True,
        )  # fmt: skip
    return rows, full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny-base", help="folder of a causal LM and tokenizer (default: shipped)")
    parser.add_argument("--data", type=Path, help="folder with SUPERNI/ (default: the bundled tasks)")
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--examples", type=int, default=250)
    parser.add_argument("--words", type=int, default=40, help="words of an input")
    parser.add_argument("--steps", type=int, default=0, help="LoRA steps before a re-score with memory")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()

    from sapo_peft.loading import load

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.examples} examples")
    print("task      state  provider       wall s   cpu s  x loop (wall, cpu)   cells  prompt  its loss above the best")
    rows = []
    for task in load_tasks(data_folder(args.data), args.tasks):
        model, tokenizer = load(args.base, None, "float32", "cpu")
        cache = sk.ResponseCache.build(tokenizer, task.prompts, shortened(task, args.examples, args.words))
        made, full = compare(task.name, 0, model, cache, sk.Race(), args.rounds)
        rows += made
        if args.steps:
            model = lora(model, seed=0)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
            constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
            best = full.best
            texts = list(zip(cache.contexts[best], cache.responses[best], strict=True))
            train(model, optimizer, constant, texts, range(args.steps))
            rows += compare(task.name, args.steps, model, cache, sk.Race(memory=full), args.rounds)[0]
    if args.csv:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([[round(v, 4) if isinstance(v, float) else v for v in row] for row in rows])
        atomic_write(args.csv, text.getvalue())


if __name__ == "__main__":
    main()
