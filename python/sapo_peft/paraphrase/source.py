"""The interface of paraphrase sources and the one driver: ask, read, check, save, and stop in time."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sapo_kernels.files import DataError, excerpt

from ..data.prompt_files import MAX_PROMPTS
from ..data.prompt_pool import PoolPrompt, PromptPool, is_pool_file
from ..locks import only_writer
from .answers import Request

_log = logging.getLogger(__name__)
# A source that gives nothing new this many times in a row has nothing more to give.
_IDLE_ROUNDS = 3
_SHOWN_FAULTS = 3


class SourceError(RuntimeError):
    """A source cannot be used: no connection, a wrong key or model name. The message contains no secret."""


class TooFewPrompts(RuntimeError):
    """Fewer valid paraphrases than the minimum arrived; those that did are in the store, if there is one."""


class Deadline:
    """A moment in time, `seconds` from now."""

    def __init__(self, seconds: float):
        if not 0 < seconds < 1e9:
            raise ValueError(f"deadline_seconds: expected a number above 0 and below 1e9, got {seconds!r}")
        self.seconds = float(seconds)
        self._end = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        """Seconds to go, 0.0 from the deadline on."""
        return max(0.0, self._end - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether it has come."""
        return self.left <= 0.0


@dataclass(frozen=True)
class Answer:
    """What came back for one question: the `texts` of paraphrases, their `source`, the `fault` if there is one."""

    texts: tuple[str, ...]
    source: str
    fault: str | None = None


class ParaphraseSource(Protocol):
    """Something that gives paraphrases.

    name: short, on one line, without secrets. paraphrase: yields answers as they arrive, about
    ``request.wanted`` paraphrases in all, and ends at the deadline at the latest; closing the iterator stops all
    work. Texts are not checked there. Raises `SourceError` if asking again is of no use. `finite`: all there is
    comes with the first call.
    """

    name: str
    finite: bool

    def paraphrase(self, request: Request, deadline: Deadline) -> Iterator[Answer]:
        """See the class."""
        ...


def gather(
    pool: PromptPool,
    source: ParaphraseSource,
    wanted: int = 20,
    minimum: int = 0,
    deadline_seconds: float = 600.0,
    store: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> PromptPool:
    """`pool` with up to `wanted` more paraphrases from `source`, checked by the pool's own rules.

    Each answer is saved to `store` (a ``.json`` file that `PromptPool.read` reads) as it arrives. Called again with
    that file, after a crash, Ctrl-C or an outage, it resumes there and asks only for what is missing;
    `overwrite` starts over, whatever the file holds. It ends when there are enough, after `deadline_seconds`, when the
    source cannot be used, or when three rounds of asking brought nothing new. If fewer than `wanted` are there then, a
    warning in the log says how many and why.

    Raises: `TooFewPrompts` if fewer than `minimum` of the `wanted` are there at the end; `DataError` if the store
    is there and no pool of this task and original; `RuntimeError` if another process fills it; `OSError` from saving.
    """
    before, deadline = len(pool.prompts), Deadline(deadline_seconds)
    if wanted < 1 or not 0 <= minimum <= wanted:
        raise ValueError(f"wanted, minimum: expected at least 1 and from 0 to wanted, got {wanted} and {minimum}")
    if before + wanted > MAX_PROMPTS:
        raise ValueError(f"wanted: a pool holds at most {MAX_PROMPTS} prompts, got {before} and {wanted} more")
    if store is not None:
        # Faults come before the first question: lost answers cost money.
        store = Path(store)
        if not os.access(store.resolve().parent, os.W_OK):
            raise DataError(f"{store}: expected a file in a folder that can be written to, got none")
        if store.suffix.lower() != ".json":
            raise DataError(f"{store}: expected a file that ends in .json, got {excerpt(store.name)}")
    with only_writer(store):
        if store is not None and not overwrite:
            pool = resumed_from(pool, store, before + wanted)
            if len(pool.prompts) > before:
                _log.info("%d paraphrases from an earlier run are in %s", len(pool.prompts) - before, store)
        pool, ended = _asked(pool, source, before + wanted, deadline, store)
        got = len(pool.prompts) - before
        if got < wanted:
            told = f"{got} of the {wanted} paraphrases arrived: {ended}"
            if got < minimum:
                saved = f" (what arrived is in {store})" if store is not None and got else ""
                raise TooFewPrompts(f"{source.name}: expected at least {minimum} paraphrases, got {got}{saved}; {told}")
            _log.warning("%s: %s", source.name, told)
        if store is not None:
            pool.save(store)
    return pool


def _asked(
    pool: PromptPool, source: ParaphraseSource, size: int, deadline: Deadline, store: Path | None
) -> tuple[PromptPool, str]:
    """(the pool, grown to at most `size` prompts and saved with each answer; why it ended)."""
    faults: Counter[str] = Counter()
    idle = answers = 0
    while (have := len(pool.prompts)) < size:
        request, ended = Request(pool.prompts[0], size - have, pool.required, pool.markers, pool.prompts[1:]), ""
        try:
            with closing(source.paraphrase(request, deadline)) as given:
                for answer in given:
                    answers += 1
                    if answer.fault:
                        faults[answer.fault] += 1
                        _log.info("%s: an answer was not used in full: %s", source.name, answer.fault)
                    grown = pool
                    for text in answer.texts:
                        if len(grown.prompts) < size:
                            grown = grown.extended([PoolPrompt(text, answer.source)])
                    if store is not None and grown != pool:
                        grown.save(store)
                    pool = grown
                    if len(pool.prompts) >= size:
                        break
        except SourceError as error:
            ended = str(error)
        idle = idle + 1 if len(pool.prompts) == have else 0
        if not ended and deadline.over:
            ended = f"the deadline of {deadline.seconds:g} s was reached"
        elif not ended and source.finite:
            ended = f"{source.name} holds no more"
        elif not ended and idle == _IDLE_ROUNDS:
            ended = f"asking {idle} times in a row brought no new valid one ({answers} answers in all)"
        if ended:
            told = [f"{count} answer{'s' * (count > 1)}: {fault}" for fault, count in faults.most_common(_SHOWN_FAULTS)]
            return pool, "; ".join([ended, *told])
    return pool, "there are enough"


def resumed_from(pool: PromptPool, store: Path, size: int = MAX_PROMPTS) -> PromptPool:
    """`pool` with what an earlier run left in `store`, if anything, up to `size` prompts.

    The store's prompts pass the pool's rules like any other. Raises: `DataError` if it is no pool of this task
    and original.
    """
    if not store.exists():
        return pool
    if not is_pool_file(store):
        raise DataError(
            f"{store}: expected a saved pool to continue, got another file; choose another name, or overwrite it"
        )
    saved = PromptPool.read(store)
    for name, expected, got in (
        ("task", pool.task, saved.task),
        ("original prompt", pool.prompts[0], saved.prompts[0]),
    ):
        if expected != got:
            raise DataError(f"{store}: expected a pool of the {name} {excerpt(expected)}, got {excerpt(got)}")
    for prompt in saved.entries[1:]:
        # A prompt that both have is no repetition to tell of.
        if prompt.text not in pool.prompts and len(pool.prompts) < size:
            pool = pool.extended([prompt])
    return pool.with_history(saved)
