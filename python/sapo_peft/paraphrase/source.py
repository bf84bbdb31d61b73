"""The interface of paraphrase sources and the one driver: ask, read, check, save, and stop in time."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sapo_kernels.files import DataError, excerpt

from ..data.prompt_files import MAX_PROMPTS
from ..data.prompt_pool import PoolPrompt, PromptPool
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
            raise ValueError(f"deadline_seconds: wanted a number above 0 and below 1e9, got {seconds!r}")
        self.seconds, self._clock = float(seconds), clock
        self._end = clock() + self.seconds

    @property
    def left(self) -> float:
        """Seconds to go, 0.0 from the deadline on."""
        return max(0.0, self._end - self._clock())

    @property
    def over(self) -> bool:
        return self.left <= 0.0


@dataclass(frozen=True)
class Answer:
    """What came back for one question: the paraphrases in it, where they are from, what was wrong with it."""

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

    def paraphrase(self, request: Request, deadline: Deadline) -> Iterator[Answer]: ...


def gather(
    pool: PromptPool,
    source: ParaphraseSource,
    wanted: int = 20,
    minimum: int = 0,
    deadline_seconds: float = 600.0,
    store: str | os.PathLike | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> PromptPool:
    """`pool` with up to `wanted` more paraphrases from `source`, checked by the pool's own rules.

    Each answer is saved to `store` (a file that `PromptPool.read` reads) as it arrives. Called again with that
    file, after a crash, Ctrl-C or an outage, it goes on from there and asks only for what is missing. It ends
    when there are enough, at the deadline, when the source cannot go on, or when three rounds of asking brought
    nothing new. If fewer than `wanted` are there then, the result says so in `notes()`, and so does the log.

    Raises: `TooFewPrompts` if fewer than `minimum` of the `wanted` are there at the end; `DataError` if the
    store is no pool of this task and original; `OSError` from saving.
    """
    for name, value, least in (("wanted", wanted, 1), ("minimum", minimum, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: wanted a whole number of at least {least}, got {value!r}")
    if minimum > wanted:
        raise ValueError(f"minimum: wanted at most wanted={wanted}, got {minimum}")
    deadline = Deadline(deadline_seconds, clock)
    before = len(pool.prompts)
    if before + wanted > MAX_PROMPTS:
        raise ValueError(f"wanted: a pool holds at most {MAX_PROMPTS} prompts, got {before} and {wanted} more")
    if store is not None:
        pool = resumed_from(pool, Path(store), before + wanted)
    have = len(pool.prompts) - before
    if have:
        _log.info("%d paraphrases from an earlier run are in %s", have, store)
    faults: dict[str, int] = {}
    why = _ask(pool, source, before + wanted, deadline, faults, store) if have < wanted else None
    if why is not None:
        pool, why = why
    got = len(pool.prompts) - before
    if got < wanted:
        remark = f"{got} of the {wanted} paraphrases asked for are there: {why}"
        for fault, count in sorted(faults.items(), key=lambda item: -item[1])[:_SHOWN_FAULTS]:
            remark += f"; {count} answer{'s' * (count > 1)}: {fault}"
        if got < minimum:
            saved = f" (what arrived is in {store})" if store is not None and got else ""
            raise TooFewPrompts(f"{source.name}: wanted at least {minimum} paraphrases, got {got}{saved}; {remark}")
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
    faults: dict[str, int],
    store: str | os.PathLike | None,
) -> tuple[PromptPool, str]:
    """(the pool, grown to at most `size` prompts; why it ended)."""
    idle, paraphrases = 0, 0
    for number in range(_MAX_ROUNDS):
        before = len(pool.prompts)
        request = Request(
            pool.prompts[0], size - before, pool.required, pool.markers, known=pool.prompts[1:], number=number
        )
        try:
            with closing(source.paraphrase(request, deadline)) as answers:
                for answer in answers:
                    if answer.fault:
                        faults[answer.fault] = faults.get(answer.fault, 0) + 1
                        _log.info("%s: an answer was not used in full: %s", source.name, answer.fault)
                    paraphrases += len(answer.texts)
                    grown = _grown(pool, answer, size)
                    if store is not None and grown != pool:
                        grown.save(store)
                    pool = grown
                    if len(pool.prompts) >= size:
                        return pool, "there are enough"
        except SourceError as error:
            return pool, str(error)
        if deadline.over:
            return pool, f"the deadline of {deadline.seconds:g} s was reached"
        if source.finite:
            return pool, f"{source.name} holds no more"
        idle = idle + 1 if len(pool.prompts) == before else 0
        if idle == _IDLE_ROUNDS:
            return pool, f"asking {idle} times in a row brought no new valid one ({paraphrases} were read in all)"
    return pool, f"asked {_MAX_ROUNDS} times"


def _grown(pool: PromptPool, answer: Answer, size: int) -> PromptPool:
    """The pool with the paraphrases of `answer`, one at a time, for it must not grow beyond `size` prompts."""
    for text in answer.texts:
        if len(pool.prompts) >= size:
            break
        pool = pool.extended([PoolPrompt(text, answer.source)])
    return pool


def resumed_from(pool: PromptPool, store: Path, size: int = MAX_PROMPTS) -> PromptPool:
    """`pool` with what an earlier run left in `store`, up to `size` prompts.

    The store's prompts pass the pool's rules like any other.
    """
    if not store.exists():
        folder = store.resolve().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            # Found out before the first question: answers that cannot be saved would be lost.
            raise DataError(f"{store}: wanted a file in a folder that can be written to, got none")
        return pool
    saved = PromptPool.read(store)
    for name, wanted, got in (
        ("task", pool.task, saved.task),
        ("original prompt", pool.prompts[0], saved.prompts[0]),
    ):
        if wanted != got:
            raise DataError(f"{store}: wanted a pool of the {name} {excerpt(wanted)}, got {excerpt(got)}")
    for prompt in zip(saved.prompts[1:], saved.provenance[1:], strict=True):
        if len(pool.prompts) >= size:
            break
        # A prompt that both have is no repetition to tell of.
        if prompt[0] not in pool.prompts:
            pool = pool.extended([PoolPrompt(*prompt)])
    return pool.with_history(saved)
