"""Which checkpoint of a run can be resumed from: each is sealed with a manifest when it is whole."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError, read_text
from sapo_kernels.manifest import MANIFEST, check_manifest, write_manifest

logger = logging.getLogger("sapo_peft")

SCHEMA, ADAPTER = "sapo_checkpoint", "sapo_adapter"
# The entry of the trainer's state. Not a callback's class name: the trainer would build such a callback anew.
STATE_KEY = "sapo"
MAX_STATE_BYTES = 256 * 2**20
_NAME = re.compile(r"checkpoint-(\d{1,12})")


def last_good_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest whole ``checkpoint-N`` in `output_dir`, for ``trainer.train(resume_from_checkpoint=...)``.

    Checkpoints that are incomplete (a run was killed or a disk was full while they were written) or have changed since
    are passed over with a log line that says why; nothing is deleted. None if there is no whole one, or no folder.
    """
    for _, path in checkpoints_in(output_dir):
        fault = checkpoint_fault(path)
        if fault is None:
            if not any(path.glob("optimizer*")):
                logger.warning(
                    "%s holds the model alone (save_only_model): optimizer and learning rate start over", path
                )
            return str(path)
        logger.warning("%s is incomplete (%s); looking for an earlier one", path, fault)
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


def seal(folder: str | os.PathLike) -> None:
    """Everything in a checkpoint is written: flush it to disk, and say so in its manifest."""
    write_manifest(folder, SCHEMA, skip=_unread)


def checkpoint_fault(path: str | os.PathLike) -> str | None:
    """Why a checkpoint cannot be resumed from, or None.

    Every file has the bytes that it was sealed with, and the state is that of the step in the folder's name. One that
    was made without SAPO has no manifest, and is taken as the trainer takes it.
    """
    path = Path(path)
    try:
        if (path / MANIFEST).exists() or kept_in(path) is not None:
            check_manifest(path, SCHEMA, skip=_unread)
        step = _state(path).get("global_step")
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    match = _NAME.fullmatch(path.name)
    if match and step != int(match[1]):
        return f"trainer_state.json: expected step {match[1]}, got {step!r}"
    return None


def kept_in(checkpoint: str | os.PathLike) -> dict[str, Any] | None:
    """SAPO's part of the state in a checkpoint that the trainer wrote; None if it was written without SAPO.

    Raises: `OSError`, `ValueError` if the file cannot be read.
    """
    found = _state(checkpoint).get("stateful_callbacks", {}).get(STATE_KEY)
    return found if isinstance(found, dict) else None


def _state(checkpoint: str | os.PathLike) -> dict[str, Any]:
    # The trainer logs NaN as it comes, which the strict reader of this package refuses.
    place = os.path.join(checkpoint, "trainer_state.json")
    state = json.loads(read_text(place, max_bytes=MAX_STATE_BYTES))
    if not isinstance(state, dict):
        raise DataError(f"{place}: expected an object, got {type(state).__name__}")
    return state


def seal_adapter(folder: str | os.PathLike) -> None:
    """The adapter of a run is written: as `seal`, for the folder that has the run's checkpoints in it."""
    write_manifest(folder, ADAPTER, skip=_unread)


def check_adapter(folder: str | os.PathLike) -> None:
    """Compare the folder of an adapter, or a checkpoint, with its manifest; those of others have none.

    Raises: `DataError` naming the file that is missing, unexpected or other than it was written.
    """
    if os.path.exists(os.path.join(folder, MANIFEST)):
        check_manifest(folder, (ADAPTER, SCHEMA), skip=_unread)


def _unread(name: str) -> bool:
    """What may be added to a folder or edited in it: logs, notes, checkpoints with manifests of their own."""
    top = name.partition("/")[0]
    return name.endswith((".md", ".txt", ".log", ".csv", ".lock")) or (
        "/" in name and (top in ("runs", "wandb") or _NAME.fullmatch(top) is not None)
    )
