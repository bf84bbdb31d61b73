"""Paraphrases from any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from sapo_kernels.files import DataError, excerpt

from .answers import AnswerFault, Request
from .reply import Reply, completion, refused
from .source import Answer, Deadline, SourceError

_log = logging.getLogger(__name__)
KEY_VARIABLE = "OPENAI_API_KEY"
MAX_REPLY_BYTES = 2**20
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LONGEST_BACKOFF = 20.0
# How long answers under way are waited for when the endpoint turns out to be of no use, seconds.
_LAST_ANSWERS = 5.0
# What asking again costs of `max_tries`: an outage that hangs is known after two requests. Waiting costs nothing.
_COSTS = {"failure": 1, "late": 3, "limited": 0}
# Pieces of a key of this length give it away; what is shorter is no key (``none``).
_PIECE = 8


class _Unread(Exception):
    """A reply that is not read; the message says why."""


@dataclass
class EndpointSource:
    """Asks `model` at `base_url` (such as ``https://host/v1``), a few questions at a time.

    key_variable: the NAME of the environment variable with the key; without a value in it the endpoint is asked
    without a key, as local servers are. concurrency: requests at a time. per_call: paraphrases per request.
    request_seconds: longest time for one request, from connecting to the last byte; never beyond the deadline.
    max_tries: failures of one question before the endpoint is given up (one that took all its time counts for
    three). backoff: seconds before the second try; they double, up to 20. usage: tokens and cost of all answers.

    Connection errors, broken replies and the statuses 408, 409 and 5xx are tried again `max_tries` times; a rate
    limit (429) until the deadline, each time after what the endpoint asks for in a header or in words. Any other
    status ends the source at once. The key goes into the Authorization header and nowhere else: not into logs,
    errors or files, also not when the server sends it back.

    Raises: `ImportError` naming the extra if a library is missing; `ValueError` for bad arguments.
    """

    base_url: str
    model: str
    key_variable: str = KEY_VARIABLE
    concurrency: int = 4
    per_call: int = 5
    request_seconds: float = 58.0
    max_tries: int = 6
    backoff: float = 0.5
    usage: Counter[str] = field(default_factory=Counter, init=False)
    finite = False

    def __post_init__(self):
        try:
            import openai  # noqa: F401
            import tenacity  # noqa: F401
        except ImportError as error:
            raise ImportError(f"an endpoint needs {error.name}: pip install 'sapo-kernels[paraphrase]'") from None
        for name, most in (("concurrency", 64), ("per_call", 50), ("max_tries", 100)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name}: expected a whole number from 1 to {most}, got {value!r}")
        for name in ("request_seconds", "backoff"):
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(f"{name}: expected a number of seconds above 0, got {getattr(self, name)!r}")
        if not self.model.strip() or not self.model.isprintable() or len(self.model) > 200:
            raise ValueError(f"model: expected a name of 1 to 200 characters, got {excerpt(self.model)}")
        if not self.key_variable.isidentifier():
            # Not shown: somebody may have given the key instead of the variable's name.
            raise ValueError("key_variable: expected the name of an environment variable, got something else")
        self._answered = 0
        self.name, self._host, key = f"endpoint:{self.model}", _host(self.base_url), self._key()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise DataError(f"{self.key_variable}: expected a key of printable ASCII without spaces, got another text")
        if self._shows_key(f"{self.model} {self.base_url}"):
            raise ValueError(f"model or base_url: expected them without the key in {self.key_variable}, got it there")
        if key and self.base_url.lower().startswith("http:") and self._host not in _LOOPBACK:
            _log.warning("the key in %s is sent unencrypted to %s", self.key_variable, self._host)

    @property
    def spent(self) -> str:
        """The tokens, and the cost where the endpoint tells it, of all answers so far; "" if it counts none."""
        if not self.usage:
            return ""
        cost = f", cost {self.usage['cost']:.6g}" if self.usage["cost"] else ""
        return f"{self.usage['prompt_tokens']:,.0f} tokens in, {self.usage['completion_tokens']:,.0f} out{cost}"

    def paraphrase(self, request: Request, deadline: Deadline) -> Iterator[Answer]:
        """Ask ``ceil(request.wanted / per_call)`` questions and yield the answers as they arrive.

        Raises: `SourceError` if the endpoint refuses, or does not answer after all tries.
        """
        full, rest = divmod(request.wanted, self.per_call)
        counts = [self.per_call] * full + [rest] * (rest > 0)
        results: queue.SimpleQueue[Answer | SourceError] = queue.SimpleQueue()
        error = None
        # A little later than the requests' own end, so that these can say what they waited for.
        end = time.monotonic() + deadline.left + 0.3
        with _quiet_client(), _in_background(self._ask_all(request, counts, deadline, results.put)):
            for _ in counts:
                try:
                    result = results.get(timeout=max(0.0, end - time.monotonic()))
                except queue.Empty:
                    break
                if isinstance(result, SourceError):
                    # Questions that are under way are paid for: their answers are waited for, a little.
                    error, end = error or result, min(end, time.monotonic() + _LAST_ANSWERS)
                elif result.texts or error is None:
                    yield result
        if error is not None:
            raise error

    async def _ask_all(self, request, counts, deadline, put) -> None:
        import openai

        gate, over = asyncio.Semaphore(self.concurrency), asyncio.Event()

        async def ask(count: int) -> None:
            result: Answer | SourceError = Answer((), self.name)
            async with gate:
                try:
                    if not over.is_set():
                        result = await self._ask(client, request, count, deadline)
                except Exception as error:
                    # Whatever it is must be heard of; its text may hold anything, so only the type is told.
                    result = SourceError(f"{self.name}: failed with {type(error).__name__}")
                if isinstance(result, SourceError):
                    over.set()  # no new questions from here on
            put(result)

        # A reply that points elsewhere would have the texts sent to a host nobody named.
        http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [_bound]}, follow_redirects=False)
        # Local servers without keys take any; an empty one is refused by the client.
        key = self._key() or "none"
        async with openai.AsyncOpenAI(api_key=key, base_url=self.base_url, max_retries=0, http_client=http) as client:
            await asyncio.gather(*map(ask, counts))

    async def _ask(self, client: Any, request: Request, count: int, deadline: Deadline) -> Answer | SourceError:
        """The answer to one question, after as many tries as it takes; never an exception of the client."""
        from tenacity import AsyncRetrying, retry_if_result, wait_exponential, wait_random

        jitter = wait_random(0, self.backoff)
        growing = wait_exponential(self.backoff, _LONGEST_BACKOFF) + jitter
        replies: list[Reply] = []
        answered, texts = self._answered, []

        async def send() -> Reply:
            replies.append(await self._send(client, request.message(count), deadline))
            return replies[-1]

        def wait(state) -> float:
            if replies[-1].after is not None:
                return replies[-1].after + jitter(state)
            # Up to the deadline, and not past it by a last wait that is too long.
            return min(growing(state), deadline.left / 2) if replies[-1].kind == "limited" else growing(state)

        def stop(state) -> bool:
            failures = sum(_COSTS[reply.kind] for reply in replies)
            return failures >= self.max_tries or state.upcoming_sleep >= deadline.left or deadline.left < 0.1

        def log(state) -> None:
            _log.info("%s: %s; asking again in %.1f s", self.name, replies[-1].fault, state.upcoming_sleep)

        again = retry_if_result(lambda reply: reply.kind in _COSTS)
        reply = await AsyncRetrying(
            retry=again, wait=wait, stop=stop, before_sleep=log, retry_error_callback=lambda _: replies[-1]
        )(send)
        fault = reply.fault
        if reply.kind in _COSTS:
            left = f"; {deadline.left:.3g} of {deadline.seconds:g} s are left"
            left = f"; it asks to wait {reply.after:.6g} s{left}" if reply.after is not None else left
            fault = f"no answer after asking {len(replies)} times, the last: {fault}{left}"
            if reply.kind != "limited" and self._answered > answered:
                return Answer((), self.name, fault)  # others are answered: the endpoint is there
        if reply.kind != "answer":
            return SourceError(f"{self.base_url}: {fault}{self._proxy()}")
        if fault is None:
            try:
                texts, fault = request.read(reply.text, cut=reply.cut)
            except AnswerFault as error:
                fault = str(error)
        return Answer(tuple(texts), self.name, fault)

    async def _send(self, client: Any, message: str, deadline: Deadline) -> Reply:
        """One request: never an exception of the client, for these hold the request and with it the key."""
        import openai

        seconds = max(0.01, min(self.request_seconds, deadline.left))
        try:
            # The client's own timeouts hold for each read: a server that sends a byte now and then is never late.
            async with asyncio.timeout(seconds):
                document = await client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": message}],
                    timeout=seconds,
                    # A compressed reply could unpack to any size.
                    extra_headers={"Accept-Encoding": "identity"},
                )
            reply = completion(document)
            self._answered += reply.fault is None
            for name in ("prompt_tokens", "completion_tokens", "cost"):
                amount = getattr(getattr(document, "usage", None), name, None)
                if type(amount) in (int, float) and 0 <= amount < 1e12:
                    self.usage[name] += amount
        except openai.APIStatusError as error:
            body = error.response.content[:10_000].decode("utf-8", "replace")
            reply = refused(error.status_code, error.body, error.response.headers, body, deadline.left)
        except (TimeoutError, openai.APITimeoutError):
            reply = Reply(fault=f"no whole reply within {seconds:.3g} s", kind="late")
        except Exception as error:
            reply = Reply(fault=_reason(error), kind="failure")
        if self._shows_key(reply.text) or self._shows_key(reply.fault or ""):
            return Reply(fault="the reply holds the key and was not used", kind=reply.kind, after=reply.after)
        return reply

    def _key(self) -> str:
        """Read anew each time: what is held nowhere is shown nowhere."""
        return os.environ.get(self.key_variable, "")

    def _shows_key(self, text: str) -> bool:
        key, text = self._key().casefold(), text.casefold()
        return any(key[place : place + _PIECE] in text for place in range(len(key) - _PIECE + 1))

    def _proxy(self) -> str:
        """What to know of a proxy in front of this machine's own server, which it hardly reaches."""
        proxies, scheme = urllib.request.getproxies(), self.base_url.partition(":")[0].lower()
        name = scheme if scheme in proxies else "all"
        if self._host not in _LOOPBACK or name not in proxies or urllib.request.proxy_bypass(self._host):
            return ""
        return f"; {name.upper()}_PROXY puts a proxy in front of {self._host}: set NO_PROXY={self._host}"


@contextmanager
def _in_background(work: Any) -> Iterator[None]:
    """Runs the coroutine `work` on a thread of its own (a notebook's has a loop already) and cancels it at the end."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    # A daemon: a name that is looked up cannot be interrupted, and is not waited for.
    thread = threading.Thread(target=run, name="sapo-paraphrase", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(task.cancel)
        thread.join(0.5)


@contextmanager
def _quiet_client() -> Iterator[None]:
    """The logs of the client and its HTTP library are off: they show headers, and a server may quote the key there."""
    loggers = [logging.getLogger(name) for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


async def _bound(response: Any) -> None:
    """Stop reading a reply at `MAX_REPLY_BYTES`: the client reads one of any size."""
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise _Unread("expected a reply that is not compressed, got a compressed one")
    inner = response.stream

    async def chunks(_):
        size = 0
        async for chunk in inner:
            size += len(chunk)
            if size > MAX_REPLY_BYTES:
                raise _Unread(f"expected a reply of at most {MAX_REPLY_BYTES} bytes, got more")
            yield chunk

    async def close(_):
        await inner.aclose()

    # Of the class that the HTTP library checks for, whichever library the client has.
    response.stream = type("Bounded", type(inner).__bases__, {"__aiter__": chunks, "aclose": close})()


def _host(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or set(url) & set("@?# ") or not url.isprintable():
        # Not shown: it may hold a password.
        raise ValueError("base_url: expected http(s)://HOST[:PORT]/PATH without user, query or fragment, got another")
    return host


def _reason(error: BaseException) -> str:
    """Why there is no reply, without the texts of others: the kind of error, and the system's word for it."""
    chain = [error]
    while len(chain) < 9 and (cause := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(cause)
    if unread := next((error for error in chain if isinstance(error, _Unread)), None):
        return str(unread)
    word = next((os.strerror(error.errno) for error in chain if getattr(error, "errno", None)), None)
    kind = type(error.__cause__ or error).__name__
    return f"the connection or the reply is broken ({kind}{f': {word}' if word else ''})"
