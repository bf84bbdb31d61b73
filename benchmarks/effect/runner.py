"""Runs what `design.py` says, one small file a finished run, so that a killed runner goes on where it was."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sapo_kernels.files import read_json
from sapo_peft.assets import tiny_base_folder
from sapo_peft.sequence import SequenceConfig, run_sequence
from sapo_peft.tiny_base import load_tiny_base, sequence_tasks

from . import design, rows
from .single import Damage, run_task


def made_by() -> dict[str, Any]:
    """What decides the rows of this experiment: the weights, the options and the versions of the libraries."""
    import peft
    import transformers

    manifest = read_json(tiny_base_folder() / "made_by.json")
    return {
        "base": manifest["files"]["model.safetensors"],
        "orders": {name: list(tasks) for name, tasks in design.ORDERS.items()},
        "sequence": dict(design.SEQUENCE_OPTIONS),
        "again": dict(design.AGAIN_OPTIONS),
        "single": asdict(design.SINGLE),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "machine": f"{platform.machine()}, CPU, {torch.get_num_threads()} thread",
    }


def run_sequences(work: Path, backwards: bool, until: float) -> int:
    """All sequence runs that are missing; returns how many still are when the time is up."""
    base, tokenizer = load_tiny_base()
    mark, left = made_by(), 0
    for run in _ordered(design.sequence_runs(), backwards):
        if rows.done(work, "sequences", run.name, mark):
            continue
        if time.time() > until:
            left += 1
            continue
        started = time.perf_counter()
        row = sequence_row(base, tokenizer, run)
        rows.put(work, "sequences", run.name, mark, [row])
        print(f"{run.name}: rougeL AP {row['rougeL']['AP']:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return left


def sequence_row(base: Any, tokenizer: Any, run: design.Run) -> dict[str, Any]:
    """One sequence run as a row: the metrics with their matrices, the prompts chosen, the cost."""
    again = run.policy == design.AGAIN
    options = {**design.SEQUENCE_OPTIONS, **(design.AGAIN_OPTIONS if again else {})}
    config = SequenceConfig(method=run.method, policy="sapo" if again else run.policy, seed=run.seed, **options)
    tasks = sequence_tasks(design.ORDERS[run.order], run.seed, config.test_examples)
    result = run_sequence((base, tokenizer), tasks, None, config, order=run.order, name="tiny-base", progress=False)
    metrics = {name: rows.rounded(entry) for name, entry in result.metrics.items()}
    cost = {name: round(value, 3) for name, value in result.cost.items()}
    return {**run._asdict(), **metrics, "prompts": [choice["index"] for choice in result.choices], "cost": cost}


def run_singles(work: Path, backwards: bool, until: float) -> int:
    """All single-task runs that are missing, the prompts of a (task, seed) in one file."""
    base, tokenizer = load_tiny_base()
    mark, left, damage = made_by(), 0, None
    for task, seed in _ordered(design.single_runs(), backwards):
        name = f"{task}_{seed}"
        if rows.done(work, "single", name, mark):
            continue
        if time.time() > until:
            left += 1
            continue
        damage = damage or Damage(tokenizer, design.SINGLE)
        started = time.perf_counter()
        found = run_task(base, tokenizer, task, seed, None, design.SINGLE, damage)
        rows.put(work, "single", name, mark, [rows.rounded(row) for row in found])
        print(f"{name}: {len(found)} prompts, {time.perf_counter() - started:.0f} s", flush=True)
    return left


def _ordered(runs: Iterable[Any], backwards: bool) -> list[Any]:
    """From the first or from the last, so that two processes meet in the middle."""
    return list(runs)[:: -1 if backwards else 1]
