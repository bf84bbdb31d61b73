"""A LoRA training step over a trie, beside padded rows and padding-free packing: forward and backward, in turn.

    python -m benchmarks.train_step --data DIR --model qwen3 smollm2 [--out rows.csv]

Each batch holds rows of one task under its original instruction. Processor time of one thread, which other load on the
machine moves less than wall time; the median over batches of the sum of its rounds. `padded` is HF's model on the rows
padded to the longest, `padding-free` the same on `DataCollatorWithFlattening`'s one row (block-diagonal mask), `trie`
is `tree_logprobs`. A row is kept only if loss and gradients of all three agree. A run that was stopped goes on with
the tasks that its file lacks.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
import time
from pathlib import Path

import torch

from sapo_kernels import ResponseCache, TrieBatch, tree_logprobs
from sapo_kernels.files import atomic_write
from sapo_kernels.training.trie_batch import padded_rows

from .rows import csv_text
from .workload import data_folder, load_tasks, load_tokenizer, qwen3_shaped

PROVIDERS = ("padded", "padding-free", "trie")
COLUMNS = ("model", "task", "batch", "padded_tokens", "free_tokens", "trie_tokens", "padded_s", "free_s", "trie_s",
           "loss_error", "gradient_error")  # fmt: skip


def load(name: str, data: Path, hidden: int = 512, layers: int = 8):
    """(model with a LoRA on all linear layers, tokenizer). hidden, layers: of qwen3."""
    from peft import LoraConfig, get_peft_model

    if name == "qwen3":
        tokenizer = load_tokenizer(data / "gpt2tokenizer")
        model = qwen3_shaped(len(tokenizer), hidden, layers)
    else:
        from sapo_peft import loading

        model, tokenizer = loading.load(name, None, "float32", "cpu")
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, lora).train(), tokenizer


def batches_of(task, tokenizer, size: int, count: int) -> list[list[tuple[list[int], list[int]]]]:
    """`count` batches of `size` rows (context, response)."""
    rows = task.examples[: size * count]
    cache = ResponseCache.build(tokenizer, task.prompts[:1], rows, suffix=task.suffix)
    cells = list(zip(cache.contexts[0], cache.responses[0], strict=True))
    return [cells[i : i + size] for i in range(0, len(cells), size)]


def flattened(rows):
    from transformers import DataCollatorWithFlattening

    features = [{"input_ids": c + r, "labels": [-100] * len(c) + r} for c, r in rows]
    return DataCollatorWithFlattening()(features, return_tensors="pt")


def step(model, provider: str, batch) -> tuple[float, torch.Tensor, list[torch.Tensor]]:
    """(processor seconds, loss, gradients) of one forward and backward."""
    model.zero_grad()
    begin = time.process_time()
    if provider == "trie":
        loss = -tree_logprobs(model, TrieBatch.pack(*zip(*batch, strict=True)), verify=False).mean()
    else:
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    seconds = time.process_time() - begin
    return seconds, loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def distance(one, other) -> float:
    """Largest relative difference of a parameter's gradient."""
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(one, other, strict=True))


def measure(model, rows, rounds: int) -> dict[str, float]:
    inputs = {"padded": padded_rows(rows), "padding-free": flattened(rows), "trie": rows}
    found = {name: [step(model, name, inputs[name]) for name in (name,)][0] for name in PROVIDERS}
    times = {name: [found[name][0]] for name in PROVIDERS}
    for _ in range(rounds - 1):
        for name in PROVIDERS:
            times[name].append(step(model, name, inputs[name])[0])
    own = found["padded"]
    errors = [abs(float(found[n][1] / own[1]) - 1) for n in PROVIDERS[1:]]
    gradients = [distance(found[n][2], own[2]) for n in PROVIDERS[1:]]
    if max(errors) > 1e-5 or max(gradients) > 1e-3:
        raise SystemExit(f"losses differ by {errors}, gradients by {gradients} of their norm: nothing is reported")
    return {
        "padded_tokens": inputs["padded"]["input_ids"].numel(),
        "free_tokens": inputs["padding-free"]["input_ids"].numel(),
        "trie_tokens": TrieBatch.pack(*zip(*rows, strict=True)).num_tokens,
        "padded_s": min(times["padded"]),
        "free_s": min(times["padding-free"]),
        "trie_s": min(times["trie"]),
        "loss_error": errors[1],
        "gradient_error": gradients[1],
    }


def summary(rows: list[dict]) -> str:
    """One line a task, and the geometric means."""
    lines = [
        f"{'model':9s} {'task':9s} {'padded/trie':>12s} {'time':>6s} {'free/trie':>10s} {'time':>6s} {'realised':>9s}"
    ]
    ratios: dict[str, list[tuple[float, ...]]] = {}
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in rows):
        own = [row for row in rows if (row["model"], row["task"]) == (model, task)]
        total = {name: sum(float(row[name]) for row in own) for name in COLUMNS[3:9]}
        tokens, seconds = total["padded_tokens"] / total["trie_tokens"], total["padded_s"] / total["trie_s"]
        free, free_s = total["free_tokens"] / total["trie_tokens"], total["free_s"] / total["trie_s"]
        ratios.setdefault(model, []).append((tokens, seconds, free, free_s, seconds / tokens))
        lines.append(
            f"{model:9s} {task:9s} {tokens:12.2f} {seconds:6.2f} {free:10.2f} {free_s:6.2f} {seconds / tokens:9.0%}"
        )
    for model, found in ratios.items():
        means = [math.exp(statistics.fmean(map(math.log, column))) for column in zip(*found, strict=True)]
        lines.append(
            f"{model:9s} {'mean':9s} {means[0]:12.2f} {means[1]:6.2f} {means[2]:10.2f} {means[3]:6.2f} {means[4]:9.0%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--model", nargs="+", default=["qwen3"], help="qwen3, smollm2, gemma3-270m or a folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="rows as CSV")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = data_folder(args.data), []
    if args.out and args.out.exists():
        rows = list(csv.DictReader(io.StringIO(args.out.read_text(encoding="utf-8"))))
    for name in args.model:
        model, tokenizer = load(name, data)
        for task in load_tasks(data, args.tasks):
            short = task.name.split("_")[0]
            if any(row["model"] == name and row["task"] == short for row in rows):
                continue
            batches = batches_of(task, tokenizer, args.batch, args.batches)
            rows += [
                {"model": name, "task": short, "batch": i, **measure(model, batch, args.rounds)}
                for i, batch in enumerate(batches)
            ]
            if args.out:
                atomic_write(args.out, csv_text(rows, list(COLUMNS)))
            print(summary(rows[-args.batches :]).splitlines()[1], flush=True)
    print(summary(rows))


if __name__ == "__main__":
    main()
