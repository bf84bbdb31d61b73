"""Reading examples and prompts: SuperNI and TRACE JSON, natural-instructions, JSONL, CSV, plain text.

Every file is read whole under a size bound, strictly (`sapo_kernels.files`), and every row is accounted for. A
fault raises `DataError` naming the file and the row; nothing is dropped, repaired or re-worded in silence.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError, excerpt, read_json, read_text

from .tables import READERS, Table, check_text, file_type, table_of, text_and_targets

MAX_PROMPT_BYTES = 8 * 2**20
MAX_PROMPTS = 10_000

# Names of data collections: a task or its instructions may lie in such a folder below the path that is given.
DATA_FOLDERS = ("", "SUPERNI", "TRACE")
_Entry = tuple[Path, Any]


class TaskNameError(DataError):
    """The files hold several tasks and the name given is none of them, or none was given."""


class Examples(list):
    """A list of ``{"input": str, "target": str}`` that knows where it is from.

    `source` is the file, `columns` the names read as input and target, `total` the rows in the file, `unread`
    those after the limit (counted, not looked at), `skipped` the places of rows left out for an empty label.
    Counted among the rows kept: `duplicates` (equal to an earlier row), `conflicts` (an input that stands
    earlier with another label), `empty_inputs`, `several_targets` (several outputs, the first is used).
    Rows are conserved: ``total == len(self) + len(skipped) + unread``.
    """

    def __init__(self, rows: Iterable[dict[str, str]], source: str, columns: tuple[str, str], total: int):
        super().__init__(rows)
        self.source, self.columns, self.total = source, columns, total
        self.skipped: list[str] = []
        self.unread = self.several_targets = 0
        self.duplicates = self.conflicts = self.empty_inputs = 0
        first: dict[str, str] = {}
        seen: set[tuple[str, str]] = set()
        for row in self:
            pair = (row["input"], row["target"])
            self.duplicates += pair in seen
            self.conflicts += first.setdefault(*pair) != row["target"]
            self.empty_inputs += not row["input"].strip()
            seen.add(pair)

    def notes(self) -> list[str]:
        """What a reader of the results should know about these rows, one sentence each."""
        counts = (
            (len(self.skipped), "with an empty label left out"),
            (self.duplicates, "repeat an earlier one exactly"),
            (self.conflicts, "have an input that stands earlier with another label"),
            (self.empty_inputs, "have an empty input"),
            (self.several_targets, "have several outputs (the first one is used)"),
        )
        return [f"{self.source}: {count} of the rows read {what}" for count, what in counts if count]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one task in order, with what else the task's files say about rendering them.

    `suffix` is the task's fixed answer-format line ("" for none), `labels` its label names, `text_word` the
    word that heads the input, `sources` the files read. `original_first` says whether ``prompts[0]`` is the
    instruction that the others paraphrase.
    """

    prompts: list[str]
    suffix: str = ""
    labels: list[str] = field(default_factory=list)
    task: str | None = None
    text_word: str = "Text"
    original_first: bool = False
    sources: list[str] = field(default_factory=list)

    @property
    def duplicates(self) -> list[tuple[int, int]]:
        """(index, index of its first occurrence) of every prompt that repeats an earlier one exactly."""
        first: dict[str, int] = {}
        places = [first.setdefault(prompt, index) for index, prompt in enumerate(self.prompts)]
        return [(index, earlier) for index, earlier in enumerate(places) if earlier != index]

    def notes(self) -> list[str]:
        """What a reader of the results should know about these prompts, one sentence each."""
        return [f"prompt {index} repeats prompt {first} exactly" for index, first in self.duplicates]


def read_examples(
    path: str | os.PathLike,
    input_column: str | None = None,
    target_column: str | None = None,
    limit: int | None = None,
    *,
    task: str | None = None,
    split: str = "train",
    skip_empty: bool = False,
) -> Examples:
    """Read (input, target) pairs.

    `path` is a ``.json`` list of rows (SuperNI, TRACE: ``sentence``/``label``), a ``.json`` object with
    ``"Instances"`` (natural-instructions), ``.jsonl``/``.ndjson``, ``.csv``/``.tsv`` with a header line, a
    task directory (its ``train.json`` is read, or another `split`), or a directory of task directories with
    `task`. Columns that are not given are recognised by name; several candidates are an error, never a guess.
    With `limit`, reading stops after that many examples. Labels must be text; an empty one (or only spaces)
    is an error unless `skip_empty`, which leaves such rows out and says so.

    Raises: `DataError` naming the file, the row and the field; `OSError` from opening and reading.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit: wanted at least 1, got {limit}")
    file = _data_file(Path(path), task, split)
    table = READERS[file_type(file, READERS)](file, (input_column, target_column))
    return _examples(table, str(file), limit, skip_empty)


def examples_from_rows(
    rows: Any,
    source: str,
    input_column: str | None = None,
    target_column: str | None = None,
    limit: int | None = None,
    *,
    skip_empty: bool = False,
) -> Examples:
    """`read_examples` for rows in memory: a list of mappings or a `datasets.Dataset`; `source` names them in messages.

    Raises: `DataError` naming the row and the field; `TypeError` for anything else, such as a stream of rows.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit: wanted at least 1, got {limit}")
    sized = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    if not sized or isinstance(rows, (str, bytes, Mapping)):
        raise TypeError(f"{source}: wanted a list of rows or a Dataset, got {type(rows).__name__}")
    if not len(rows):
        raise DataError(f"{source}: wanted at least one row, got none")
    return _examples(table_of(rows, source, (input_column, target_column)), source, limit, skip_empty)


def _examples(table: Table, source: str, limit: int | None, skip_empty: bool) -> Examples:
    kept, skipped, several, used = [], [], 0, 0
    for used, row in enumerate(table.rows, 1):
        place = f"{source}: {table.where(used - 1)}"
        text, targets = text_and_targets(table.parse(row, place), table.columns, place)
        if not targets[0].strip():
            if not skip_empty:
                raise DataError(f"{place}: wanted a label in {excerpt(table.columns[1])}, got an empty one")
            skipped.append(table.where(used - 1))
            continue
        kept.append({"input": text, "target": targets[0]})
        several += len(targets) > 1
        if len(kept) == limit:
            break
    if not kept:
        raise DataError(f"{source}: wanted at least one row with a label, got {len(table.rows)} rows and none")
    examples = Examples(kept, source, table.columns, len(table.rows))
    examples.skipped, examples.several_targets, examples.unread = skipped, several, len(table.rows) - used
    return examples


def read_prompts(path: str | os.PathLike, task: str | None = None) -> PromptSet:
    """Read the prompts of one task, the original instruction first where it is known.

    `path` is one of

    - a ``.txt`` file, one prompt a line;
    - a ``.json`` list of strings;
    - ``{"prompts": [...], "suffix": "", "labels": [], "text_word": "Text"}``, all but the first optional;
    - ``{task: [paraphrase, ...]}`` (``paraphrases.json``), ``{task: {"instruction": "", "suffix": ""}}``
      (``instructions.json``), or a directory with either. They complete each other when they lie side by
      side, or the instructions in ``SUPERNI/`` or ``TRACE/`` below: the original is then prompt 0.

    `task` is an exact name and may be left out where there is only one. Repeated prompts are kept and
    reported.

    Raises: `DataError` naming the file and the index of a prompt that is empty, not text or too long.
    """
    path = Path(path)
    if path.is_dir():
        wanted = ("paraphrases.json", "instructions.json")
        files = [path / folder / name for name in wanted for folder in DATA_FOLDERS]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise DataError(f"{path}: wanted a directory with {' or '.join(wanted)}, got neither")
        path = found
    if file_type(path, (".json", ".txt")) == ".txt":
        text = read_text(path, max_bytes=MAX_PROMPT_BYTES).rstrip("\r\n")
        lines = [line.removesuffix("\r") for line in text.split("\n")] if text else []
        return PromptSet(_check_prompts(lines, str(path)), task=task, sources=[str(path)])

    document = read_json(path, max_bytes=MAX_PROMPT_BYTES)
    if isinstance(document, list):
        return PromptSet(_check_prompts(document, str(path)), task=task, sources=[str(path)])
    if not isinstance(document, dict) or not document:
        raise DataError(f"{path}: wanted a list or an object with prompts, got {excerpt(document)}")
    if isinstance(document.get("prompts"), list):
        known = ("prompts", "suffix", "labels", "text_word")
        if extra := sorted(set(document) - set(known)):
            raise DataError(f"{path}: wanted only the keys {', '.join(known)}, got {excerpt(extra[0])} too")
        prompts = _check_prompts(document["prompts"], str(path))
        return PromptSet(prompts, task=task, sources=[str(path)], **_rendering(document, str(path)))

    task = _pick(task, document, path)
    if isinstance(document[task], list):
        instructions = _entry(path.parent, "instructions.json", task)
        paraphrases = (path, document[task])
    else:
        instructions = (path, document[task])
        paraphrases = _entry(path.parent, "paraphrases.json", task, above=True)
    return _join(task, instructions, paraphrases)


def _join(task: str, instructions: _Entry | None, paraphrases: _Entry | None) -> PromptSet:
    prompts, rendering, sources = [], {}, []
    if instructions is not None:
        file, entry = instructions
        place = f"{file}: task {excerpt(task)}"
        if not isinstance(entry, dict):
            raise DataError(f"{place}: wanted a list of prompts or an object, got {excerpt(entry)}")
        prompts += _check_prompts([entry.get("instruction")], f"{place}: 'instruction'")
        rendering = _rendering(entry, place)
        sources.append(str(file))
    if paraphrases is not None:
        prompts += _check_prompts(paraphrases[1], f"{paraphrases[0]}: task {excerpt(task)}")
        sources.append(str(paraphrases[0]))
    first = instructions is not None
    return PromptSet(prompts, task=task, original_first=first, sources=sources, **rendering)


def _entry(folder: Path, name: str, task: str, above: bool = False) -> _Entry | None:
    """The file `name` in `folder` or below it (`above`: or above it) that knows `task`, and its entry."""
    folders = [folder, folder.parent] if above else [folder / part for part in DATA_FOLDERS]
    for file in (place / name for place in folders):
        if file.is_file():
            document = read_json(file, max_bytes=MAX_PROMPT_BYTES)
            if isinstance(document, dict) and task in document:
                return file, document[task]
    return None


def _check_prompts(prompts: Any, place: str) -> list[str]:
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_PROMPTS:
        got = f"{len(prompts)}" if isinstance(prompts, list) else excerpt(prompts)
        raise DataError(f"{place}: wanted a list of 1 to {MAX_PROMPTS} prompts, got {got}")
    for index, prompt in enumerate(prompts):
        check_text(prompt, f"{place}: prompt {index}")
        if not prompt.strip():
            raise DataError(f"{place}: prompt {index}: wanted text, got an empty prompt")
    return prompts


def _rendering(entry: dict[str, Any], place: str) -> dict[str, Any]:
    suffix, word = entry.get("suffix", ""), entry.get("text_word", "Text")
    labels = entry.get("labels", [])
    check_text(suffix, f"{place}: 'suffix'")
    if not check_text(word, f"{place}: 'text_word'").strip():
        raise DataError(f"{place}: 'text_word': wanted a word, got an empty one")
    if not isinstance(labels, list):
        raise DataError(f"{place}: 'labels': wanted a list, got {excerpt(labels)}")
    for index, label in enumerate(labels):
        check_text(label, f"{place}: 'labels' {index}")
    return {"suffix": suffix, "text_word": word, "labels": labels}


def _pick(task: str | None, names: Iterable[str], place: str | os.PathLike) -> str:
    """`task` if it is exactly one of `names` (a part of a name may belong to two tasks), or the only name."""
    names = sorted(names)
    if task is None and len(names) == 1:
        return names[0]
    if task in names:
        return task
    close = difflib.get_close_matches(task, names, n=3, cutoff=0.3) if task else []
    close = [name for name in names if task and name.startswith(task)][:3] or close or names[:5]
    wanted = "the name of a task" if task is None else "a task that is there"
    got = "none" if task is None else excerpt(task)
    more = f" and {len(names) - len(close)} more" if len(names) > len(close) else ""
    raise TaskNameError(f"{place}: wanted {wanted} ({', '.join(map(excerpt, close))}{more}), got {got}")


def _data_file(path: Path, task: str | None, split: str) -> Path:
    if not path.is_dir():
        return path
    name = f"{split}.json"
    if not split.isidentifier():
        raise DataError(f"split: wanted a name such as 'train', got {excerpt(split)}")
    if (path / name).is_file():
        return path / name
    # Tasks are looked up among the folders that exist: a name never becomes a path.
    roots = [path / part for part in DATA_FOLDERS if (path / part).is_dir()]
    tasks = {sub.name: sub for root in roots for sub in root.iterdir() if (sub / name).is_file()}
    if not tasks:
        raise DataError(f"{path}: wanted {name} or task folders with it, got neither")
    return tasks[_pick(task, tasks, path)] / name
