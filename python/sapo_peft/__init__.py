"""sapo_peft: the thin layer of SAPO (arXiv 2606.01967) into PEFT, transformers and the command line.

Names are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Examples": "data.examples",
    "PromptPool": "data.prompt_pool",
    "SapoCallback": "trainer.callback",
    "SapoCollator": "trainer.collator",
    "SapoConfig": "trainer.config",
    "attach_sapo": "trainer.attach",
    "last_good_checkpoint": "trainer.checkpoints",
    "plain_scores": "plain_loop",
    "read_examples": "data.examples",
    "read_prompts": "data.prompt_pool",
    "tiny_model": "tiny_random",
    "tiny_tokenizer": "tiny_random",
}
__all__ = [
    "Examples",
    "PromptPool",
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
    from .data.examples import Examples, read_examples
    from .data.prompt_pool import PromptPool, read_prompts
    from .plain_loop import plain_scores
    from .tiny_random import tiny_model, tiny_tokenizer
    from .trainer.attach import attach_sapo
    from .trainer.callback import SapoCallback
    from .trainer.checkpoints import last_good_checkpoint
    from .trainer.collator import SapoCollator
    from .trainer.config import SapoConfig


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
