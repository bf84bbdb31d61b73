"""The prompts of one task that SAPO chooses among: the original instruction and its checked paraphrases."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from sapo_kernels.files import DataError, excerpt, read_json, write_json

from ..terminal import plain
from . import prompt_checks as checks
from .names import TaskNameError
from .prompt_files import MAX_PROMPTS, read_prompt_file
from .schema import first_fault, validated

SCHEMA, VERSION = "sapo_prompt_pool", 1
MAX_TOKENS = 1024
# More than the longest prompts take, so that what was saved can be read.
MAX_POOL_BYTES = 2**30
# What is kept of a rejected prompt, and of how many: enough to see what went wrong, whatever a source sends.
MAX_REJECTED_CHARACTERS = 2000
MAX_REJECTED = 1000
_MAX_NAME = 1000


def _one_line(text: str) -> str:
    """A short text on one line: it stands in messages, tables and logs."""
    if not checks.normalised(text) or len(text) > _MAX_NAME:
        raise DataError(f"expected a text of 1 to {_MAX_NAME} characters, got {excerpt(text)}")
    if (problem := checks.character_fault(text)) or "\n" in text or "\r" in text:
        raise DataError(f"expected a text on one line, got {problem or 'a line end'} in {excerpt(text)}")
    return text


def _part(text: str) -> str:
    if problem := checks.fault(text, max_characters=_MAX_NAME):
        raise DataError(problem)
    return text


_STRICT = ConfigDict(strict=True, extra="forbid")
Name = Annotated[str, AfterValidator(_one_line)]
# Each text once, in order; a list will do.
Parts = Annotated[
    tuple[Annotated[str, Field(strict=True), AfterValidator(_part)], ...],
    Field(strict=False, max_length=MAX_PROMPTS),
    AfterValidator(lambda texts: tuple(dict.fromkeys(texts))),
]


@dataclass(frozen=True)
class PoolPrompt:
    """One prompt and where it is from: "original", "file:NAME", "endpoint:MODEL", "model:NAME", ..."""

    __pydantic_config__ = _STRICT
    text: str
    source: Name


@dataclass(frozen=True)
class RejectedPrompt:
    """A paraphrase that was not taken, and why. `text` may be shortened, what no file can hold is escaped."""

    __pydantic_config__ = _STRICT
    text: str
    source: str
    reason: str


class PromptPool(BaseModel):
    """The candidates of one task, checked; made by `build` and `read`, never changed.

    task: its name. prompts: the texts, the original instruction first, all different after `normalised`.
    provenance: the source of each, "original" for the first. suffix: the answer-format line, not paraphrased.
    labels: label names; those in the original stand in every prompt. markers: texts that stand in every prompt.
    text_word: the word that heads the input. rejected: what was not taken, also because it repeats another (the first
    `MAX_REJECTED` are kept). The tokenizer is neither saved nor compared.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", populate_by_name=True)

    # The keys of a saved pool, in this order: another version is refused before its other keys.
    schema_name: Literal["sapo_prompt_pool"] = Field(alias="schema")
    version: Annotated[int, Field(ge=VERSION, le=VERSION)]
    task: Name
    text_word: Name
    suffix: str
    labels: Parts
    markers: Parts
    entries: tuple[PoolPrompt, ...] = Field(alias="prompts", min_length=1, max_length=MAX_PROMPTS)
    rejected: tuple[RejectedPrompt, ...] = Field(max_length=MAX_REJECTED)
    _tokenizer: Any = None

    @classmethod
    def build(
        cls,
        task: str,
        original: str,
        paraphrases: Iterable[PoolPrompt | str] = (),
        *,
        suffix: str = "",
        labels: Sequence[str] = (),
        markers: Sequence[str] = (),
        text_word: str = "Text",
        tokenizer: Any = None,
    ) -> PromptPool:
        """A pool of `original` and those `paraphrases` that pass; a plain string has the source "given".

        A prompt has 1 to 16,384 characters, none of them a control, an unpaired surrogate or made to
        deceive the eye. Every label that occurs in the original as a whole word, in that case, occurs so in
        each paraphrase, and every marker. With a `tokenizer` it has at most 1,024 tokens and holds none
        of its special tokens. Paraphrases that fail, or repeat one but for spaces, case and compatibility forms of
        characters, are kept in `rejected`.

        Raises: `DataError` naming the item for a fault in anything but a paraphrase; `TypeError` for a
        paraphrase that is neither a string nor a `PoolPrompt`.
        """
        fields = {
            "schema": SCHEMA, "version": VERSION, "task": task, "text_word": text_word, "suffix": suffix,
            "labels": labels, "markers": markers, "prompts": (PoolPrompt(original, "original"),), "rejected": (),
        }  # fmt: skip
        if not isinstance(original, str):
            raise DataError(f"task {excerpt(task)}: the original prompt: expected text, got {excerpt(original)}")
        try:
            pool = cls.model_validate(fields, context={"tokenizer": tokenizer})
        except ValidationError as error:
            raise DataError(f"task {excerpt(task)}: {first_fault(error)}") from None
        return pool.extended(paraphrases)

    @classmethod
    def read(
        cls, path: str | os.PathLike, task: str | None = None, *, needs_original: bool = False, **options: Any
    ) -> PromptPool:
        """Read the prompts of one task, the original instruction first where it is known.

        `path` is one of

        - a file that `save` wrote, which is read exactly;
        - a ``.txt`` file, one prompt a line;
        - a ``.json`` list of strings;
        - ``{"prompts": [...], "suffix": "", "labels": [], "text_word": "Text"}``, all but the first optional;
        - ``{task: [paraphrase, ...]}`` (``paraphrases.json``), ``{task: {"instruction": "", "suffix": ""}}``
          (``instructions.json``), or a directory with either. They complete each other when they lie side
          by side, or the instructions in ``SUPERNI/`` or ``TRACE/`` below.

        The first prompt is taken as the original, also where no file says so, unless `needs_original`. `task` chooses
        among several tasks of a file, by its exact name; that of a saved pool must be the same; it names a plain list.
        `options` are those of `build`, for files that are no saved pool (use `checked` on that).

        Raises: `DataError` naming the file and the item: a saved pool with an unknown version or key, or with a
        prompt that fails its own rules, is refused as a whole, for to leave out one would renumber the others.
        """
        document = _pool_document(path)
        if document is not None:
            if options:
                raise TypeError(f"{path} is a saved pool: expected no options, got {', '.join(options)}")
            # Of files of before: paraphrases that repeated another, and bounds that were always these.
            for name in ("merged", "max_characters", "max_tokens"):
                document.pop(name, None)
            pool = validated(cls, document, str(path))
            if task not in (None, pool.task):
                raise TaskNameError(f"{path}: expected the task {excerpt(task)}, got a pool of {excerpt(pool.task)}")
            return pool
        found = read_prompt_file(Path(path), task)
        if needs_original and not found.original_first:
            raise DataError(f"{path}: task {excerpt(task)}: expected its instruction too, got paraphrases only")
        # A plain list names no task; what the file is called is the best that is known.
        named = {"task": found.task or plain(found.source.stem), **found.rendering.model_dump(exclude={"instruction",
                 "prompts"})}  # fmt: skip
        source = file_source(found.source)
        paraphrases = [PoolPrompt(text, source) for text in found.texts[1:]]
        try:
            return cls.build(original=found.texts[0], paraphrases=paraphrases, **{**named, **options})
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    @model_validator(mode="after")
    def _whole(self, info: ValidationInfo) -> PromptPool:
        self._tokenizer = (info.context or {}).get("tokenizer")
        rules, seen = self._rules(), {}
        if self.suffix and (problem := checks.fault(self.suffix, specials=rules["specials"])):
            raise DataError(f"'suffix': {problem}")
        if self.entries[0].source != "original":
            raise DataError(f"'prompts' 0: expected the original prompt, got {excerpt(self.entries[0])}")
        for index, prompt in enumerate(self.entries):
            first = seen.setdefault(checks.normalised(prompt.text[: checks.MAX_CHARACTERS + 1]), index)
            problem = self.fault(prompt.text, rules) or (
                None if first == index else f"expected each prompt once, got prompt {first} again"
            )
            if problem:
                raise DataError(f"'prompts' {index}: {problem}" if index else f"the original prompt: {problem}")
        return self

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts, the original first."""
        return tuple(prompt.text for prompt in self.entries)

    @property
    def provenance(self) -> tuple[str, ...]:
        """Where each prompt is from."""
        return tuple(prompt.source for prompt in self.entries)

    @property
    def required(self) -> tuple[str, ...]:
        """The labels that occur in the original as whole words, hence must in every paraphrase."""
        return tuple(label for label in self.labels if checks.occurs(label, self.entries[0].text))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptPool) and self.model_dump() == other.model_dump()

    def save(self, path: str | os.PathLike) -> None:
        """Write the pool as JSON, all or nothing. Raises: `OSError` from writing."""
        write_json(path, self.model_dump(mode="json", by_alias=True))

    def extended(self, paraphrases: Iterable[PoolPrompt | str]) -> PromptPool:
        """This pool with the `paraphrases` that pass behind its own; the prompts it has keep their places."""
        entries, rejected, rules = list(self.entries), list(self.rejected), self._rules()
        known = {checks.normalised(prompt.text): prompt.text for prompt in entries}
        for number, item in enumerate([paraphrases] if isinstance(paraphrases, str) else paraphrases):
            if isinstance(item, str):
                item = PoolPrompt(item, "given")
            if not isinstance(item, PoolPrompt) or not isinstance(item.text, str) or not isinstance(item.source, str):
                raise TypeError(f"paraphrase {number}: expected a string or a PoolPrompt, got {excerpt(item)}")
            _one_line(item.source)
            problem = self.fault(item.text, rules)
            if problem is None and (first := known.get(checks.normalised(item.text))) is not None:
                problem = f"expected each prompt once, got {excerpt(first)} again"
            if problem is None and len(entries) >= MAX_PROMPTS:
                problem = f"expected at most {MAX_PROMPTS} prompts, got more"
            if problem is not None:
                kept = checks.storable(item.text, MAX_REJECTED_CHARACTERS)
                rejected.append(RejectedPrompt(kept, item.source, problem))
            else:
                known[checks.normalised(item.text)] = item.text
                entries.append(item)
        return self._grown(entries, rejected)

    def _grown(self, entries: Iterable[PoolPrompt], rejected: Iterable[RejectedPrompt]) -> PromptPool:
        lost = tuple(dict.fromkeys(rejected))[:MAX_REJECTED]
        return self.model_copy(update={"entries": tuple(entries), "rejected": lost})

    def checked(self, tokenizer: Any = None, *, markers: Sequence[str] = ()) -> PromptPool:
        """This pool by the rules of `tokenizer` and with more `markers`: paraphrases that fail are moved to `rejected`.

        Prompts behind one that fails move up. Raises: `DataError` if the original or the suffix fails.
        """
        kept = {name: getattr(self, name) for name in ("task", "suffix", "labels", "text_word")}
        markers = (*self.markers, *markers)
        pool = PromptPool.build(
            original=self.prompts[0], paraphrases=self.entries[1:], tokenizer=tokenizer, markers=markers, **kept
        )
        return pool.with_history(self)

    def with_history(self, other: PromptPool) -> PromptPool:
        """This pool with the rejected prompts of `other` in front of its own."""
        return self._grown(self.entries, (*other.rejected, *self.rejected))

    def fault(self, text: str, rules: dict[str, Any] | None = None) -> str | None:
        """Why `text` cannot be a prompt of this pool ("expected ..., got ..."), or None. Repetition is no fault."""
        problem = checks.fault(text, **(rules or self._rules()))
        if problem is None and self._tokenizer is not None:
            count = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            if count > MAX_TOKENS:
                return f"expected at most {MAX_TOKENS} tokens, got {count}"
        return problem

    def _rules(self) -> dict[str, Any]:
        specials = []
        if self._tokenizer is not None:
            # Here, so that pools can be read without torch being loaded for it.
            from sapo_kernels.scoring.render import special_tokens

            specials = special_tokens(self._tokenizer)
        return {"required": self.required, "markers": self.markers, "specials": specials}

    def notes(self) -> list[str]:
        """What a reader of the results should know about this pool, one sentence a kind."""
        lost: dict[tuple[str, str], list[str]] = {}
        for one in self.rejected:
            lost.setdefault((one.source, one.reason), []).append(one.text)
        return [f"{len(texts)} of the paraphrases from {source} rejected: {reason}: {excerpt(texts[0])}"
                        for (source, reason), texts in lost.items()]  # fmt: skip


read_prompts = PromptPool.read


def file_source(path: Path) -> str:
    """The provenance "file:NAME". What a file name may hold and no file may (other bytes, line ends) is escaped."""
    return f"file:{plain(path.name or path.resolve().name)}"


def is_pool_file(path: str | os.PathLike) -> bool:
    """Whether `PromptPool.save` wrote this file, or one that says so."""
    return _pool_document(path) is not None


def _pool_document(path: str | os.PathLike) -> dict[str, Any] | None:
    path = Path(path)
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    document = read_json(path, max_bytes=MAX_POOL_BYTES)
    return document if isinstance(document, dict) and isinstance(document.get("schema"), str) else None
