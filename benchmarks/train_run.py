"""A whole run with SAPO beside the plain trainer's: selection by a race and training over tries, against padded rows.

    python -m benchmarks.train_run --data DIR --tasks task141 task195 task618 [--model qwen3|smollm2]

Both train the same LoRA for one epoch of the same examples with HF's `Trainer`, batch 16. The plain run uses the
original instruction and padded rows; SAPO's scores all prompts on 250 examples first (`race`), and trains on the
winner. Then once more over the trie with the original alone, whose loss must be the plain run's. Processor seconds of
one thread, everything between making the trainer and the end of ``train()`` included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

import sapo_kernels as sk

from .train_step import load
from .workload import data_folder, load_tasks


def run(name: str, data: Path, task, prompts: list[str], packing: str, scores: bool):
    """(processor seconds, loss of the last tenth of the steps, callback). scores: race the prompts before training."""
    from transformers import Trainer, TrainingArguments, set_seed

    from sapo_peft import PromptPool, SapoConfig, attach_sapo

    set_seed(0)
    model, tokenizer = load(name, data, 256, 4)
    pool = PromptPool.build(task.name, prompts[0], prompts[1:], suffix=task.suffix)
    config = SapoConfig(at_start=scores, probe_examples=250, race=sk.Race(), packing=packing)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=16, learning_rate=1e-4, logging_steps=1, seed=0,
            save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        begin = time.process_time()
        trainer = Trainer(model, args, train_dataset=task.examples[:1000], processing_class=tokenizer)
        callback = attach_sapo(trainer, pool, config=config)
        trainer.train()
        seconds = time.process_time() - begin
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    tail = losses[-max(1, len(losses) // 10) :]
    return seconds, sum(tail) / len(tail), callback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--model", default="qwen3", help="as benchmarks.train_step has it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = data_folder(args.data)
    for task in load_tasks(data, args.tasks):
        plain, loss, _ = run(args.model, data, task, task.prompts[:1], "padded", scores=False)
        ours, own_loss, callback = run(args.model, data, task, task.prompts, "trie", scores=True)
        same, same_loss, _ = run(args.model, data, task, task.prompts[:1], "trie", scores=False)
        scored = callback.history[0]
        print(
            f"{task.name.split('_')[0]:9s} plain {plain:6.0f} s, with SAPO {ours:6.0f} s ({ours / plain:.2f}; of it "
            f"selection {callback.score_seconds:.0f} s wall, {scored.cells_saved:.0%} of the cells saved); the same "
            f"prompt over the trie {same:6.0f} s; losses {loss:.4f}, {own_loss:.4f}, {same_loss:.4f}",
            flush=True,
        )
        if abs(same_loss - loss) > 1e-3 * loss:
            raise SystemExit("expected the same loss over the trie")


if __name__ == "__main__":
    main()
