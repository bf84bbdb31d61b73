"""Where a tiny base lies: shipped with the package, or in the user's cache under a hash of what makes it.

A folder holds config.json, model.safetensors, the tokenizer's files and `made_by.json`, which names the preset, the
hash of what the weights were made by and the SHA-256 of every other file. It is published whole, by one rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError, read_bytes, write_json
from sapo_peft import assets, tiny_random
from sapo_peft.assets import MANIFEST, faults, file_digest
from tools.tiny_base.presets import PRESETS, Preset

logger = logging.getLogger("sapo_peft")

SHIPPED = assets.TINY_BASE_DIR
_HERE = Path(__file__).resolve().parent


def cache_root() -> Path:
    """``~/.cache/sapo-kernels/tiny-base``."""
    return Path.home() / ".cache" / "sapo-kernels" / "tiny-base"


def content_hash(preset: Preset) -> str:
    """SHA-256 (hex) of the code of this folder, the bundled data and their generators, and the preset."""
    files = [
        *_HERE.glob("*.py"),
        *(_HERE.parent / "bundled_tasks").glob("*.py"),
        *assets.BUNDLED_DIR.glob("*.json"),
        *assets.BUNDLED_DIR.glob("SUPERNI/**/*.json"),
        Path(tiny_random.__file__),
    ]
    found = hashlib.sha256(json.dumps(asdict(preset), sort_keys=True).encode())
    for path in sorted(files):
        data = read_bytes(path)
        found.update(f"\0{path.name}\0{len(data)}\0".encode() + data)
    return found.hexdigest()


def texts_digest(preset: Preset) -> str:
    """SHA-256 (hex) of the first training texts of a preset, with and without the tasks of the sequences.

    The shipped base is compared by this and by its preset: its code may be tidied, its texts may not change.
    """
    from tools.tiny_base.corpus import Corpus

    corpus = Corpus(preset.seed)
    texts = [list(text) for share in (0.0, 1.0) for text in corpus.texts(300, share)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def tiny_base_folder(preset: str = "default", root: Path | None = None, make: Callable | None = None) -> Path:
    """The folder of a tiny base: a Llama-shaped checkpoint and its tokenizer, readable by `from_pretrained`.

    The default preset ships with the package. Others are trained at the first call and kept under `root` (default
    `cache_root()`) by `content_hash`; a stored one that is torn or changed is made again. Two processes at once both
    train, and the first to finish is kept. `make(preset, folder)` fills an empty folder; the default is `make_base`.

    Raises: `DataError` for a preset that does not exist or shipped files that are damaged.
    """
    if preset not in PRESETS:
        raise DataError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    if preset == "default" and root is None:
        if wrong := faults(SHIPPED):
            raise DataError(f"the tiny base that ships with the package is damaged: {wrong[0]}")
        return SHIPPED
    root = cache_root() if root is None else root
    folder = root / f"{preset}-{content_hash(PRESETS[preset])[:20]}"
    if folder.exists():
        if not (wrong := faults(folder)):
            return folder
        logger.warning("%s; training this base again", wrong[0])
        _discard(folder)
    root.mkdir(parents=True, exist_ok=True)
    staging = root / f".{folder.name}-{secrets.token_hex(6)}"
    staging.mkdir()
    try:
        (make or make_base)(PRESETS[preset], staging)
        with contextlib.suppress(OSError):  # another process was first: its base is as good
            os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if wrong := faults(folder):
        raise DataError(f"the base that was just made is damaged: {wrong[0]}")
    return folder


def make_base(preset: Preset, folder: Path, say: Callable[[str], None] = logger.info) -> None:
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
            "content": content_hash(preset),
            "texts": texts_digest(preset),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "device": device},
            "training": history,
            "files": {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST},
        },
    )


def _discard(folder: Path) -> None:
    """Remove a folder so that no one sees half of it."""
    aside = folder.with_name(f".{folder.name}-{secrets.token_hex(6)}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
