"""Loss matrices of a trained model on real tasks while it is being trained: what `benchmarks.racing` replays.

    python -m benchmarks.race_matrices --out DIR [--data DIR] [--examples 250] [--states 0 5 20]

The base is the one that ships with the package (or `--base DIR`). For each task: a fresh LoRA, trained as in the effect
experiment (20 steps of 8 examples, learning rate 6e-3, cosine, no answer-format line) with the prompt that has the
lowest loss at the start, as SAPO does; all prompts are scored on the first examples at each state. One safetensors file
a task: "TASK/nll" [S, K, M] float32, nats, "TASK/tokens" [K, M] int16, and "TASK/responses" [M] int16, equal numbers
for equal responses. Everything is seeded. `--pack FILE` puts them all in one file.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import sapo_kernels as sk
from sapo_kernels.files import atomic_write

from .effect.design import BATCH, RATE, STEPS
from .workload import Task, load_tasks

WARM_UP_STEPS = 1


def lora(model, seed: int):
    """A fresh rank-8 LoRA on the attention and MLP of `model`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"))


def train(model, optimizer, schedule, rows: list[tuple[list[int], list[int]]], steps: range) -> float:
    """Plain training on (context, response) rows, `BATCH` a step in order; the last step's loss."""
    model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss = torch.zeros(())
    for step in steps:
        batch = [rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)]
        width = max(len(context) + len(response) for context, response in batch)
        ids = torch.zeros(BATCH, width, dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for b, (context, response) in enumerate(batch):
            length = len(context) + len(response)
            ids[b, :length] = torch.tensor(context + response)
            labels[b, len(context) : length] = torch.tensor(response)
            mask[b, :length] = 1
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return float(loss.detach())


def shortened(task: Task, examples: int, words: int) -> list[dict[str, str]]:
    """The first examples with the first words of their inputs: cutting tokens would leave long prompts less of them."""
    return [{**row, "input": " ".join(row["input"].split(" ")[:words])} for row in task.examples[:examples]]


def matrices(base, tokenizer, task: Task, examples: int, states: list[int], words: int) -> dict[str, torch.Tensor]:
    """The tensors of one task's file; states in optimizer steps."""
    from transformers import get_cosine_schedule_with_warmup

    model = lora(base, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP_STEPS, max(STEPS, *states))
    cache = sk.ResponseCache.build(tokenizer, task.prompts, shortened(task, examples, words), max_target=32)
    found, rows = [], None
    for at, (before, state) in enumerate(zip([0, *states], states, strict=False)):
        started = time.perf_counter()
        loss = train(model, optimizer, schedule, rows, range(before, state)) if state > before else float("nan")
        trained = time.perf_counter() - started
        scores = sk.score_prompts(model, cache, progress=False)
        if rows is None:
            best = scores.best
            rows = list(zip(cache.contexts[best], cache.responses[best], strict=True))
        found.append(scores)
        scored = time.perf_counter() - started - trained
        print(
            f"{task.name[:12]:<12} state {at} step {state}: training loss {loss:.3f} ({trained:.0f} s), prompts "
            f"{scores.loss.min():.4f} to {scores.loss.max():.4f}, best {scores.best} ({scored:.0f} s)", flush=True,
        )  # fmt: skip
    _, responses = np.unique([str(ids) for ids in cache.responses[0]], return_inverse=True)
    return {
        f"{task.name}/nll": torch.stack([scores.nll for scores in found]).float(),
        f"{task.name}/tokens": found[0].tokens.short(),
        f"{task.name}/responses": torch.from_numpy(responses).short(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny-base", help="folder of a causal LM and tokenizer (default: shipped)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="*", help="folders with SUPERNI/ (default: the bundled tasks)")
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--examples", type=int, default=250)
    parser.add_argument("--states", type=int, nargs="*", default=[0, 5, 20])
    parser.add_argument("--words", type=int, default=40, help="words of an input")
    parser.add_argument("--pack", type=Path, help="write all tensors of --out into this file as well")
    args = parser.parse_args()

    from safetensors.torch import load_file, save

    from sapo_peft.loading import load

    folders = args.data
    if not folders:
        from sapo_peft.assets import BUNDLED_DIR

        folders = [BUNDLED_DIR]
    args.out.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        for task in load_tasks(folder, args.tasks):
            path = args.out / f"{task.name}.safetensors"
            if not path.exists():
                base, tokenizer = load(args.base, None, "float32", "cpu")
                made = matrices(base, tokenizer, task, args.examples, args.states, args.words)
                atomic_write(path, save(made))
    if args.pack:
        files = sorted(args.out.glob("*.safetensors"))
        atomic_write(args.pack, save({k: v for file in files for k, v in load_file(file).items()}))


if __name__ == "__main__":
    main()
