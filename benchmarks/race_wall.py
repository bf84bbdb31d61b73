"""Exact levers and a race together, end to end: seconds to choose a task's prompt on a trained model, in one run.

    python -m benchmarks.race_wall --base DIR --tasks task03 [--data DIR] [--examples 250] [--rounds 1]

Providers: the usual loop (padded batches of 8, every cell), `score_prompts` on every cell, and `score_prompts` with a
race. The first two must agree on every cell before a time is printed; what each chose is printed with the loss that the
full matrix gives it. Processor seconds stand beside wall seconds: on a shared machine they are the steadier of the two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

import sapo_kernels as sk

from .peers.plain import padded_loop
from .workload import build_cache, load_tasks

TOLERANCE = 1e-3  # nats per cell, fp32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of a trained causal LM and its tokenizer")
    parser.add_argument("--data", type=Path, help="folder with SUPERNI/ (default: the bundled tasks)")
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--examples", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = args.data
    if data is None:
        from sapo_peft.bundled import BUNDLED_DIR as data
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.examples} examples")
    print("task             provider   wall s   cpu s  x loop (wall, cpu)   cells  prompt  its loss above the best")
    for task in load_tasks(data, args.tasks):
        cache = build_cache(task, tokenizer, args.examples)
        providers = {
            "loop": lambda cache=cache: padded_loop(model, cache),
            "full": lambda cache=cache: sk.score_prompts(model, cache, progress=False),
            "race": lambda cache=cache: sk.score_prompts(model, cache, progress=False, race=sk.Race()),
        }
        seconds = {name: ([], []) for name in providers}
        made = {}
        for _ in range(args.rounds):
            for name, run in providers.items():
                wall, cpu = time.perf_counter(), time.process_time()
                made[name] = run()
                seconds[name][0].append(time.perf_counter() - wall)
                seconds[name][1].append(time.process_time() - cpu)
        full = made["full"]
        worst = float((made["loop"].view(full.nll.shape) - full.nll).abs().max())
        if not worst < TOLERANCE:
            raise SystemExit(f"loop and full differ by {worst:.3g} nats; no time is worth printing")
        loop = [statistics.median(times) for times in seconds["loop"]]
        best = {"loop": full.best, "full": full.best, "race": made["race"].best}
        for name, times in seconds.items():
            wall, cpu = (statistics.median(part) for part in times)
            cells = made["race"].race.cells if name == "race" else full.nll.numel()
            above = float(full.loss[best[name]] / full.loss.min() - 1)
            print(
                f"{task.name[:15]:<17}{name:<8}{wall:>9.1f}{cpu:>8.1f}{loop[0] / wall:>12.1f}{loop[1] / cpu:>7.1f}"
                f"{cells:>8}{best[name]:>8}{above:>12.2%}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
