"""Which checkpoint of a run can be resumed from: a write that was cut off must not block the run."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from pathlib import Path

from sapo_kernels.files import read_text

logger = logging.getLogger("sapo_peft")

_NAME = re.compile(r"checkpoint-(\d{1,12})")
MAX_STATE_BYTES = 256 * 2**20
# torch writes these as zip archives; they are looked at, never unpacked here.
_ARCHIVES = ("optimizer.pt", "scheduler.pt", "training_args.bin")
# FSDP and DeepSpeed keep the optimizer, and perhaps the model, in folders of shards or in files of their own.
_SHARDED_MODELS = ("pytorch_model_fsdp_*", "pytorch_model_fsdp.bin", "global_step*")
_SHARDED = ("optimizer_*", "optimizer.bin", *_SHARDED_MODELS)
_MODELS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


def last_good_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest whole ``checkpoint-N`` in `output_dir`, for ``trainer.train(resume_from_checkpoint=...)``.

    Checkpoints that are not whole (a run was killed or a disk was full while they were written) are passed over with a
    log line that says why; nothing is deleted. None if there is no whole one, or no folder.
    """
    for step, path in checkpoints_in(output_dir):
        fault = checkpoint_fault(path, step)
        if fault is None:
            if _model_only(path):
                logger.warning(
                    "%s holds the model alone (save_only_model): optimizer and learning rate begin anew", path
                )
            return str(path)
        logger.warning("%s is not whole (%s); looking for an earlier one", path, fault)
    return None


def checkpoints_in(output_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    """(step, folder) of every ``checkpoint-N`` in `output_dir`, whole or not, the newest first."""
    found = []
    if Path(output_dir).is_dir():
        for path in Path(output_dir).iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def _model_only(path: Path) -> bool:
    """Whether the trainer was told to save no more than the model: the state, which it writes last, is there alone."""
    others = ("optimizer*", "scheduler.pt", "rng_state*.pth", *_SHARDED)
    return not any(list(path.glob(name)) for name in others)


def checkpoint_fault(path: Path, step: int) -> str | None:
    """Why the checkpoint of that step cannot be resumed from, or None."""
    try:
        # The trainer logs NaN as it comes, which the strict reader of this package refuses.
        state = json.loads(read_text(path / "trainer_state.json", max_bytes=MAX_STATE_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        return f"trainer_state.json: {error}"
    if not isinstance(state, dict) or state.get("global_step") != step:
        got = state.get("global_step") if isinstance(state, dict) else type(state).__name__
        return f"trainer_state.json: expected step {step}, got {got!r}"
    models = (*_MODELS, *(f"*/{name}" for name in _MODELS[:1]), *_SHARDED_MODELS)
    if not any(list(path.glob(name)) for name in models):
        return f"expected one of {', '.join(_MODELS)}, got none"
    weights = [*path.glob("*.safetensors"), *path.glob("*/adapter_model.safetensors")]
    for file in weights:
        fault = safetensors_fault(file)
        if fault:
            return f"{file.relative_to(path)}: {fault}"
    if (path / "adapter_model.safetensors").is_file():
        # PEFT reads it first.
        try:
            json.loads(read_text(path / "adapter_config.json", max_bytes=MAX_STATE_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            return f"adapter_config.json: {error}"
    sharded, alone = any(list(path.glob(name)) for name in _SHARDED), _model_only(path)
    optional = {"training_args.bin", *(("optimizer.pt",) if sharded else ()), *(_ARCHIVES if alone else ())}
    # Each rank has its own generators; a single process writes rng_state.pth.
    for file in [*(path / name for name in _ARCHIVES), *path.glob("rng_state*.pth"), *path.glob("optimizer*.bin"),
                 *path.glob("pytorch_model_fsdp*.bin")]:  # fmt: skip
        if not file.exists() and file.name in optional:
            continue
        fault = _archive_fault(file)
        if fault:
            return f"{file.name}: {fault}"
    if not alone and not list(path.glob("rng_state*.pth")):
        return "expected rng_state.pth, got none"
    return None


def safetensors_fault(file: Path) -> str | None:
    """Why a safetensors file is not whole: its header says how long it must be."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, 100 * 2**20):
                return f"expected a header of {length} bytes, got a file of {size}"
            header = json.loads(handle.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return f"expected a safetensors header, got {type(error).__name__}"
    wanted = 8 + length + max(ends, default=0)
    return None if size == wanted else f"expected {wanted} bytes, got {size}"


def _archive_fault(file: Path) -> str | None:
    try:
        # The directory of a zip archive stands at its end, and every member has a checksum.
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
        return None if bad is None else f"member {bad!r} is damaged"
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        return f"not a whole archive: {error}"
