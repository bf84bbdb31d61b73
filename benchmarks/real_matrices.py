"""Loss matrices of pretrained models on real tasks: what `benchmarks.racing` judges the race by.

    python -m benchmarks.real_matrices --data DIR --out DIR [--model smollm2] [--tasks task195 task141]
    python -m benchmarks.real_matrices --out DIR --pack benchmarks/results/race_matrices_real.safetensors

The data folder holds ``SUPERNI/`` and ``paraphrases.json``. For each task two states of the model: ``base``, as it
comes, and ``tuned``, after 30 LoRA steps on the next task. All prompts are scored on the first examples; long inputs
are cut, and a matrix has as many examples as its tokens allow. One safetensors file a matrix, written whole: a run that
was stopped goes on with those that are missing. "nll" [K, M] float32, nats; "tokens" [K, M] int16. `--pack` collects
them as MODEL/TASK/STATE/nll and MODEL/TASK/tokens.

Scores are made in bfloat16 by default, as on a GPU: on a CPU with bfloat16 instructions three times as fast as float32.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import sapo_kernels as sk
from sapo_kernels.files import atomic_write

from .workload import Task, cut, load_pretrained, load_tasks, with_lora

STATES = ("base", "tuned")
STEPS, BATCH, RATE, RANK = 30, 8, 1e-3, 16
INPUT_TOKENS, MAX_EXAMPLES, MIN_EXAMPLES = 64, 250, 100


def build_cache(task: Task, tokenizer, budget: int) -> sk.ResponseCache:
    """As many of the examples as fit into `budget` tokens of the trie, but `MIN_EXAMPLES` at least."""
    examples = cut(task.examples[:MAX_EXAMPLES], tokenizer, INPUT_TOKENS)
    whole = sk.ResponseCache.build(tokenizer, task.prompts, examples, suffix=task.suffix, max_target=64)
    trie = sum(len(step.input_ids) for step in whole.plan(1024).passes)
    count = min(len(examples), max(MIN_EXAMPLES, budget * len(examples) // trie))
    return sk.ResponseCache.build(tokenizer, task.prompts, examples[:count], suffix=task.suffix, max_target=64)


def tune(model, cache: sk.ResponseCache, prompt: int = 0):
    """`model` after `STEPS` steps of a LoRA on all linear layers, on the cells of one prompt; merged."""
    torch.manual_seed(0)
    model = with_lora(model, RANK, 2 * RANK)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    rows = list(zip(cache.contexts[prompt], cache.responses[prompt], strict=True))
    # Nothing is verified: Gemma's float32 gradients err by more than the comparison allows, which is no matter here.
    for step in range(STEPS):
        batch = [rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)]
        (-sk.tree_logprobs(model, sk.TrieBatch.pack(*zip(*batch, strict=True)), verify=False).mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.merge_and_unload().eval()


def make(name: str, dtype: torch.dtype, tasks: list[Task], out: Path, budget: int) -> None:
    """Every matrix of `tasks` that is not there."""
    from safetensors.torch import save

    # Tasks tell more than states: all as the model comes first.
    for state in STATES:
        for at, task in enumerate(tasks):
            path = out / f"{Path(name).stem.replace('.', '_')}.{task.name}.{state}.safetensors"
            if path.exists():
                continue
            started = time.perf_counter()
            model, tokenizer = load_pretrained(name)
            if state == "tuned":
                other = tasks[(at + 1) % len(tasks)]
                model = tune(model, build_cache(other, tokenizer, 0))
            model = model.to(dtype)
            cache = build_cache(task, tokenizer, budget)
            prepared = time.perf_counter() - started
            scores = sk.score_prompts(model, cache, progress=False)
            atomic_write(path, save({"nll": scores.nll.float(), "tokens": scores.tokens.short()}))
            print(
                f"{path.stem}: {cache.num_prompts} x {cache.num_examples}, {scores.stats['trie_tokens']} tokens, "
                f"{scores.stats['seconds']:.0f} s after {prepared:.0f} s", flush=True,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3-270m or a .gguf file")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="*", help="in this order (default: all)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000, help="of a matrix, about")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--pack", type=Path, help="write all matrices of --out into this file")
    args = parser.parse_args()

    from safetensors.torch import load_file, save

    args.out.mkdir(parents=True, exist_ok=True)
    if args.data:
        tasks = load_tasks(args.data, args.tasks)
        order = args.tasks or []
        tasks.sort(key=lambda task: order.index(task.name.split("_")[0]) if order else 0)
        make(args.model, getattr(torch, args.dtype), tasks, args.out, args.tokens)
    if args.pack:
        packed = {}
        for file in sorted(args.out.glob("*.safetensors")):
            model, task, state = file.stem.split(".")
            one, name = load_file(file), f"{model}/{task}/tokens"
            # The states of a task may have other numbers of its examples, always the first ones.
            kept, new = sorted((packed.get(name, one["tokens"]), one["tokens"]), key=lambda t: -t.shape[1])
            if not torch.equal(kept[:, : new.shape[1]], new):
                parser.error(f"--pack: expected the same tokens in all states of {task}, got others in {file}")
            packed |= {name: kept, f"{model}/{task}/{state}/nll": one["nll"]}
        atomic_write(args.pack, save(packed))


if __name__ == "__main__":
    main()
