"""A decoder of about a million parameters that follows simple instructions and prefers some wordings to others.

    from tools.tiny_base import load_tiny_base
    model, tokenizer = load_tiny_base()          # or --model tiny-base on the command line

It is trained from scratch, tokenizer included, on small text skills and bundled tasks; `corpus.py` says on what. The
default ships with the package (bfloat16, 2 MB): results measured on it need the very same weights, which no other
machine would train bit for bit. ``python -m tools.tiny_base --preset default --out DIR`` trains it again, in about
ten minutes on two CPU cores.
"""

from __future__ import annotations

from typing import Any

from tools.tiny_base.presets import PRESETS, Preset
from tools.tiny_base.store import tiny_base_folder

__all__ = ["PRESETS", "Preset", "load_tiny_base", "tiny_base_folder"]


def load_tiny_base(preset: str = "default") -> tuple[Any, Any]:
    """(model in float32 on the CPU in eval mode, tokenizer); trains a preset that is not there yet."""
    from sapo_peft.loading import load

    return load(str(tiny_base_folder(preset)), None, "float32", "cpu")
