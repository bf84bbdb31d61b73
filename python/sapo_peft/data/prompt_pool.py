"""The prompts of one task that SAPO chooses among: the original instruction and its checked paraphrases."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError, excerpt, read_json, write_json

from ..terminal import plain
from . import prompt_checks as checks
from .examples import MAX_PROMPT_BYTES, MAX_PROMPTS, PromptSet, TaskNameError, read_prompts

SCHEMA, VERSION = "sapo_prompt_pool", 1
MAX_CHARACTERS = 16_384
MAX_TOKENS = 1024
MAX_POOL_BYTES = 4 * MAX_PROMPT_BYTES
# What is kept of a rejected prompt, and of how many: enough to see what went wrong, whatever a source sends.
MAX_REJECTED_CHARACTERS = 2000
MAX_REJECTED = 1000
_MAX_NAME = 1000
_KEYS = {
    "schema": str,
    "version": int,
    "task": str,
    "text_word": str,
    "suffix": str,
    "labels": list,
    "markers": list,
    "max_characters": int,
    "max_tokens": int,
    "prompts": list,
    "rejected": list,
    "merged": list,
}


@dataclass(frozen=True)
class PoolPrompt:
    """One prompt and where it is from: "original", "file:NAME", "endpoint:MODEL", "model:NAME", ..."""

    text: str
    source: str


@dataclass(frozen=True)
class RejectedPrompt:
    """A paraphrase that was not taken, and why. `text` may be shortened, what no file can hold is escaped."""

    text: str
    source: str
    reason: str


@dataclass(frozen=True)
class MergedPrompt:
    """A paraphrase equal to ``prompts[into]`` but for spaces, case and compatibility forms of characters."""

    text: str
    source: str
    into: int


@dataclass(frozen=True)
class PromptPool:
    """The candidates of one task, checked; made by `build`, `read` and `from_prompt_set`, never changed.

    task: its name. prompts: the texts, the original instruction first, all different after `normalised`.
    provenance: the source of each, "original" for the first. suffix: the answer-format line, not paraphrased.
    labels: label names; those in the original stand in every prompt. markers: texts that stand in every prompt.
    text_word: the word that heads the input. rejected, merged: what was not taken (the first `MAX_REJECTED` of
    each are kept). max_characters, max_tokens: bounds on one prompt, the second with a tokenizer only.
    remarks: sentences of whoever filled the pool; neither they nor the tokenizer are saved or compared.
    """

    task: str
    prompts: tuple[str, ...]
    provenance: tuple[str, ...]
    suffix: str = ""
    labels: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    text_word: str = "Text"
    rejected: tuple[RejectedPrompt, ...] = ()
    merged: tuple[MergedPrompt, ...] = ()
    max_characters: int = MAX_CHARACTERS
    max_tokens: int = MAX_TOKENS
    remarks: tuple[str, ...] = field(default=(), compare=False)
    tokenizer: Any = field(default=None, compare=False, repr=False)

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
        max_characters: int = MAX_CHARACTERS,
        max_tokens: int = MAX_TOKENS,
    ) -> PromptPool:
        """A pool of `original` and those `paraphrases` that pass; a plain string has the source "given".

        A prompt has 1 to `max_characters` characters, none of them a control, an unpaired surrogate or made to
        deceive the eye. Every label that occurs in the original as a whole word, in that case, occurs so in
        each paraphrase, and every marker. With a `tokenizer` it has at most `max_tokens` tokens and holds none
        of its special tokens. Paraphrases that fail are kept in `rejected`, repeated ones in `merged`.

        Raises: `DataError` naming the item for a fault in anything but a paraphrase; `TypeError` for a
        paraphrase that is neither a string nor a `PoolPrompt`.
        """
        for name, value in (("max_characters", max_characters), ("max_tokens", max_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DataError(f"{name}: wanted a whole number of at least 1, got {excerpt(value)}")
        _check_name(task, "task")
        _check_name(text_word, "text_word")
        specials = _specials(tokenizer)
        if suffix:
            _check_part(suffix, "suffix", specials, max_characters)
        for what, texts in (("labels", labels), ("markers", markers)):
            if isinstance(texts, str) or len(texts) > MAX_PROMPTS:
                raise DataError(f"{what}: wanted a list of at most {MAX_PROMPTS} texts, got {excerpt(texts)}")
            for index, text in enumerate(texts):
                _check_part(text, f"{what} {index}", (), _MAX_NAME)
        markers = tuple(dict.fromkeys(markers))
        if not isinstance(original, str):
            raise DataError(f"task {excerpt(task)}: the original prompt: wanted text, got {excerpt(original)}")
        pool = cls(
            task,
            (original,),
            ("original",),
            suffix=suffix,
            labels=tuple(dict.fromkeys(labels)),
            markers=markers,
            text_word=text_word,
            max_characters=max_characters,
            max_tokens=max_tokens,
            tokenizer=tokenizer,
        )
        if problem := pool.fault(original):
            raise DataError(f"task {excerpt(task)}: the original prompt: {problem}")
        return pool.extended(paraphrases)

    @classmethod
    def from_prompt_set(cls, prompt_set: PromptSet, **options: Any) -> PromptPool:
        """The pool of a `PromptSet`, whose first prompt is taken as the original; `options` as for `build`.

        The set's suffix, labels and text word are used unless `options` has others. The source of the
        paraphrases is "file:" and the name of the last file read.
        """
        files = [Path(source) for source in prompt_set.sources]
        source = file_source(files[-1]) if files else "given"
        known = {"suffix": prompt_set.suffix, "labels": prompt_set.labels, "text_word": prompt_set.text_word}
        # A plain list names no task; what the file is called is the best that is known.
        task = options.pop("task", None) or prompt_set.task or (plain(files[0].stem) if files else "task")
        paraphrases = [PoolPrompt(text, source) for text in prompt_set.prompts[1:]]
        return cls.build(task, prompt_set.prompts[0], paraphrases, **{**known, **options})

    @classmethod
    def read(cls, path: str | os.PathLike, task: str | None = None, **options: Any) -> PromptPool:
        """The pool in a file that `save` wrote, exactly; or one made of what `data.read_prompts` reads.

        `task` chooses among several tasks of a file; that of a saved pool must be the same. `options` are those
        of `build`, for files that are no saved pool (use `checked` on that).

        Raises: `DataError` naming the file and the item: a saved pool with an unknown version or key, or with a
        prompt that fails its own rules, is refused as a whole, for to leave out one would renumber the others.
        """
        document = _pool_document(path)
        if document is not None:
            if options:
                raise TypeError(f"{path} is a saved pool: wanted no options, got {', '.join(options)}")
            return _from_document(document, str(path), task)
        prompt_set = read_prompts(path, task)
        try:
            return cls.from_prompt_set(prompt_set, **options)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the pool as JSON, all or nothing.

        Raises: `DataError` for a pool too large to be read again; `OSError` from writing.
        """
        names = [key for key in _KEYS if key not in ("schema", "version", "prompts", "rejected", "merged")]
        document = {"schema": SCHEMA, "version": VERSION, **{name: getattr(self, name) for name in names}}
        pairs = zip(self.prompts, self.provenance, strict=True)
        document["prompts"] = [{"text": text, "source": source} for text, source in pairs]
        document["rejected"] = [asdict(prompt) for prompt in self.rejected]
        document["merged"] = [asdict(prompt) for prompt in self.merged]
        size = len(json.dumps(document, ensure_ascii=False, indent=1).encode())
        if size > MAX_POOL_BYTES:  # `read` would refuse it
            raise DataError(f"{os.fspath(path)}: wanted a pool of at most {MAX_POOL_BYTES} bytes, got {size}")
        write_json(path, document)

    def extended(self, paraphrases: Iterable[PoolPrompt | str]) -> PromptPool:
        """This pool with the `paraphrases` that pass behind its own; the prompts it has keep their places."""
        prompts, provenance = list(self.prompts), list(self.provenance)
        rejected, merged = dict.fromkeys(self.rejected), dict.fromkeys(self.merged)
        places = {checks.normalised(text): place for place, text in enumerate(prompts)}
        rules = self._rules()
        for number, item in enumerate([paraphrases] if isinstance(paraphrases, str) else paraphrases):
            if isinstance(item, str):
                item = PoolPrompt(item, "given")
            if not isinstance(item, PoolPrompt) or not isinstance(item.text, str) or not isinstance(item.source, str):
                raise TypeError(f"paraphrase {number}: wanted a string or a PoolPrompt, got {excerpt(item)}")
            _check_name(item.source, f"paraphrase {number}: source")
            problem = self.fault(item.text, rules)
            place = None if problem else places.get(checks.normalised(item.text))
            if problem is None and place is None and len(prompts) >= MAX_PROMPTS:
                problem = f"wanted at most {MAX_PROMPTS} prompts, got more"
            if problem is not None:
                kept = checks.storable(item.text, MAX_REJECTED_CHARACTERS)
                _keep(rejected, RejectedPrompt(kept, item.source, problem))
            elif place is not None:
                _keep(merged, MergedPrompt(item.text, item.source, place))
            else:
                places[checks.normalised(item.text)] = len(prompts)
                prompts.append(item.text)
                provenance.append(item.source)
        return replace(
            self,
            prompts=tuple(prompts),
            provenance=tuple(provenance),
            rejected=tuple(rejected),
            merged=tuple(merged),
        )

    def checked(
        self, tokenizer: Any = None, *, markers: Sequence[str] = (), max_tokens: int | None = None
    ) -> PromptPool:
        """This pool by the rules of `tokenizer` and with more `markers`: paraphrases that fail are moved to `rejected`.

        Prompts behind one that fails move up. Raises: `DataError` if the original or the suffix fails.
        """
        own = zip(self.prompts[1:], self.provenance[1:], strict=True)
        pool = PromptPool.build(
            self.task,
            self.prompts[0],
            [PoolPrompt(*pair) for pair in own],
            suffix=self.suffix,
            labels=self.labels,
            markers=(*self.markers, *markers),
            text_word=self.text_word,
            tokenizer=tokenizer,
            max_characters=self.max_characters,
            max_tokens=max_tokens or self.max_tokens,
        )
        return replace(pool.with_history(self), remarks=self.remarks)

    def with_history(self, other: PromptPool) -> PromptPool:
        """This pool with the rejected and merged prompts of `other` in front of its own.

        A merged prompt points at the prompt here that it repeats; where there is none it is left out.
        """
        places = {checks.normalised(text): place for place, text in enumerate(self.prompts)}
        found = [(m, places.get(checks.normalised(m.text))) for m in (*other.merged, *self.merged)]
        merged = dict.fromkeys(replace(m, into=place) for m, place in found if place is not None)
        rejected = dict.fromkeys([*other.rejected, *self.rejected])
        return replace(self, merged=tuple(merged)[:MAX_REJECTED], rejected=tuple(rejected)[:MAX_REJECTED])

    @property
    def required(self) -> tuple[str, ...]:
        """The labels that occur in the original as whole words, hence must in every paraphrase."""
        return tuple(label for label in self.labels if checks.occurs(label, self.prompts[0]))

    def fault(self, text: str, rules: dict[str, Any] | None = None) -> str | None:
        """Why `text` cannot be a prompt of this pool ("wanted ..., got ..."), or None. Repetition is no fault."""
        problem = checks.fault(text, **(rules or self._rules()))
        if problem is None and self.tokenizer is not None:
            count = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if count > self.max_tokens:
                return f"wanted at most {self.max_tokens} tokens, got {count}"
        return problem

    def _rules(self) -> dict[str, Any]:
        return {
            "required": self.required,
            "markers": self.markers,
            "specials": _specials(self.tokenizer),
            "max_characters": self.max_characters,
        }

    def notes(self) -> list[str]:
        """What a reader of the results should know about this pool, one sentence each."""
        notes = [f"a paraphrase from {m.source} repeats prompt {m.into} and was merged into it" for m in self.merged]
        notes += [f"a paraphrase from {r.source} was rejected: {r.reason}: {excerpt(r.text)}" for r in self.rejected]
        return [*notes, *self.remarks]


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


def _keep(kept: dict[Any, None], item: Any) -> None:
    if len(kept) < MAX_REJECTED:
        kept[item] = None


def _specials(tokenizer: Any) -> list[str]:
    if tokenizer is None:
        return []
    # Here, so that pools can be read without torch being loaded for it.
    from sapo_kernels.scoring.render import special_tokens

    return special_tokens(tokenizer)


def _check_name(text: Any, what: str) -> None:
    """A short text on one line: it stands in messages, tables and logs."""
    if not isinstance(text, str) or not checks.normalised(text) or len(text) > _MAX_NAME:
        raise DataError(f"{what}: wanted a text of 1 to {_MAX_NAME} characters, got {excerpt(text)}")
    if (problem := checks.character_fault(text)) or "\n" in text or "\r" in text:
        raise DataError(f"{what}: wanted a text on one line, got {problem or 'a line end'} in {excerpt(text)}")


def _check_part(text: Any, what: str, specials: Sequence[str], limit: int) -> None:
    if not isinstance(text, str):
        raise DataError(f"{what}: wanted text, got {type(text).__name__} {excerpt(text)}")
    if problem := checks.fault(text, specials=specials, max_characters=limit):
        raise DataError(f"{what}: {problem}")


def _from_document(document: dict[str, Any], place: str, task: str | None) -> PromptPool:
    if document["schema"] != SCHEMA:
        raise DataError(f"{place}: 'schema': wanted {SCHEMA!r}, got {excerpt(document['schema'])}")
    # Before the keys: another version may have others.
    if document.get("version") != VERSION or isinstance(document["version"], bool):
        raise DataError(f"{place}: 'version': wanted {VERSION}, got {excerpt(document.get('version'))}")
    _check_keys(document, _KEYS, place)
    if task is not None and task != document["task"]:
        wanted, got = excerpt(task), excerpt(document["task"])
        raise TaskNameError(f"{place}: wanted the task {wanted}, got a pool of {got}")
    prompts, rejected, merged = (
        _entries(document, "prompts", {"text": str, "source": str}, place),
        _entries(document, "rejected", {"text": str, "source": str, "reason": str}, place),
        _entries(document, "merged", {"text": str, "source": str, "into": int}, place),
    )
    if not prompts or prompts[0]["source"] != "original":
        raise DataError(f"{place}: 'prompts' 0: wanted the original prompt, got {excerpt(prompts[:1])}")
    if len(prompts) > MAX_PROMPTS:
        raise DataError(f"{place}: 'prompts': wanted at most {MAX_PROMPTS}, got {len(prompts)}")
    names = ("suffix", "labels", "markers", "text_word", "max_characters", "max_tokens")
    try:
        pool = PromptPool.build(document["task"], prompts[0]["text"], **{name: document[name] for name in names})
        rules, seen = pool._rules(), {}
        for index, prompt in enumerate(prompts):
            _check_name(prompt["source"], f"'prompts' {index}: 'source'")
            first = seen.setdefault(checks.normalised(prompt["text"][: pool.max_characters + 1]), index)
            problem = pool.fault(prompt["text"], rules) or (
                None if first == index else f"wanted each prompt once, got prompt {first} again"
            )
            if problem:
                raise DataError(f"'prompts' {index}: {problem}")
        for index, item in enumerate(merged):
            if not 0 <= item["into"] < len(prompts):
                raise DataError(f"'merged' {index}: wanted the index of a prompt, got {item['into']}")
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    return replace(
        pool,
        prompts=tuple(prompt["text"] for prompt in prompts),
        provenance=tuple(prompt["source"] for prompt in prompts),
        rejected=tuple(RejectedPrompt(**item) for item in rejected),
        merged=tuple(MergedPrompt(**item) for item in merged),
    )


def _entries(document: dict[str, Any], key: str, kinds: dict[str, type], place: str) -> list[dict[str, Any]]:
    for index, item in enumerate(document[key]):
        _check_keys(item, kinds, f"{place}: {key!r} {index}")
    return document[key]


def _check_keys(item: Any, kinds: dict[str, type], place: str) -> None:
    if not isinstance(item, dict):
        raise DataError(f"{place}: wanted an object, got {excerpt(item)}")
    for name in [*kinds, *item]:
        if name not in item or name not in kinds:
            got = "got it too" if name in item else "it is not there"
            raise DataError(f"{place}: wanted the keys {', '.join(kinds)}, and {excerpt(name)}: {got}")
    for name, kind in kinds.items():
        if not isinstance(item[name], kind) or isinstance(item[name], bool):
            raise DataError(f"{place}: {name!r}: wanted {kind.__name__}, got {excerpt(item[name])}")
