"""Paraphrases from any OpenAI-compatible endpoint."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress

from sapo_kernels.files import DataError, excerpt

from ._http import Caller, Outcome
from .answers import AnswerFault, Request, parse_answer
from .redact import LogGuard, Secret
from .retry import Backoff
from .source import Answer, Deadline, SourceError

_log = logging.getLogger(__name__)
KEY_VARIABLE = "OPENAI_API_KEY"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# How often the main thread looks whether a request has passed its time, seconds.
_TICK = 0.1
_MAX_CONCURRENCY = 64
# How long answers under way are waited for when the endpoint turns out to be of no use, seconds.
_PATIENCE = 5.0


class EndpointSource:
    """Asks `model` at `base_url` (such as ``https://host/v1``), a few questions at a time.

    key_variable: the NAME of the environment variable with the key; without a value in it the endpoint is asked
    without a key, as local servers are. concurrency: requests at a time. per_call: paraphrases per request.
    request_seconds: longest time for one request, from connecting to the last byte; never beyond the deadline.
    max_tries: failures of one question before it is given up (one that took all its time counts for three).
    wait: called with the seconds to wait between tries (default: a wait that ends when the work is stopped).

    Connection errors, broken replies and the statuses 408, 409, 429 and 5xx are tried again after
    `backoff`, or after what Retry-After says; if that is beyond the deadline, nothing more is asked. Any other
    status ends the source at once. The key goes into the Authorization header and nowhere else: not into logs,
    errors or files, also not when the server sends it back.

    Raises: `ImportError` naming the extra if the `openai` client is missing; `ValueError` for bad arguments.
    """

    finite = False

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str = KEY_VARIABLE,
        concurrency: int = 4,
        per_call: int = 5,
        request_seconds: float = 58.0,
        max_tries: int = 6,
        backoff: Backoff | None = None,
        wait: Callable[[float], None] | None = None,
    ):
        try:
            from openai import DefaultHttpxClient  # noqa: F401  (the newest name used; clients before 1.30 lack it)
        except ImportError:
            raise ImportError(
                "paraphrases from an endpoint need the openai client, 1.30 or newer: "
                "pip install 'sapo-kernels[paraphrase]'"
            ) from None
        for name, value, most in (
            ("concurrency", concurrency, _MAX_CONCURRENCY),
            ("per_call", per_call, 50),
            ("max_tries", max_tries, 100),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name}: wanted a whole number from 1 to {most}, got {value!r}")
        if not 0 < request_seconds < 1e6:
            raise ValueError(f"request_seconds: wanted a number above 0, got {request_seconds!r}")
        if not model.strip() or not model.isprintable() or len(model) > 200:
            raise ValueError(f"model: wanted a name of 1 to 200 characters, got {excerpt(model)}")
        host = _check_url(base_url)
        self._secret = _key(key_variable)
        if self._secret is not None:
            if self._secret.shown_in(model) or self._secret.shown_in(base_url):
                raise ValueError(f"model or base_url: wanted them without the key in {key_variable}, got it in there")
            if base_url.lower().startswith("http:") and host not in _LOOPBACK:
                _log.warning("the key in %s is sent unencrypted to %s", key_variable, host)
        self.base_url, self.model, self.name = base_url, model, f"endpoint:{model}"
        self.concurrency, self.per_call = concurrency, per_call
        self.request_seconds, self.max_tries = float(request_seconds), max_tries
        self.backoff, self.wait = backoff or Backoff(), wait

    def __repr__(self) -> str:
        return f"EndpointSource({self.base_url!r}, {self.model!r})"

    def caller(self) -> Caller:
        """A connection of its own to the endpoint, for one thread."""
        return Caller(self.base_url, self.model, self._secret)

    def paraphrase(self, request: Request, deadline: Deadline) -> Iterator[Answer]:
        """Ask ``ceil(request.wanted / per_call)`` questions and yield the answers as they arrive.

        Raises: `SourceError` if the endpoint refuses, or does not answer after all tries.
        """
        with nullcontext() if self._secret is None else LogGuard(self._secret):
            yield from _Round(self, request, deadline).answers()


class _Round:
    """The questions of one call, the threads that ask them, and the watch on the clock."""

    def __init__(self, source: EndpointSource, request: Request, deadline: Deadline):
        self.source, self.request, self.deadline = source, request, deadline
        full, rest = divmod(request.wanted, source.per_call)
        self.questions = deque([source.per_call] * full + [rest] * (rest > 0))
        self.results: queue.SimpleQueue[Answer | SourceError] = queue.SimpleQueue()
        self.ending = threading.Event()  # no new requests from here on
        self.successes = 0  # of all threads; only ever compared with an earlier value

    def answers(self) -> Iterator[Answer]:
        left, error, patience = len(self.questions), None, float("inf")
        workers = [_Worker(self) for _ in range(min(self.source.concurrency, left))]
        for worker in workers:
            worker.start()
        try:
            while left:
                over = self.deadline.over or time.monotonic() > patience
                try:
                    # At the end what has arrived is still taken, without waiting.
                    result = self.results.get(not over, max(0.001, min(_TICK, self.deadline.left)))
                except queue.Empty:
                    if over:
                        break
                    for worker in workers:
                        worker.caller.cut_if_late()
                    continue
                left -= 1
                if isinstance(result, SourceError):
                    # Questions that are under way are paid for: their answers are waited for, a little.
                    error, patience = error or result, min(patience, time.monotonic() + _PATIENCE)
                    self.ending.set()
                    with suppress(IndexError):
                        while True:
                            self.questions.popleft()
                            left -= 1
                elif result.texts or error is None:
                    yield result
            if error is not None:
                raise error
        finally:
            self.ending.set()
            for worker in workers:
                worker.caller.cut()
            # They end by themselves; a name that is looked up cannot be interrupted and is not waited for.
            patience = time.monotonic() + 0.3
            for worker in workers:
                worker.join(max(0.0, patience - time.monotonic()))


class _Worker(threading.Thread):
    def __init__(self, run: _Round):
        # A daemon: a thread that hangs in a system call must not keep the program from ending.
        super().__init__(name="sapo-paraphrase", daemon=True)
        self.round, self.caller = run, run.source.caller()

    def run(self) -> None:
        try:
            while not self.round.ending.is_set():
                try:
                    wanted = self.round.questions.popleft()
                except IndexError:
                    return
                result = self._ask(wanted)
                if isinstance(result, SourceError):
                    self.round.ending.set()
                self.round.results.put(result)
        except Exception as error:
            # Whatever it is, the main thread must hear of it; the text may hold anything, so only the type is told.
            self.round.results.put(SourceError(f"{self.round.source.name}: failed with {type(error).__name__}"))
        finally:
            self.caller.close()

    def _ask(self, wanted: int) -> Answer | SourceError:
        """The answer to one question, after as many tries as it takes; never an exception of the client."""
        source, run = self.round.source, self.round
        message = run.request.message(wanted)
        successes, failures = run.successes, 0
        while True:
            seconds = min(source.request_seconds, run.deadline.left)
            if seconds <= 0 or run.ending.is_set():
                return Answer((), source.name, "it was ended before it was answered")
            outcome = self.caller.ask(message, seconds)
            if outcome.fault is None:
                run.successes += 1
                return self._read(outcome)
            if run.ending.is_set():
                return Answer((), source.name, outcome.fault)
            if not outcome.again:
                return SourceError(f"{source.base_url}: {outcome.fault}")
            patient = outcome.after is not None and outcome.after >= 1.0
            # A server that says when to come back is there; it is asked until the deadline.
            # One that takes all its time gets a second chance and no more: an outage is known within two minutes.
            failures += 0 if patient else 3 if outcome.late else 1
            if failures >= source.max_tries:
                if run.successes == successes:
                    return SourceError(
                        f"{source.base_url}: no answer after {failures} failures, the last: {outcome.fault}"
                    )
                return Answer((), source.name, outcome.fault)
            delay = source.backoff.wait(1 if patient else failures) + (outcome.after or 0.0)
            if delay >= run.deadline.left:
                if patient:
                    told = f"it asks to wait {outcome.after:.6g} s and {run.deadline.left:.3g} s are left"
                    return SourceError(f"{source.base_url}: {outcome.fault}; {told}")
                return Answer((), source.name, outcome.fault)
            _log.info("%s: %s; asking again in %.1f s", source.name, outcome.fault, delay)
            (source.wait or run.ending.wait)(delay)

    def _read(self, outcome: Outcome) -> Answer:
        name = self.round.source.name
        try:
            texts, fault = parse_answer(outcome.text, self.round.request.tag, cut=outcome.cut)
        except AnswerFault as error:
            return Answer((), name, self.caller.hidden(str(error)))
        return Answer(tuple(texts), name, fault)


def _key(variable: str) -> Secret | None:
    if not variable.isidentifier():
        # Not shown: somebody may have given the key instead of the variable's name.
        raise ValueError("key_variable: wanted the name of an environment variable, got something else")
    value = os.environ.get(variable, "")
    if value and (not value.isascii() or not value.isprintable() or " " in value):
        raise DataError(f"{variable}: wanted a key of printable ASCII characters without spaces, got others in it")
    return Secret(value) if value else None


def _check_url(url: str) -> str:
    """The host in `url`. What may hold a password is not shown in messages."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("base_url: wanted http://HOST[:PORT]/PATH or https://..., got no valid URL") from None
    if "@" in url or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise ValueError("base_url: wanted http(s)://HOST[:PORT]/PATH and nothing else, got a user, query or fragment")
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"base_url: wanted http(s)://HOST[:PORT]/PATH, got {excerpt(url)}")
    return host
