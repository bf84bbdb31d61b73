"""How every command says what is wrong: one printable line."""

from __future__ import annotations

import argparse
import os
from typing import NoReturn

from ..terminal import plain

# Errors whose message is written for people; any other type is named in front of its message.
_SPEAKING = (ValueError, RuntimeError, NotImplementedError, ImportError)
# Packages that are not there after a plain installation, by the extra that brings them.
_EXTRAS = {
    "train": ("transformers", "peft", "accelerate", "datasets", "pyarrow", "pydantic", "tqdm", "yaml", "rouge_score",
              "safetensors", "tokenizers", "huggingface_hub", "jinja2", "scipy", "filelock"),
    "paraphrase": ("openai", "httpx", "tenacity"),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Errors on one line, in the same form as all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sapo: error: {_one_line(message)} (see {self.prog} --help)\n")


def describe(error: BaseException) -> str:
    """One printable line for an exception."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return _one_line(f"{name}{error.strerror}")
    text = str(error) or "no message"
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        for extra, packages in _EXTRAS.items():
            if package in packages:
                return f"{package} is not installed; this command needs: pip install 'sapo-kernels[{extra}]'"
    return _one_line(text if isinstance(error, _SPEAKING) else f"{type(error).__name__}: {text}")


def _one_line(text: str, limit: int = 1000) -> str:
    text = " ".join(text.split())
    return plain(text if len(text) <= limit else text[: limit - 3] + "...")
