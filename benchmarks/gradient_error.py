"""How far the gradients of a LoRA step are from exact ones, on padded rows and over a trie.

    python -m benchmarks.gradient_error --data DIR --model smollm2 --tasks task141 task195 [--rows 6]

Exact: weights, activations and the loss in float64, also where a model casts to float32 (its norms, HF's loss); one
forward and backward on padded rows. Then the same in float64 over the trie, and both in float32. Relative to the norm
of each parameter's gradient: the worst parameter, the median one, and all of them together.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from sapo_kernels.training.trie_batch import padded_rows
from sapo_kernels.widened import in_float64

from .train_step import batches_of, load, step
from .workload import data_folder, load_tasks


def exact_gradients(model, batch) -> list[torch.Tensor]:
    """Of the mean loss over all labels, in float64 throughout; the model's own dtype must be float64."""
    model.zero_grad()
    with in_float64():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def distances(found, exact) -> tuple[float, float, float]:
    """(worst, median, all together)."""
    each = [float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found, exact, strict=True)]
    square = [float((a.double() - b).square().sum()) for a, b in zip(found, exact, strict=True)]
    whole = sum(square) / sum(float(b.square().sum()) for b in exact)
    return max(each), statistics.median(each), whole**0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="qwen3", help="as in benchmarks.train_step")
    parser.add_argument("--tasks", nargs="+", default=["task141"])
    parser.add_argument("--rows", type=int, default=6)
    args = parser.parse_args()
    torch.manual_seed(0)
    data = data_folder(args.data)
    model, tokenizer = load(args.model, data)
    print(f"{'task':9s} {'gradients':16s} {'worst':>8s} {'median':>8s} {'all':>8s}")
    for task in load_tasks(data, args.tasks):
        rows = batches_of(task, tokenizer, args.rows, 1)[0]
        padded = padded_rows(rows)
        exact = exact_gradients(model.double(), padded)
        with in_float64():
            found = {"trie, float64": step(model, "trie", rows)[2]}
        model.float()
        found |= {"padded, float32": step(model, "padded", padded)[2], "trie, float32": step(model, "trie", rows)[2]}
        for name, gradients in found.items():
            numbers = " ".join(f"{value:8.1e}" for value in distances(gradients, exact))
            print(f"{task.name.split('_')[0]:9s} {name:16s} {numbers}", flush=True)


if __name__ == "__main__":
    main()
