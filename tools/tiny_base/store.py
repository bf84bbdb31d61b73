"""A tiny base on disk: config.json, model.safetensors, the tokenizer's files and `made_by.json`.

The last names the preset, what the base was trained on and with, and the SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sapo_kernels.files import read_bytes, write_json
from tools.tiny_base.presets import Preset

MANIFEST = "made_by.json"


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    return hashlib.sha256(read_bytes(path, max_bytes=2**31)).hexdigest()


def texts_digest(preset: Preset) -> str:
    """SHA-256 (hex) of the first training texts of a preset, with and without the tasks of the sequences.

    The shipped base is compared by this and by its preset: its code may be tidied, its texts may not change.
    """
    from tools.tiny_base.corpus import Corpus

    corpus = Corpus(preset.seed)
    texts = [list(text) for share in (0.0, 1.0) for text in corpus.texts(300, share)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def make_base(preset: Preset, folder: Path, say: Callable[[str], None] = print) -> None:
    """Train a base and fill the empty `folder` with it; the weights are stored in bfloat16."""
    import torch

    from tools.tiny_base.corpus import Corpus
    from tools.tiny_base.training import train, train_tokenizer

    tokenizer = train_tokenizer(Corpus(preset.seed).vocabulary_texts(), preset.vocabulary)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, history = train(preset, Corpus(preset.seed), tokenizer, device, say)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_manifest(folder, preset, history, device)


def write_manifest(folder: Path, preset: Preset, history: dict[str, Any], device: str) -> None:
    """Write `made_by.json` for the files that lie in `folder`; the last file of a base."""
    import torch
    import transformers

    write_json(
        folder / MANIFEST,
        {
            "version": 1,
            "preset": asdict(preset),
            "texts": texts_digest(preset),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "device": device},
            "training": history,
            "files": {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST},
        },
    )
