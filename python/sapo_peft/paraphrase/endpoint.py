"""Paraphrases from any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import urllib.parse
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sapo_kernels.files import DataError, excerpt

from ..terminal import plain
from .answers import AnswerFault, Request
from .source import Answer, Deadline, SourceError

_log = logging.getLogger(__name__)
KEY_VARIABLE = "OPENAI_API_KEY"
MAX_REPLY_BYTES = 2**20
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LONGEST_BACKOFF = 20.0
# What asking again costs of `max_tries`: an outage that hangs is known after two requests, waiting costs nothing.
_FAILURE, _LATE, _LIMITED = 1, 3, 0
# Pieces of a key of this length give it away; what is shorter is no key (``none``).
_PIECE = 8


class _Failed(Exception):
    """A request without an answer. cost: see above, None: it would fail again; after: seconds that it asks to wait."""

    def __init__(self, fault: str, cost: int | None = _FAILURE, after: float | None = None):
        super().__init__(fault)
        self.cost, self.after = cost, after


class _Unread(Exception):
    """A reply that is not read to its end; the text says why."""


@dataclass
class EndpointSource:
    """Asks `model` at `base_url` (such as ``https://host/v1``), one question after the other.

    key_variable: the NAME of the environment variable with the key; without a value in it the endpoint is asked
    without a key, as local servers are. per_call: paraphrases per request.
    request_seconds: longest time for one request, from connecting to the last byte; never beyond the deadline.
    max_tries: failures of one question before the endpoint is given up (one that took all its time counts for
    three). backoff: seconds before the second try; they double, up to 20. usage: tokens and cost of all answers.

    Connection errors, broken replies and the statuses 408, 409 and 5xx are tried again `max_tries` times; a rate
    limit (429) until the deadline, each time after what the header ``Retry-After`` asks for. Any other status ends
    the source at once. The key goes into the Authorization header and nowhere else: not into errors or files, also
    not when the server sends it back. A server on this machine is asked without a proxy.

    Raises: `ImportError` if openai or tenacity is missing (extra ``paraphrase``); `ValueError` for bad arguments.
    """

    base_url: str
    model: str
    key_variable: str = KEY_VARIABLE
    per_call: int = 5
    request_seconds: float = 58.0
    max_tries: int = 6
    backoff: float = 0.5
    usage: Counter[str] = field(default_factory=Counter, init=False)
    finite = False

    def __post_init__(self):
        import openai  # noqa: F401
        import tenacity  # noqa: F401

        for name in ("per_call", "max_tries", "request_seconds", "backoff"):
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")
        if not self.model.strip():
            raise ValueError("model: expected a name, got an empty one")
        if not self.key_variable.isidentifier():
            # Not shown: somebody may have given the key instead of the variable's name.
            raise ValueError("key_variable: expected the name of an environment variable, got something else")
        self.name, self._host, key = f"endpoint:{plain(self.model)}", _host(self.base_url), self._key()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise DataError(f"{self.key_variable}: expected a key of printable ASCII without spaces, got another text")
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
        """Ask ``ceil(request.wanted / per_call)`` questions, one after the other, and yield the answers.

        Raises: `SourceError` if the endpoint refuses, or does not answer after all tries.
        """
        full, rest = divmod(request.wanted, self.per_call)
        for count in [self.per_call] * full + [rest] * (rest > 0):
            try:
                # A little later than the question's own end, so that it can say what it waited for.
                answer = _on_a_thread(self._ask(request, count, deadline), deadline.left + 0.3)
            except TimeoutError:
                return
            yield answer

    async def _ask(self, request: Request, count: int, deadline: Deadline) -> Answer:
        """The answer to one question, after as many tries as it takes; `SourceError` if asking is of no use."""
        import openai
        import tenacity

        growing = tenacity.wait_exponential(self.backoff, _LONGEST_BACKOFF) + tenacity.wait_random(0, self.backoff)
        failures = []

        def wait(state: Any) -> float:
            failures.append(state.outcome.exception())
            # Up to the deadline, and not past it by a last wait that is too long.
            return min(growing(state), deadline.left / 2) if failures[-1].after is None else failures[-1].after

        def stop(state: Any) -> bool:
            over = state.upcoming_sleep >= deadline.left or deadline.left < 0.1
            return over or sum(failure.cost for failure in failures) >= self.max_tries

        def log(state: Any) -> None:
            _log.info("%s: %s; asking again in %.1f s", self.name, failures[-1], state.upcoming_sleep)

        again = tenacity.retry_if_exception(lambda error: getattr(error, "cost", None) is not None)
        retrying = tenacity.AsyncRetrying(retry=again, wait=wait, stop=stop, before_sleep=log, reraise=True)
        # A reply that points elsewhere would have the texts sent to a host nobody named.
        http = openai.DefaultAsyncHttpxClient(
            follow_redirects=False, trust_env=self._host not in _LOOPBACK, event_hooks={"response": [_bound]},
            # A compressed reply could unpack to any size.
            headers={"Accept-Encoding": "identity"},
        )  # fmt: skip
        # Local servers without keys take any; an empty one is refused by the client. In no variable: errors show those.
        made = openai.AsyncOpenAI(
            api_key=self._key() or "none", base_url=self.base_url, max_retries=0, http_client=http
        )  # fmt: skip
        try:
            async with made as client:
                texts, fault = request.read(await retrying(self._send, client, request.message(count), deadline))
        except AnswerFault as error:
            texts, fault = (), str(error)
        except _Failed as failed:
            fault = str(failed)
            if failed.cost is not None:
                asked = f"; it asks to wait {failed.after:.6g} s" if failed.after is not None else ""
                left = f"{deadline.left:.3g} of {deadline.seconds:g} s are left"
                fault = f"no answer after asking {len(failures)} times, the last: {fault}{asked}; {left}"
            raise SourceError(f"{self.base_url}: {fault}") from None
        except Exception as error:
            # The text of any other error may hold anything, so only its type is told.
            raise SourceError(f"{self.name}: failed with {type(error).__name__}") from None
        return Answer(tuple(texts), self.name, fault)

    async def _send(self, client: Any, message: str, deadline: Deadline) -> str:
        """The text of one reply. Raises no exception of the client, for these hold the request and with it the key."""
        import openai

        seconds = max(0.01, min(self.request_seconds, deadline.left))
        reply, failed = None, None
        try:
            # The client's own timeouts hold for each read: a server that sends a byte now and then is never late.
            async with asyncio.timeout(seconds):
                turn = {"role": "user", "content": message}
                reply = await client.chat.completions.create(model=self.model, messages=[turn], timeout=seconds)
            text = _text(reply)
        except openai.APIStatusError as error:
            failed = _refused(error.status_code, error.body, error.response.headers)
        except (TimeoutError, openai.APITimeoutError):
            failed = _Failed(f"no whole reply within {seconds:.3g} s", _LATE)
        except (_Failed, AnswerFault) as error:
            failed = error
        except Exception as error:
            failed = _Failed(_reason(error))
        for name in ("prompt_tokens", "completion_tokens", "cost"):
            amount = getattr(getattr(reply, "usage", None), name, None)
            if type(amount) in (int, float) and 0 <= amount < 1e12:
                self.usage[name] += amount
        if self._shows_key(text if failed is None else str(failed)):
            told = "the reply holds the key and was not used"
            failed = _Failed(told, failed.cost, failed.after) if isinstance(failed, _Failed) else AnswerFault(told)
        if failed is not None:
            raise failed from None
        return text

    def _key(self) -> str:
        """Read anew each time: what is held nowhere is shown nowhere."""
        return os.environ.get(self.key_variable, "")

    def _shows_key(self, text: str) -> bool:
        key, text = self._key().casefold(), text.casefold()
        return any(key[place : place + _PIECE] in text for place in range(len(key) - _PIECE + 1))


def _on_a_thread(work: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """What the coroutine `work` returns, on a thread of its own (a notebook's has a loop already).

    It is cancelled when this ends. Raises: `TimeoutError` if it takes longer than `seconds`, and what it raises.
    """
    loop, found = asyncio.new_event_loop(), Future()
    task = loop.create_task(work)

    def run() -> None:
        try:
            found.set_result(loop.run_until_complete(task))
        except BaseException as error:  # a cancellation too
            found.set_exception(error)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    # A daemon: a name that is looked up cannot be interrupted, and is not waited for.
    threading.Thread(target=run, name="sapo-paraphrase", daemon=True).start()
    try:
        return found.result(seconds)
    finally:
        with suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(task.cancel)


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


def _text(reply: Any) -> str:
    """The text of a chat completion."""
    try:
        text = reply.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        # Gateways put an error into a reply with status 200.
        got = excerpt(getattr(reply, "error", None) or reply)
        raise _Failed(f"expected a chat completion, got {got} (is this the address of an API?)") from None
    if isinstance(text, list):  # parts; thoughts are of another type
        text = "".join(part["text"] for part in text if part.get("type") == "text")
    if not isinstance(text, str) or not text.strip():
        raise AnswerFault("expected a reply with text, got none")
    return text


def _refused(status: int, error: Any, headers: Mapping[str, str]) -> _Failed:
    """A reply with an error `status`; `error`: what its body says of it."""
    told = error if isinstance(error, dict) else {"message": error}
    words = " ".join(str(told.get("message") or told.get("detail") or "").split())
    fault = f"status {status}"
    if status in (401, 403, 407):
        # Replies to a wrong key are known to quote it, also in part or changed.
        fault += " (is the key right, and may it use this model?)"
    elif words and not words.startswith("<"):
        fault += f", {excerpt(words, 200)}"
    # Waiting brings no money.
    if not (status in (408, 409, 429) or status >= 500) or told.get("code") == "insufficient_quota":
        return _Failed(fault, None)
    return _Failed(fault, _LIMITED if status == 429 else _FAILURE, _retry_after(headers))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply asks to wait, None if it does not say."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        with suppress(ValueError):
            seconds = float(headers.get(name, "")) / unit
            if 0 < seconds < 1e9:
                return seconds
    return None


def _host(url: str) -> str:
    with suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and "@" not in url and not parts.query:
            return parts.hostname
    # Not shown: it may hold a password.
    raise ValueError("base_url: expected http(s)://HOST[:PORT]/PATH without user and query, got another")


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
