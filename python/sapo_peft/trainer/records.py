"""What is written beside an adapter and into a checkpoint's state: plain values, and text made safe for one line."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch

from sapo_kernels.files import atomic_write, read_text, write_json

from .choice import Choice
from .rescoring import Scoring

logger = logging.getLogger("sapo_peft")

MAX_CARD_BYTES = 16 * 2**20
PROMPTS_FILE = "sapo_prompts.json"
CARD_TITLE = "## Prompt that this adapter was trained with"
# JSON has no spelling for these.
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def numbers(value: Any) -> Any:
    """Tensors and tuples as lists, floats that JSON does not know as {"float": "nan"}."""
    if isinstance(value, torch.Tensor):
        return numbers(value.tolist())
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbers(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def unpacked(value: Any) -> Any:
    """The inverse of `numbers`, but for tensors and tuples, which stay lists."""
    if isinstance(value, dict):
        # A task may have that name: then it is no text that stands there.
        if set(value) == {"float"} and isinstance(value["float"], str):
            return _SPECIAL[value["float"]]
        return {key: unpacked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unpacked(item) for item in value]
    return value


def excerpt_line(text: str, limit: int = 100) -> str:
    """`text` as one printable line of at most about `limit` characters."""
    return json.dumps(text if len(text) <= limit else text[:limit] + "...", ensure_ascii=True)


def prompt_record(choice: Choice, last: Scoring | None, instruction_role: str) -> dict[str, Any]:
    """For each task the prompt that is chosen, its loss and the original's, and how to render it."""
    tasks = {}
    for p, (task, pool) in enumerate(choice.pools.items()):
        index = int(choice.chosen[p])
        losses = last.losses[task] if last else []
        tasks[task] = {
            "prompt": pool.prompts[index],
            "index": index,
            "original": pool.prompts[0],
            "suffix": pool.suffix,
            "text_word": pool.text_word,
            "instruction_role": instruction_role,
            "loss": numbers(losses[index]) if losses else None,
            "original_loss": numbers(losses[0]) if losses else None,
            "prompts": len(pool.prompts),
        }
        if choice.mode == "soft":
            tasks[task]["probs"] = choice.state.probs[p, : len(pool.prompts)].tolist()
    return {"version": 1, "mode": choice.mode, "step": last.step if last else None, "tasks": tasks}


def write_beside_adapter(folder: str | os.PathLike, record: dict[str, Any]) -> None:
    """``sapo_prompts.json`` in `folder`, and a section of the model card that says the same, if there is a card."""
    folder = Path(folder)
    # A sharded model is saved later, into a folder that is not there yet.
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PROMPTS_FILE, record)
    card = folder / "README.md"
    if not card.is_file():
        return
    try:
        before, after = _around_section(read_text(card, max_bytes=MAX_CARD_BYTES))
    except (OSError, ValueError) as error:
        # Somebody else's file is no reason for a save to fail.
        logger.warning("the model card is left without the prompt: %s", error)
        return
    lines = [
        CARD_TITLE,
        "",
        f"Chosen by State-Adaptive Prompt Optimization (arXiv 2606.01967); see `{PROMPTS_FILE}`.",
        "",
    ]
    for task, entry in record["tasks"].items():
        # Indented text is shown as it is, whatever stands in it.
        lines += [f"Task {excerpt_line(task)}:", "", *("    " + line for line in entry["prompt"].splitlines()), ""]
    section = "\n".join(lines).rstrip()
    atomic_write(card, "\n\n".join(part for part in (before, section, after) if part) + "\n")


def _around_section(card: str) -> tuple[str, str]:
    """What stands in front of the section of the prompts and behind it; everything in front where there is none."""
    lines = card.split("\n")
    start = next((i for i, line in enumerate(lines) if line.rstrip() == CARD_TITLE), None)
    if start is None:
        return card.rstrip(), ""
    # Prompts are indented: the next heading is somebody else's.
    stop = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("#")), len(lines))
    return "\n".join(lines[:start]).rstrip(), "\n".join(lines[stop:]).strip()
