"""Small sequences on a tiny model, and what the tests of `sapo_peft.sequence` look at."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from sapo_kernels.files import read_json
from sapo_peft import PromptPool
from sapo_peft.sequence import SequenceConfig, SequenceTask, run_sequence
from sapo_peft.sequence import runner as runner_module
from tests.oracles import CHATML, byte_tokenizer, small_qwen3
from tests.trainer.training_helpers import PHRASINGS, WORDS

# Seconds are what a run took, never what it found; digests of files with seconds in them are others.
TIMES = (
    "seconds", "score_seconds", "train_seconds", "eval_seconds", "overhead_fraction", "started", "finished", "sha256",
    "size",
)  # fmt: skip


def model_and_tokenizer(seed: int = 0):
    return small_qwen3(seed=seed), byte_tokenizer(chat_template=CHATML)


def rows_of(task: int, count: int, first: int = 0) -> list[dict[str, str]]:
    """Rows whose texts and targets differ from task to task and in length."""
    return [
        {"input": f"{WORDS[(i + task) % 16]} {'x' * (i % 5)}{i}", "target": WORDS[(5 * i + 3 * task) % 16]}
        for i in range(first, first + count)
    ]


def small_task(task: int, prompts: int = 3, train: int = 8, test: int = 3) -> SequenceTask:
    texts = [f"{text} ({task})" for text in PHRASINGS[:prompts]]
    pool = PromptPool.build(f"colours{task}", texts[0], texts[1:], suffix="One word.")
    return SequenceTask.build(f"colours{task}", rows_of(task, train), rows_of(task, test, 100), pool)


def small_tasks(count: int, **options) -> list[SequenceTask]:
    return [small_task(task, **options) for task in range(1, count + 1)]


def small_config(**options) -> SequenceConfig:
    """4 steps a task of 2 examples, a high learning rate so that every task changes something."""
    defaults: dict[str, Any] = dict(
        epochs=1, batch_size=2, learning_rate=3e-2, lora_r=4, probe_examples=3, max_new_tokens=4, logging_steps=2,
        target_modules=("q_proj", "v_proj"), eval_loss=True, seed=3,
    )  # fmt: skip
    return SequenceConfig(**{**defaults, **options})


def run_small(output=None, count: int = 2, model=None, tasks=None, order: str = "", **options):
    pair = model or model_and_tokenizer()
    return run_sequence(pair, tasks or small_tasks(count), output, small_config(**options), order=order, progress=False)


def run_begun(output, done: int, **options) -> None:
    """A run that ends with an error when it has done that many tasks."""
    plain, left = runner_module.train_task, iter(range(1, done + 1))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(runner_module, "train_task", lambda *args: next(left) and plain(*args))
        run_small(output, **options)


def adapter_bytes(folder: Path) -> dict[str, str]:
    """SHA-256 of every adapter's weights, by task folder."""
    files = sorted(folder.glob("tasks/[0-9]*/adapter/adapter_model.safetensors"))
    return {file.parts[-3]: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Stop(BaseException):
    """Not an `Exception`: nothing on the way may think that it has been dealt with."""


def stop_at(monkeypatch, number: int | None) -> dict:
    """Counts every write of a run (a file or folder that gets its name) under "n"; the `number`-th is a `Stop`."""
    counted = {"n": 0, "stop": number}

    def before(plain):
        def write(*args, **kwargs):
            counted["n"] += 1
            if counted["n"] == counted["stop"]:
                raise Stop
            return plain(*args, **kwargs)

        return write

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, before(getattr(os, name)))
    return counted


def without_times(value: Any) -> Any:
    """JSON values without the entries that hold times."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def everything(folder: Path) -> dict[str, Any]:
    """What a run ended with: every JSON file without times, and the adapters' bytes."""
    found: dict[str, Any] = {"adapters": adapter_bytes(folder)}
    for file in sorted(folder.rglob("*.json")):
        found[str(file.relative_to(folder))] = without_times(read_json(file))
    return found
