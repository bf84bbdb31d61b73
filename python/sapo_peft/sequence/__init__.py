"""Sequences of tasks: a LoRA adapter a task, each trained on a prompt chosen by a policy, and what it costs the others.

    tasks = read_order("data/SUPERNI", "ni_seq_c1")        # or SequenceTask.build(name, train, test, pool) for each
    config = SequenceConfig(method="lora-inc", policy="sapo", train_examples=200, epochs=2, seed=1)
    result = run_sequence("tiny", tasks, "runs/a", config, order="ni_seq_c1")
    result.metrics["rougeL"]["AP"], result.matrix("rougeL"), result.choices, result.cost

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
