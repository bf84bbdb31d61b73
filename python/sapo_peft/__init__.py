"""sapo_peft: the thin layer of SAPO (arXiv 2606.01967) into PEFT, transformers and the command line.

Names are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Examples": "data",
    "PromptPool": "prompt_pool",
    "PromptSet": "data",
    "SapoCallback": "callback",
    "SapoCollator": "collator",
    "SapoConfig": "config",
    "attach_sapo": "attach",
    "last_good_checkpoint": "checkpoints",
    "plain_scores": "plain_loop",
    "read_examples": "data",
    "read_prompts": "data",
    "tiny_model": "tiny",
    "tiny_tokenizer": "tiny",
}
__all__ = [
    "Examples",
    "PromptPool",
    "PromptSet",
    "SapoCallback",
    "SapoCollator",
    "SapoConfig",
    "attach_sapo",
    "last_good_checkpoint",
    "plain_scores",
    "read_examples",
    "read_prompts",
    "tiny_model",
    "tiny_tokenizer",
]

if TYPE_CHECKING:
    from .attach import attach_sapo
    from .callback import SapoCallback
    from .checkpoints import last_good_checkpoint
    from .collator import SapoCollator
    from .config import SapoConfig
    from .data import Examples, PromptSet, read_examples, read_prompts
    from .plain_loop import plain_scores
    from .prompt_pool import PromptPool
    from .tiny import tiny_model, tiny_tokenizer


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
