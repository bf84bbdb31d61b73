"""A base with a large vocabulary that tells wordings apart, trained in minutes: what `benchmarks.race_wall` races on.

    python -m benchmarks.race_base --data DIR --out DIR [--steps 300]

The shape of the tiny base (4 layers of 128) with the tokenizer in `gpt2tokenizer/` of the data, trained from scratch on
the tasks there: rows that are not among the first 250, under six of a task's wordings, the r-th with weight 1/r, as the
shipped base has met its tasks. Seeded; one machine makes the same weights again.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path

import torch

from sapo_kernels.scoring.render import Renderer
from tools.tiny_base.presets import PRESETS
from tools.tiny_base.training import CONTEXT_STRIDE, new_model

from .race_matrices import shortened
from .workload import Task, load_tasks, load_tokenizer

PROBED, WORDINGS, BATCH, RATE, WORDS = 250, 6, 16, 3e-3, 40


class Texts:
    """Training texts as (ids of context and response, length of the context)."""

    def __init__(self, tasks: list[Task], tokenizer, seed: int):
        self.random, self.renderer = random.Random(seed), Renderer(tokenizer)
        self.tasks = [
            (self.random.sample(task.prompts, WORDINGS), shortened(task, len(task.examples), WORDS)[PROBED:])
            for task in tasks
        ]

    def one(self) -> tuple[list[int], int]:
        wordings, rows = self.random.choice(self.tasks)
        (wording,) = self.random.choices(wordings, [1 / rank for rank in range(1, WORDINGS + 1)])
        cell = self.renderer.render(wording, self.random.choice(rows))
        context = self.renderer.tokenizer(cell.context)["input_ids"]
        return context + self.renderer.tokenizer(cell.response)["input_ids"][:24], len(context)

    def batches(self, count: int) -> list[list[tuple[list[int], int]]]:
        """Batches of similar lengths, in random order."""
        texts = sorted((self.one() for _ in range(count * BATCH)), key=lambda text: len(text[0]))
        made = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        self.random.shuffle(made)
        return made


def loss_of(model, batch) -> torch.Tensor:
    """Mean loss of the responses and of every eighth token of the contexts."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    wanted = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
    for i, (row, context) in enumerate(batch):
        ids[i, : len(row)] = torch.tensor(row)
        wanted[i, : context - 1 : CONTEXT_STRIDE] = True
        wanted[i, context - 1 : len(row) - 1] = True
    # Padding stands on the right, so causal attention never reads it and no mask is needed.
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[wanted]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][wanted])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with SUPERNI/ and gpt2tokenizer/")
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.data / "gpt2tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    preset = replace(PRESETS["default"], vocabulary=len(tokenizer))
    texts, model = Texts(load_tasks(args.data, args.tasks), tokenizer, seed=0), new_model(preset, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=args.steps, pct_start=0.1)
    started, waiting = time.perf_counter(), []
    for step in range(args.steps):
        waiting = waiting or texts.batches(min(16, args.steps - step))
        loss = loss_of(model, waiting.pop())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
