"""The adapters of a sequence run as one LoRA adapter, for servers that take one a request."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sapo_kernels.files import DataError, atomic_write, read_bytes, read_json, write_json
from sapo_kernels.manifest import flush_folder, write_manifest

from ..locks import only_writer
from ..trainer.checkpoints import ADAPTER
from ..trainer.records import PROMPTS_FILE, write_beside_adapter
from .methods import CONFIG, WEIGHTS, chooser, read_adapters


@dataclass(frozen=True)
class Exported:
    """What was written: the adapter's rank, the tasks whose prompts are beside it, how many the run has in all."""

    rank: int
    tasks: list[str]
    planned: int


def export_adapter(run_dir: str | os.PathLike, out: str | os.PathLike) -> Exported:
    """Write the adapters of a sequence run to `out` as one, with the prompt of each task and a manifest.

    Equals all of them active at once (`load_adapters`) up to rounding: with A [r, in] and B [out, r] of each task,
    ``A = cat(A_1 ... A_n)`` along the ranks and B likewise, of rank n r with ``lora_alpha`` n times as large, so that
    ``alpha / r`` stays. Of `seq-lora`, which trains one on, it is that one. The base model is not needed.

    Args:
        run_dir: the run's folder; of a run that is not done the tasks that are.
        out: a folder that is not there or is empty; it gets its name when everything is in it.

    Raises:
        DataError: the folder is of no such run or is damaged, or `out` holds something.
        RuntimeError: another process writes to `out`. OSError: it cannot be written.
    """
    run, config, folders = read_adapters(run_dir)
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: expected a folder that is not there or is empty, got one that holds something")
    tasks = run.record.tasks[: len(folders)]
    prompts = {
        **read_json(folders[-1] / PROMPTS_FILE),
        "tasks": dict(zip(tasks, map(_prompt_in, folders), strict=True)),
    }
    prompts.pop("earlier", None)
    if config.method == "seq-lora":
        folders = folders[-1:]
    weights, options = _concatenated(folders)

    from safetensors.torch import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        staging = out.parent / f".{out.name}.part"
        # Of one that was killed.
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            write_json(staging / CONFIG, options)
            save_file(weights, staging / WEIGHTS, metadata={"format": "pt"})
            # safetensors writes for the owner alone, whatever the umask says.
            os.chmod(staging / WEIGHTS, stat.S_IMODE(os.stat(staging / CONFIG).st_mode))
            # PEFT's, with what it says about the base model.
            if (folders[-1] / "README.md").is_file():
                atomic_write(staging / "README.md", read_bytes(folders[-1] / "README.md"))
            note = "" if config.method == "seq-lora" else f"All {len(folders)} adapters of the run are in this one."
            write_beside_adapter(staging, prompts, chooser(config.policy), note)
            write_manifest(staging, ADAPTER)
            os.rename(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        flush_folder(out.parent)
    return Exported(options["r"], tasks, len(run.record.tasks))


def _concatenated(folders: list[Path]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, options) of the adapters in these folders, side by side along the ranks."""
    from safetensors.torch import load_file

    parts, options = [load_file(folder / WEIGHTS) for folder in folders], read_json(folders[-1] / CONFIG)
    # [r, in] and [out, r], with the sides of the kernel behind them for convolutions.
    joined = {
        name: torch.cat([part[name] for part in parts], 0 if "lora_A" in name or "lora_embedding_A" in name else 1)
        for name in parts[0]
    }
    return joined, options | {name: options[name] * len(parts) for name in ("r", "lora_alpha")}


def _prompt_in(folder: Path) -> dict[str, Any]:
    """The one entry of a task's ``sapo_prompts.json``."""
    (entry,) = read_json(folder / PROMPTS_FILE)["tasks"].values()
    return entry
