"""Sequences of tasks: a LoRA adapter a task, each trained on a prompt chosen by a policy, and what it costs the others.

From Python::

    from sapo_peft.sequence import SequenceConfig, read_order, run_sequence

    tasks = read_order("data/SUPERNI", "ni_seq_c1")        # or SequenceTask.build(name, train, test, pool) for each
    config = SequenceConfig(method="lora-inc", policy="sapo", train_examples=200, epochs=2, seed=1)
    result = run_sequence("tiny", tasks, "runs/a", config, order="ni_seq_c1")
    result.metrics["rougeL"]["AP"], result.matrix("rougeL"), result.choices, result.cost

`run_sequence(model, tasks, output_dir, config)`: `model` is "tiny", a folder, a hub name, a pair (model, tokenizer) or
a function that returns such a pair. A model that is handed over is left as it was, so one base model in memory serves
any number of runs. The same call in the same folder resumes a killed run, or returns at once what a
complete one found; another configuration is refused, and so is a folder whose files are not as they were written.
``output_dir=None`` runs without a folder: nothing is written.

`SequenceTask.build(name, train, test, pool)`: rows are files (.json, .jsonl, .csv, .tsv), lists of mappings or HF
`Dataset` objects; `pool` is a `PromptPool` (its prompt 0 is the original).

`SequenceConfig(evaluate="all" | "seen" | "last", generate=False, eval_loss=True)` is the cheap evaluation: the
teacher-forced loss of the targets (nats per token, metric "loss", lower is better) instead of generated answers.
`score_always=True` scores every pool before its task under any policy. See `config.py` for all options.

`load_adapters(model, run_dir)` puts the adapters of a finished run back onto a base model, active together;
`export_adapter(run_dir, out)` writes them as one LoRA adapter that needs nothing of this package.

One task on its way: `runner` - `folder` (where) - `training`, `methods` (what) - `evaluate`, `metrics` (how well) -
`results`, `folder` (kept).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import METHODS, POLICIES, SequenceConfig
    from .export import export_adapter
    from .methods import load_adapters, orthogonality
    from .results import SequenceResult, sequence_metrics
    from .runner import run_sequence
    from .tasks import SequenceTask, read_order, read_tasks

_HOMES = {
    "METHODS": "config", "POLICIES": "config", "SequenceConfig": "config", "SequenceResult": "results",
    "SequenceTask": "tasks", "export_adapter": "export", "load_adapters": "methods", "orthogonality": "methods",
    "read_order": "tasks", "read_tasks": "tasks", "run_sequence": "runner", "sequence_metrics": "results",
}  # fmt: skip
__all__ = [
    "METHODS", "POLICIES", "SequenceConfig", "SequenceResult", "SequenceTask", "export_adapter", "load_adapters",
    "orthogonality", "read_order", "read_tasks", "run_sequence", "sequence_metrics",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
