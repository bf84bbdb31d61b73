"""Loading a model, its tokenizer and an adapter for the command line: safetensors only, no code from outside.

transformers and PEFT only warn when weights are missing and go on with random ones. Here that is an error: a
score of a half-loaded model looks like any other score.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from sapo_kernels.files import DataError, excerpt, read_json
from sapo_kernels.scoring.render import with_end_token

from .assets import tiny_base_folder
from .gguf import MODELS, load_gguf, resolve
from .hub import hub_answers
from .trainer.checkpoints import check_adapter

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_LAYER = re.compile(r"\.\d+\.")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "no device is visible" if built else f"torch {torch.__version__} is built without it"
        raise DataError(f"--device cuda: expected a CUDA device, got none ({why})")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def spare_threads(name: str) -> None:
    """One thread for the models that ship with the package, unless ``OMP_NUM_THREADS`` is set.

    Their matrices are small: a second thread gains little, and on a busy machine the two wait for each other.
    """
    if name in ("tiny", "tiny-base") and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def load(
    name: str, adapter: str | None, dtype: str, device: str, tokenizer: str | None = None, option: str = "--model"
) -> tuple[Any, Any]:
    """(model in eval mode on its device, tokenizer).

    name: a folder, a hub name, a GGUF file, ``tiny``, ``tiny-base``, ``smollm2`` or ``gemma3-270m`` (see gguf.py).
    adapter: a folder or hub name of a PEFT adapter. dtype:
    ``auto`` keeps the checkpoint's on a GPU and takes float32 on the CPU. tokenizer: a folder or hub name if it does
    not lie beside the model. option: that of the command line which named the model, for messages.

    Raises: `DataError` naming the option, what was expected and what was got.
    """
    place = pick_device(device)
    quiet_libraries()
    kind = _DTYPES.get(dtype, torch.float32 if place.type == "cpu" else "auto")
    own = None
    if name == "tiny":
        from .tiny_random import tiny_model, tiny_tokenizer

        model, own = tiny_model(), tiny_tokenizer()
        model = model if kind == "auto" else model.to(kind)
    else:
        file = None
        if name == "tiny-base":
            name = str(tiny_base_folder())
        elif name in MODELS or name.lower().endswith(".gguf"):
            name, file = resolve(name)
        if file is None:
            model = _load_model(name, kind, option)
        else:
            model, own = load_gguf(name, file, torch.float32 if kind == "auto" else kind)
    if own is None or tokenizer is not None:
        own = _load_tokenizer(name if tokenizer is None else tokenizer)
    if adapter is not None:
        model = _load_adapter(model, adapter)
    return model.to(place).eval(), with_end_token(own, model)


def quiet_libraries() -> None:
    """Keep the notices and bars of transformers off the terminal; what matters is checked here instead."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _source(option: str, name: str, *needed: str) -> tuple[str, bool]:
    """(what to hand to `from_pretrained`, whether it is a folder); a folder must hold one of `needed`."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in needed):
            raise DataError(f"{option} {name}: expected a folder with {' or '.join(needed)}, got one without")
        return str(path), True
    looks_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or path.exists()
    if looks_local or not _HUB_NAME.fullmatch(name):
        got = "a file" if path.is_file() else "no such folder"
        raise DataError(f"{option} {excerpt(name, 200)}: expected a folder or a hub name, got {got}")
    if not hub_answers(name):
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(name, local_files_only=True), True
        except Exception as error:
            why = "no such folder, and the hub does not answer"
            raise DataError(f"{option} {name}: {why}") from error
    return name, False


def _load_model(name: str, dtype: Any, option: str) -> Any:
    from transformers import AutoModelForCausalLM

    source, local = _source(option, name, "config.json")
    if local:
        for file in (Path(source, "config.json"), Path(source, "model.safetensors.index.json")):
            if file.is_file() and not isinstance(found := read_json(file), dict):  # one clear message if it is damaged
                raise DataError(f"{file}: expected an object, got {excerpt(found)}")
        if not list(Path(source).glob("*.safetensors")):
            raise DataError(f"{option} {name}: expected weights as .safetensors in this folder, got none")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            local_files_only=local,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise DataError(_why(option, name, local, error)) from error
    # Left over are parts of more layers than the configuration has; heads and towers that are not used are no fault.
    shapes = {_LAYER.sub(".#.", name) for name in model.state_dict()}
    left_over = [key for key in info["unexpected_keys"] if _LAYER.sub(".#.", key) in shapes]
    for what, keys in (("missing", info["missing_keys"]), ("of another shape", info["mismatched_keys"]),
                       ("of layers that config.json does not have", left_over)):  # fmt: skip
        if keys:
            first = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)[0]
            expected = f"all weights of {type(model).__name__}"
            raise DataError(f"{option} {name}: expected {expected}, got {len(keys)} {what} ({first}, ...)")
    return model


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    source, local = _source("tokenizer", name, *_TOKENIZER_FILES)
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        raise DataError(_why("tokenizer", name, local, error)) from error


def _load_adapter(model: Any, name: str) -> Any:
    from peft import PeftModel

    source, local = _source("--adapter", name, "adapter_config.json")
    if not local:
        from huggingface_hub import snapshot_download

        try:
            # Only these files: a pickled adapter is never fetched, hence never loaded.
            needed = ["adapter_config.json", "adapter_model.safetensors"]
            source = snapshot_download(name, allow_patterns=needed)
        except Exception as error:
            raise DataError(_why("--adapter", name, False, error)) from error
    weights = Path(source, "adapter_model.safetensors")
    if not weights.is_file():
        got = "none (pickled adapters are not loaded)"
        raise DataError(f"--adapter {name}: expected adapter_model.safetensors, got {got}")
    read_json(Path(source, "adapter_config.json"))
    if local:
        check_adapter(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = PeftModel.from_pretrained(model, source, is_trainable=False)
    except Exception as error:
        got = _first_line(error)
        raise DataError(f"--adapter {name}: expected an adapter for this model, got: {got}") from error
    _check_adapter(wrapped, weights, name)
    return wrapped


def _check_adapter(model: Any, weights: Path, name: str) -> None:
    """Every tensor of the file must be in the model and the reverse: PEFT itself only warns."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        stored = set(file.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # PEFT adds whole embedding matrices to the file when they may have changed; those load by their plain names.
    excess = stored - expected - set(model.state_dict())
    for what, keys in (("lacks", expected - stored), ("has in excess", excess)):
        if keys:
            got = f"one that {what} {len(keys)} tensors ({sorted(keys)[0]}, ...)"
            raise DataError(f"--adapter {name}: expected an adapter for this model, got {got}")


def _why(option: str, name: str, local: bool, error: Exception) -> str:
    if not local and isinstance(error, OSError):
        return f"{option} {name}: no such folder, and not loaded from the hub: {_first_line(error)}"
    return f"{option} {name}: cannot be loaded: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A title line ("Error(s) in loading state_dict for X:") says nothing without the line below it.
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [type(error).__name__])[0]
    return text[:300]
