"""What is written beside an adapter and into a checkpoint's state: plain values, and text made safe for one line."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from sapo_kernels.files import DataError, atomic_write, read_json, read_text, write_json

from ..data.schema import validated

logger = logging.getLogger("sapo_peft")

MAX_CARD_BYTES = 16 * 2**20
PROMPTS_FILE = "sapo_prompts.json"
CARD_TITLE = "## Prompt that this adapter was trained with"
SAPO = "State-Adaptive Prompt Optimization (arXiv 2606.01967)"
# JSON has no spelling for these.
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Renders as `Renderer` does, with transformers and PEFT alone.
_SNIPPET = """\
import json
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text = ".", "the input"
base = PeftConfig.from_pretrained(folder).base_model_name_or_path
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
tokenizer = AutoTokenizer.from_pretrained(base)
with open(f"{folder}/sapo_prompts.json", encoding="utf-8") as file:
    task = next(iter(json.load(file)["tasks"].values()))
turn = f"{task['prompt']}\\n\\n{task['text_word']}:\\n{text}" + (f"\\n\\n{task['suffix']}" if task["suffix"] else "")
if tokenizer.chat_template:
    turn = tokenizer.apply_chat_template([{"role": "user", "content": turn}], tokenize=False,
                                         add_generation_prompt=True, enable_thinking=False)
else:
    turn += "\\n\\nAnswer:"
inputs = tokenizer(turn, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=100, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


class PromptOfTask(BaseModel):
    """A task's entry of ``sapo_prompts.json``: what it takes to render an input as in training."""

    model_config = ConfigDict(strict=True)
    prompt: str
    suffix: str
    text_word: str
    instruction_role: Literal["user", "system"] = "user"
    # None: the usual layout; else a layout of the caller's, its text or, of a function, its name in angle brackets.
    template: str | None = None


class PromptsOfAdapter(BaseModel):
    """``sapo_prompts.json``, as far as it is read again; earlier: how many adapters were active beside this one."""

    model_config = ConfigDict(strict=True)
    tasks: dict[str, PromptOfTask]
    earlier: int = 0


def read_prompts_of(folder: str | os.PathLike) -> PromptsOfAdapter:
    """The prompts of the adapter in a folder, of one task at least.

    Raises: `DataError` if it has none, or naming what does not fit.
    """
    place = Path(folder) / PROMPTS_FILE
    try:
        document = read_json(place, max_bytes=MAX_CARD_BYTES)
    except FileNotFoundError:
        raise DataError(f"{folder}: expected an adapter with {PROMPTS_FILE}, got none") from None
    found = validated(PromptsOfAdapter, document, os.fspath(place))
    if not found.tasks:
        raise DataError(f"{place}: expected the prompt of a task, got none")
    return found


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
        # A task may have that name: then the value is no text.
        if set(value) == {"float"} and isinstance(value["float"], str):
            return _SPECIAL[value["float"]]
        return {key: unpacked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unpacked(item) for item in value]
    return value


def excerpt_line(text: str, limit: int = 100) -> str:
    """`text` as one printable line of at most about `limit` characters."""
    return json.dumps(text if len(text) <= limit else text[:limit] + "...", ensure_ascii=True)


def write_beside_adapter(
    folder: str | os.PathLike, record: dict[str, Any], chosen_by: str = SAPO, note: str = ""
) -> None:
    """``sapo_prompts.json`` in `folder`, and a section of the model card that says the same, if there is a card.

    chosen_by: what chose the prompt. note: one more sentence.
    """
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
    lines = [CARD_TITLE, "", f"Chosen by {chosen_by}; see `{PROMPTS_FILE}`.", "", *([note, ""] if note else [])]
    for task, entry in record["tasks"].items():
        lines += [f"Task {excerpt_line(task)}:", "", *_indented(entry["prompt"]), ""]
    lines += ["`sapo try FOLDER --input TEXT` answers with the adapter and its prompt.", ""]
    # Another layout than the usual one is rendered by the caller.
    entries = record["tasks"].values()
    if not any(entry.get("template") or entry.get("instruction_role") == "system" for entry in entries):
        lines[-2] = lines[-2].removesuffix(".") + "; so does this:"
        lines += _indented(_SNIPPET)
    section = "\n".join(lines).rstrip()
    atomic_write(card, "\n\n".join(part for part in (before, section, after) if part) + "\n")


def _indented(text: str) -> list[str]:
    """Indented text is shown verbatim."""
    return ["    " + line for line in text.splitlines()]


def _around_section(card: str) -> tuple[str, str]:
    """What stands in front of the section of the prompts and behind it.

    Where there is none yet, it comes first: PEFT's card is an empty form below a header of metadata.
    """
    # Prompts are indented: the next heading is somebody else's.
    found = re.search(rf"^{re.escape(CARD_TITLE)}\s*?\n.*?(?=^#|\Z)", card, re.MULTILINE | re.DOTALL)
    # The header, or nothing.
    found = found or re.match(r"(?:---\s*?\n.*?^---\s*?(?:\n|\Z))?", card, re.MULTILINE | re.DOTALL)
    start = found.start() if found[0].startswith(CARD_TITLE) else found.end()
    return card[:start].rstrip(), card[found.end() :].strip()
