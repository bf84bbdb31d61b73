"""Paraphrases from any OpenAI-compatible endpoint: `openai` asks, `tenacity` asks again."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from sapo_kernels.files import DataError, excerpt

from .answers import AnswerFault, Request
from .source import Answer, Deadline, SourceError

_log = logging.getLogger(__name__)
KEY_VARIABLE = "OPENAI_API_KEY"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LONGEST_BACKOFF = 20.0
# How long answers under way are waited for when the endpoint turns out to be of no use, seconds.
_LAST_ANSWERS = 5.0
# Pieces of a key of this length give it away; what is shorter is no key (``none``).
_PIECE = 8


class _Again(Exception):
    """It may be well next time. cost: of `max_tries`; after: seconds that the endpoint asks to wait."""

    def __init__(self, fault: str, cost: int = 1, after: float | None = None):
        super().__init__(fault)
        self.cost, self.after = cost, after


class _Refused(Exception):
    """It would say the same again."""


@dataclass
class EndpointSource:
    """Asks `model` at `base_url` (such as ``https://host/v1``), a few questions at a time.

    key_variable: the NAME of the environment variable with the key; without a value in it the endpoint is asked
    without a key, as local servers are. concurrency: requests at a time. per_call: paraphrases per request.
    request_seconds: longest time for one request, from connecting to the last byte; never beyond the deadline.
    max_tries: failures of one question before the endpoint is given up (one that took all its time counts for
    three). backoff: seconds before the second try; they double, up to 20. usage: tokens and cost of all answers.

    Connection errors, broken replies and the statuses 408, 409 and 5xx are tried again `max_tries` times; a rate
    limit (429) until the deadline, each time after what the endpoint asks for (``Retry-After``). Any other status ends
    the source at once. The key goes into the Authorization header and nowhere else: not into logs,
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
        http = openai.DefaultAsyncHttpxClient(follow_redirects=False)
        # Local servers without keys take any; an empty one is refused by the client.
        key = self._key() or "none"
        async with openai.AsyncOpenAI(api_key=key, base_url=self.base_url, max_retries=0, http_client=http) as client:
            await asyncio.gather(*map(ask, counts))

    async def _ask(self, client: Any, request: Request, count: int, deadline: Deadline) -> Answer | SourceError:
        """The answer to one question, after as many tries as it takes.

        What is wrong is returned, not raised: the client's errors hold the request and with it the key.
        """
        from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential, wait_random

        jitter = wait_random(0, self.backoff)
        growing = wait_exponential(self.backoff, _LONGEST_BACKOFF) + jitter
        faults: list[_Again] = []
        answered = self._answered

        async def send() -> tuple[str, bool]:
            try:
                return await self._send(client, request.message(count), deadline)
            except _Again as error:
                faults.append(error)
                raise

        def wait(state) -> float:
            if faults[-1].after is not None:
                return faults[-1].after + jitter(state)
            # A limit: up to the deadline, and not past it by a last wait that is too long.
            return growing(state) if faults[-1].cost else min(growing(state), deadline.left / 2)

        def stop(state) -> bool:
            spent = sum(error.cost for error in faults)
            return spent >= self.max_tries or state.upcoming_sleep >= deadline.left or deadline.left < 0.1

        def log(state) -> None:
            _log.info("%s: %s; asking again in %.1f s", self.name, faults[-1], state.upcoming_sleep)

        again = retry_if_exception_type(_Again)
        try:
            text, cut = await AsyncRetrying(retry=again, wait=wait, stop=stop, before_sleep=log, reraise=True)(send)
            texts, fault = request.read(text, cut=cut)
        except AnswerFault as error:
            texts, fault = [], str(error)
        except _Refused as error:
            return SourceError(f"{self.base_url}: {error}")
        except _Again as error:
            asks = f"; it asks to wait {error.after:.6g} s" if error.after is not None else ""
            left = f"{deadline.left:.3g} of {deadline.seconds:g} s are left"
            fault = f"no answer after asking {len(faults)} times, the last: {error}{asks}; {left}"
            if not error.cost or self._answered == answered:
                return SourceError(f"{self.base_url}: {fault}")
            texts = []  # others are answered: the endpoint is there
        return Answer(tuple(texts), self.name, fault)

    async def _send(self, client: Any, message: str, deadline: Deadline) -> tuple[str, bool]:
        """(text, whether the model was stopped) of one request."""
        import openai

        seconds = max(0.01, min(self.request_seconds, deadline.left))
        try:
            # The client's own timeouts hold for each read: a server that sends a byte now and then is never late.
            async with asyncio.timeout(seconds):
                document = await client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": message}], timeout=seconds
                )
        except openai.APIStatusError as error:
            raise self._of_status(error.status_code, error.response.headers, error.body) from None
        except (TimeoutError, openai.APITimeoutError):
            # An outage that hangs is known after two requests.
            raise _Again(f"no whole reply within {seconds:.3g} s", cost=-(-self.max_tries // 2)) from None
        except Exception as error:
            kind = type(error.__cause__ or error).__name__
            raise _Again(f"the connection or the reply is broken ({kind})") from None
        return self._text(document)

    def _of_status(self, status: int, headers: Mapping[str, str], body: Any) -> _Again | _Refused:
        words = body.get("message") if isinstance(body, dict) else body
        words = " ".join(words.split()) if isinstance(words, str) and not words.startswith("<") else ""
        fault = f"status {status}"
        if status in (401, 403, 407):
            # Replies to a wrong key are known to quote it, also in part or changed.
            fault += " (is the key right, and may it use this model?)"
        elif words:
            fault = self._without_key(f"{fault}, {excerpt(words, 200)}")
        no_money = isinstance(body, dict) and body.get("code") == "insufficient_quota"
        if no_money or not (status in (408, 409, 429) or status >= 500):
            return _Refused(fault)
        return _Again(fault, cost=int(status != 429), after=_retry_after(headers))

    def _text(self, document: Any) -> tuple[str, bool]:
        """What a chat completion, or whatever else the client made of a reply with status 200, says."""
        try:
            choice = document.choices[0]
            reason, content = str(choice.finish_reason or "").lower(), choice.message.content
        except (AttributeError, IndexError, TypeError):
            # Gateways put an error into a reply with status 200; a wrong address gives a page.
            got = getattr(document, "error", None) or (document if isinstance(document, str) else "another document")
            fault = f"expected a chat completion, got {excerpt(got)} (is this the address of an API?)"
            raise _Again(self._without_key(fault)) from None
        self._answered += 1
        for name in ("prompt_tokens", "completion_tokens", "cost"):
            amount = getattr(getattr(document, "usage", None), name, None)
            if type(amount) in (int, float) and 0 <= amount < 1e12:
                self.usage[name] += amount
        if reason in ("content_filter", "tool_calls", "function_call", "error"):
            raise AnswerFault(f"expected an answer that ended by itself, got the finish reason {reason!r}")
        if isinstance(content, list):  # parts; thoughts are of another type
            parts = [part for part in content if isinstance(part, dict) and "think" not in str(part.get("type"))]
            content = "".join(text for part in parts if isinstance(text := part.get("text"), str))
        if not isinstance(content, str) or not content.strip():
            raise AnswerFault("expected a reply with text, got none")
        if self._shows_key(content):
            raise AnswerFault("the reply holds the key and was not used")
        return content, reason in ("length", "max_tokens")

    def _key(self) -> str:
        """Read anew each time: what is held nowhere is shown nowhere."""
        return os.environ.get(self.key_variable, "")

    def _shows_key(self, text: str) -> bool:
        key, text = self._key().casefold(), text.casefold()
        return any(key[place : place + _PIECE] in text for place in range(len(key) - _PIECE + 1))

    def _without_key(self, fault: str) -> str:
        return "the reply holds the key and was not used" if self._shows_key(fault) else fault


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: ``Retry-After-Ms``, or ``Retry-After`` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            seconds = float(text) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError, IndexError):
                continue
        if seconds > 0:
            return seconds
    return None


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
