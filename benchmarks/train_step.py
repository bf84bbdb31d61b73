"""A LoRA training step over a trie, beside padded rows and padding-free packing: forward and backward, in turn.

    python -m benchmarks.train_step --data DIR --model qwen3 smollm2 [--out rows.csv]
    python -m benchmarks.train_step --data DIR --model smollm2 --exact     # how far gradients are from exact ones

Each batch holds rows of one task under its original instruction. Processor time of one thread, which other load on the
machine moves less than wall time; the median over batches of the sum of its rounds. `padded` is HF's model on the rows
padded to the longest, `padding-free` the same on `DataCollatorWithFlattening`'s one row (block-diagonal mask), `trie`
is `tree_logprobs`. A row is kept only if loss and gradients of all three agree. A run that was stopped goes on with
the tasks that its file lacks.

Exact gradients have weights, activations and the loss in float64, also where a model casts to float32 (its norms, HF's
loss); one forward and backward on padded rows. Distances are relative to the norm of each parameter's gradient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sapo_kernels import ResponseCache, TrieBatch, tree_logprobs
from sapo_kernels.files import atomic_write
from sapo_kernels.training.trie_batch import padded_rows
from sapo_kernels.widened import in_float64

from .documents import table
from .rows import csv_text, read_csv
from .workload import data_folder, load_pretrained, load_tasks, load_tokenizer, qwen3_shaped, with_lora

PROVIDERS = ("padded", "padding-free", "trie")
# How far two ways of computing a gradient may be apart, of its norm. Gemma's are each up to 6.7e-4 from the exact ones
# in float32 (`--exact --model gemma3-270m`), padded rows and trie alike.
BOUND, BOUNDS = 1e-3, {"gemma3-270m": 2e-3}


@dataclass(frozen=True)
class Step:
    """One batch: tokens and processor seconds of each provider; errors of the trie, relative, against padded rows."""

    model: str
    task: str
    batch: int
    padded_tokens: int
    free_tokens: int
    trie_tokens: int
    padded_s: float
    free_s: float
    trie_s: float
    loss_error: float
    gradient_error: float


def load(name: str, data: Path, hidden: int = 512, layers: int = 8):
    """(model with a LoRA on all linear layers, tokenizer). hidden, layers: of qwen3."""
    if name == "qwen3":
        tokenizer = load_tokenizer(data / "gpt2tokenizer")
        model = qwen3_shaped(len(tokenizer), hidden, layers)
    else:
        model, tokenizer = load_pretrained(name)
    return with_lora(model, 8, 32, init_lora_weights=False), tokenizer


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


def distances(found, exact) -> list[float]:
    """Relative difference of each parameter's gradient."""
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found, exact, strict=True)]


def print_errors(model, task: str, rows) -> None:
    """How far gradients on padded rows and over a trie are from exact ones; `model` is left in float32."""
    padded, found = padded_rows(rows), {}
    model.double()
    with in_float64():
        model.zero_grad()
        logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), padded["labels"][:, 1:].flatten()).backward()
        exact = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found["trie, float64"] = step(model, "trie", rows)[2]
    model.float()
    found |= {"padded, float32": step(model, "padded", padded)[2], "trie, float32": step(model, "trie", rows)[2]}
    for name, gradients in found.items():
        each = distances(gradients, exact)
        squares = [(far * float(own.norm())) ** 2 for far, own in zip(each, exact, strict=True)]
        whole = (sum(squares) / sum(float(own.norm()) ** 2 for own in exact)) ** 0.5
        numbers = " ".join(f"{value:8.1e}" for value in (max(each), statistics.median(each), whole))
        print(f"{task:9s} {name:16s} {numbers}", flush=True)


def measure(model, name: str, task: str, number: int, rows, rounds: int) -> Step:
    inputs = {"padded": padded_rows(rows), "padding-free": flattened(rows), "trie": rows}
    found = {provider: step(model, provider, inputs[provider]) for provider in PROVIDERS}
    times = {provider: [seconds] for provider, (seconds, _, _) in found.items()}
    for _ in range(rounds - 1):
        for provider in PROVIDERS:
            times[provider].append(step(model, provider, inputs[provider])[0])
    own = found["padded"]
    errors = [abs(float(found[provider][1] / own[1]) - 1) for provider in PROVIDERS[1:]]
    gradients = [max(distances(found[provider][2], own[2])) for provider in PROVIDERS[1:]]
    if max(errors) > 1e-5 or max(gradients) > BOUNDS.get(name, BOUND):
        raise SystemExit(f"losses differ by {errors}, gradients by {gradients} of their norm: nothing is reported")
    tokens = [inputs[provider]["input_ids"].numel() for provider in PROVIDERS[:2]]
    tokens.append(TrieBatch.pack(*zip(*rows, strict=True)).num_tokens)
    return Step(name, task, number, *tokens, *(min(times[p]) for p in PROVIDERS), errors[1], gradients[1])


def summary(rows: list[Step]) -> str:
    """A line a task, and geometric means: tokens and times of padded and padding-free rows over those of the trie."""
    body: list[list[str]] = []
    for model in dict.fromkeys(row.model for row in rows):
        ratios = []
        for task in dict.fromkeys(row.task for row in rows if row.model == model):
            own = [row for row in rows if (row.model, row.task) == (model, task)]
            tokens, free = (sum(getattr(r, n) for r in own) / sum(r.trie_tokens for r in own)
                            for n in ("padded_tokens", "free_tokens"))  # fmt: skip
            time_, free_time = (sum(getattr(r, n) for r in own) / sum(r.trie_s for r in own)
                                for n in ("padded_s", "free_s"))  # fmt: skip
            ratios.append((tokens, time_, free, free_time, time_ / tokens))
            body.append([model, task, *_shown(ratios[-1])])
        body.append(
            [model, "mean", *_shown([statistics.geometric_mean(column) for column in zip(*ratios, strict=True)])]
        )
    return "\n".join(table(["model", "task", "padded/trie", "time", "free/trie", "time", "realised"], body))


def _shown(ratios) -> list[str]:
    return [*(f"{ratio:.2f}" for ratio in ratios[:4]), f"{ratios[4]:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--model", nargs="+", default=["qwen3"], help="qwen3, smollm2, gemma3-270m or a folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="rows as CSV")
    parser.add_argument("--exact", action="store_true", help="one batch a task beside exact gradients, nothing timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, rows = data_folder(args.data), []
    if args.exact:
        print(f"{'task':9s} {'gradients':16s} {'worst':>8s} {'median':>8s} {'all':>8s}")
        for name in args.model:
            model, tokenizer = load(name, data)
            for task in load_tasks(data, args.tasks):
                print_errors(model, task.name.split("_")[0], batches_of(task, tokenizer, args.batch, 1)[0])
        return
    if args.out and args.out.exists():
        rows = [Step(**row) for row in read_csv(args.out, Step)]
    for name in args.model:
        model, tokenizer = load(name, data)
        for task in load_tasks(data, args.tasks):
            short = task.name.split("_")[0]
            if any((row.model, row.task) == (name, short) for row in rows):
                continue
            for number, batch in enumerate(batches_of(task, tokenizer, args.batch, args.batches)):
                rows.append(measure(model, name, short, number, batch, args.rounds))
                print(rows[-1], flush=True)
            if args.out:
                atomic_write(args.out, csv_text(rows))
    print(summary(rows))


if __name__ == "__main__":
    main()
