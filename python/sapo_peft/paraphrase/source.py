"""The interface of paraphrase sources and the one driver: ask, read, check, save, and stop in time."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
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
_MAX_ROUNDS = 100
_SHOWN_FAULTS = 3


class SourceError(RuntimeError):
    """A source cannot go on: no connection, a wrong key or model name. The message holds no secret."""


class TooFewPrompts(RuntimeError):
    """Fewer valid paraphrases than the minimum arrived; those that did are in the store, if there is one."""


class Deadline:
    """A moment in time, `seconds` from now on `clock` (a function giving seconds that never goes back)."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        if isinstance(seconds, bool) or not 0 < seconds < 1e9:
            raise ValueError(f"deadline_seconds: expected a number above 0 and below 1e9, got {seconds!r}")
        self.seconds, self._clock = float(seconds), clock
        self._end = clock() + self.seconds

    @property
    def left(self) -> float:
        """Seconds to go, 0.0 from the deadline on."""
        return max(0.0, self._end - self._clock())

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
    clock: Callable[[], float] = time.monotonic,
) -> PromptPool:
    """`pool` with up to `wanted` more paraphrases from `source`, checked by the pool's own rules.

    Each answer is saved to `store` (a ``.json`` file that `PromptPool.read` reads) as it arrives. Called again with
    that file, after a crash, Ctrl-C or an outage, it goes on from there and asks only for what is missing;
    `overwrite` begins anew, whatever the file holds. It ends when there are enough, after `deadline_seconds` of `clock`
    (a function giving seconds that never goes back), when the source cannot go on, or when three rounds of asking
    brought nothing new. If fewer than `wanted` are there then, the result says so in `notes()`, and so does the log.

    Raises: `TooFewPrompts` if fewer than `minimum` of the `wanted` are there at the end; `DataError` if the store
    is there and no pool of this task and original; `RuntimeError` if another process fills it; `OSError` from saving.
    """
    for name, value, least in (("wanted", wanted, 1), ("minimum", minimum, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if minimum > wanted:
        raise ValueError(f"minimum: expected at most wanted={wanted}, got {minimum}")
    deadline, before = Deadline(deadline_seconds, clock), len(pool.prompts)
    size = before + wanted
    if size > MAX_PROMPTS:
        raise ValueError(f"wanted: a pool holds at most {MAX_PROMPTS} prompts, got {before} and {wanted} more")
    with nullcontext() if store is None else _only_writer(Path(store)):
        if store is not None and not overwrite:
            pool = resumed_from(pool, Path(store), size)
            if len(pool.prompts) > before:
                _log.info("%d paraphrases from an earlier run are in %s", len(pool.prompts) - before, store)
        faults: Counter[str] = Counter()
        pool, why = _ask(pool, source, size, deadline, store, faults, Counter(pool.entries[before:]))
        got = len(pool.prompts) - before
        if got < wanted:
            remark = f"{got} of the {wanted} paraphrases asked for are there: {why}"
            for fault, count in faults.most_common(_SHOWN_FAULTS):
                remark += f"; {count} answer{'s' * (count > 1)}: {fault}"
            if got < minimum:
                saved = f" (what arrived is in {store})" if store is not None and got else ""
                raise TooFewPrompts(
                    f"{source.name}: expected at least {minimum} paraphrases, got {got}{saved}; {remark}"
                )
            _log.warning("%s: %s", source.name, remark)
            pool = pool.with_remarks(remark)
        if store is not None:
            pool.save(store)
    return pool


def _ask(
    pool: PromptPool,
    source: ParaphraseSource,
    size: int,
    deadline: Deadline,
    store: str | os.PathLike | None,
    faults: Counter[str],
    taken: Counter[PoolPrompt],
) -> tuple[PromptPool, str]:
    """(the pool, grown to at most `size` prompts; why it ended). What was wrong with answers is counted in `faults`.

    taken: what an earlier run has from a source that gives all it holds again; that is no repetition.
    """
    idle = answers = 0
    for _ in range(_MAX_ROUNDS):
        have = len(pool.prompts)
        if have >= size:
            return pool, "there are enough"
        request = Request(pool.prompts[0], size - have, pool.required, pool.markers, known=pool.prompts[1:])
        try:
            with closing(source.paraphrase(request, deadline)) as given:
                for answer in given:
                    answers += 1
                    if answer.fault:
                        faults[answer.fault] += 1
                        _log.info("%s: an answer was not used in full: %s", source.name, answer.fault)
                    grown = pool
                    for prompt in (PoolPrompt(text, answer.source) for text in answer.texts):
                        if source.finite and taken[prompt]:
                            taken[prompt] -= 1
                        elif len(grown.prompts) < size:
                            grown = grown.extended([prompt])
                    if store is not None and grown != pool:
                        grown.save(store)
                    pool = grown
                    if len(pool.prompts) >= size:
                        break
        except SourceError as error:
            return pool, str(error)
        if deadline.over:
            return pool, f"the deadline of {deadline.seconds:g} s was reached"
        if source.finite:
            return pool, f"{source.name} holds no more"
        idle = idle + 1 if len(pool.prompts) == have else 0
        if idle == _IDLE_ROUNDS:
            return pool, f"asking {idle} times in a row brought no new valid one ({answers} answers in all)"
    return pool, f"asked {_MAX_ROUNDS} times"


@contextmanager
def _only_writer(store: Path) -> Iterator[None]:
    """Nobody else writes to `store` meanwhile. Faults come before the first question: lost answers cost money."""
    folder = store.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(f"{store}: expected a file in a folder that can be written to, got none")
    if store.suffix.lower() != ".json":
        raise DataError(f"{store}: expected a file that ends in .json, got {excerpt(store.name)}")
    with only_writer(store):
        yield


def resumed_from(pool: PromptPool, store: Path, size: int = MAX_PROMPTS) -> PromptPool:
    """`pool` with what an earlier run left in `store`, if anything, up to `size` prompts.

    The store's prompts pass the pool's rules like any other. Raises: `DataError` if it is no pool of this task
    and original.
    """
    if not store.exists():
        return pool
    if not is_pool_file(store):
        raise DataError(
            f"{store}: expected a saved pool, to go on with, got another file; choose another name, or overwrite it"
        )
    saved = PromptPool.read(store)
    for name, expected, got in (
        ("task", pool.task, saved.task),
        ("original prompt", pool.prompts[0], saved.prompts[0]),
    ):
        if expected != got:
            raise DataError(f"{store}: expected a pool of the {name} {excerpt(expected)}, got {excerpt(got)}")
    for prompt in zip(saved.prompts[1:], saved.provenance[1:], strict=True):
        # A prompt that both have is no repetition to tell of.
        if prompt[0] not in pool.prompts and len(pool.prompts) < size:
            pool = pool.extended([PoolPrompt(*prompt)])
    return pool.with_history(saved)
