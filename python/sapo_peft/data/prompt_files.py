"""Files with prompts that are no saved pool: a list of them, or instructions and paraphrases by the names of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from sapo_kernels.files import DataError, excerpt, read_json, read_text

from .names import DATA_FOLDERS, pick_task
from .schema import validated
from .tables import file_type

MAX_PROMPT_BYTES = 8 * 2**20
MAX_PROMPTS = 10_000
Texts = Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_PROMPTS)]


class Rendering(BaseModel):
    """What a file says about a task beside its prompts."""

    model_config = ConfigDict(strict=True, frozen=True)
    suffix: str = ""
    labels: tuple[str, ...] = ()
    text_word: str = "Text"


class _Instruction(Rendering):
    instruction: str


class _List(Rendering, extra="forbid"):
    prompts: Texts


class PromptFile(NamedTuple):
    """The prompts of one task in `source`; `named`: its files know tasks by name."""

    texts: tuple[str, ...]
    source: Path
    rendering: Rendering
    task: str | None
    original_first: bool = False
    named: bool = False


def read_prompt_file(path: Path, task: str | None) -> PromptFile:
    """What `PromptPool.read` describes, not checked yet but for types and bounds.

    Raises: `DataError` naming the file, the key, what was expected and got.
    """
    if path.is_dir():
        names = ("paraphrases.json", "instructions.json")
        files = [path / folder / name for name in names for folder in DATA_FOLDERS]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise DataError(f"{path}: expected a directory with {' or '.join(names)}, got neither")
        path = found
    if file_type(path, (".json", ".txt")) == ".txt":
        text = read_text(path, max_bytes=MAX_PROMPT_BYTES).rstrip("\r\n")
        document: Any = [line.removesuffix("\r") for line in text.split("\n")] if text else []
    else:
        document = read_json(path, max_bytes=MAX_PROMPT_BYTES)
    if isinstance(document, list):
        document = {"prompts": document}
    if not isinstance(document, dict) or not document:
        raise DataError(f"{path}: expected a list or an object with prompts, got {excerpt(document)}")
    if isinstance(document.get("prompts"), list):
        found = validated(_List, document, str(path))
        return PromptFile(found.prompts, path, found, task)
    return _by_task(path, document, pick_task(task, document, path))


def _by_task(path: Path, document: dict[str, Any], task: str) -> PromptFile:
    """Instructions and paraphrases complete each other where both are there."""
    if isinstance(document[task], list):
        instructions, paraphrases = _entry(path.parent, "instructions.json", task), (path, document[task])
    else:
        instructions = (path, document[task])
        paraphrases = _entry(path.parent, "paraphrases.json", task, above=True)
    texts, rendering, source = (), Rendering(), path
    if instructions is not None:
        source, entry = instructions
        rendering = validated(_Instruction, entry, f"{source}: task {excerpt(task)}")
        texts = (rendering.instruction,)
    if paraphrases is not None:
        source, entry = paraphrases
        texts += validated(_List, {"prompts": entry}, f"{source}: task {excerpt(task)}").prompts
    return PromptFile(texts, source, rendering, task, instructions is not None, True)


def _entry(folder: Path, name: str, task: str, above: bool = False) -> tuple[Path, Any] | None:
    """The file `name` in `folder` or below it (`above`: or above it) that knows `task`, and its entry."""
    folders = [folder, folder.parent] if above else [folder / part for part in DATA_FOLDERS]
    for file in (place / name for place in folders):
        if file.is_file():
            document = read_json(file, max_bytes=MAX_PROMPT_BYTES)
            if isinstance(document, dict) and task in document:
                return file, document[task]
    return None
