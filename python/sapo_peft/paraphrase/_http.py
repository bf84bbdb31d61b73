"""One request through the `openai` client, cut off at a moment and at a size, its outcome as plain values.

The client's timeouts hold for each read, so a server that sends a byte now and then is never late for it; and it
reads a reply of any size. Both are watched here, through the hooks that its HTTP library has.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sapo_kernels.files import DataError, excerpt, parse_json

from .redact import Secret
from .retry import retry_after

MAX_REPLY_BYTES = 2**20
_RETRIED = (408, 409, 429)
# Statuses that come with 429 and do not go away by waiting.
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_MAX_MESSAGE = 200


@dataclass(frozen=True)
class Outcome:
    """A text (`cut`: the model was stopped) or a `fault`; `again`: it may help to ask again, `after` that many seconds.

    late: the request took all the time it had.
    """

    text: str = ""
    cut: bool = False
    fault: str | None = None
    again: bool = True
    after: float | None = None
    late: bool = False


class _Stopped(Exception):
    """Raised while a reply is read; the message says why."""


class Caller:
    """One connection to an endpoint, used by one thread; `cut` and `cut_if_late` may be called by another."""

    def __init__(self, base_url: str, model: str, secret: Secret | None):
        import openai

        self._openai, self._model, self._secret = openai, model, secret
        self._end = float("inf")
        self._stopped = False
        self._stream: Any = None
        self._client = openai.OpenAI(
            # Local servers without keys take any; an empty one is refused by the client.
            api_key="none" if secret is None else secret.reveal(),
            base_url=base_url,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(
                event_hooks={"request": [self._on_request], "response": [self._on_response]},
                # A reply that points elsewhere would have the texts sent to a host nobody named.
                follow_redirects=False,
            ),
        )

    def ask(self, message: str, seconds: float) -> Outcome:
        """Send one user turn and wait at most `seconds` for the whole reply. Never raises for what a server does."""
        self._end = time.monotonic() + seconds
        try:
            # Nothing is raised inside the handlers: exceptions of the client hold the request and with it the key.
            return self._send(message, seconds)
        finally:
            self._end = float("inf")

    def _send(self, message: str, seconds: float) -> Outcome:
        openai = self._openai
        try:
            reply = self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=[{"role": "user", "content": message}],
                timeout=seconds,
                # A compressed reply could unpack to any size.
                extra_headers={"Accept-Encoding": "identity"},
            )
            return self._read(reply.http_response.content)
        except openai.APIStatusError as error:
            return self._status(error)
        except openai.APITimeoutError:
            return Outcome(fault=f"no whole reply within {seconds:.3g} s", late=True)
        except openai.OpenAIError as error:
            cause = error.__cause__
        except Exception as error:  # of the HTTP library, which depends on the client's version
            cause = error
        if isinstance(cause, _Stopped):
            return Outcome(fault=str(cause))
        if time.monotonic() >= self._end:
            return Outcome(fault=f"no whole reply within {seconds:.3g} s", late=True)
        return Outcome(fault=f"the connection failed ({_reason(cause)})")

    def _status(self, error: Any) -> Outcome:
        status = error.status_code
        details = error.body if isinstance(error.body, dict) else {}
        fault = f"status {status}"
        said = details.get("message")
        # Replies to a wrong key are known to quote it, also in part or changed: they are not shown at all.
        if isinstance(said, str) and status not in (401, 403, 407):
            fault += f", {excerpt(self.hidden(said[:10_000]), _MAX_MESSAGE)}"
        again = (status in _RETRIED or status >= 500) and details.get("code") not in _NO_MONEY
        after = retry_after(error.response.headers.get("retry-after"))
        return Outcome(fault=fault, again=again, after=after if again else None)

    def _read(self, body: bytes) -> Outcome:
        """The text in a reply with status 200."""
        try:
            # The name in messages; what they quote of the reply is hidden below.
            document = parse_json(body.decode("utf-8"), "the reply")
            text, reason = _content(document)
        except UnicodeDecodeError:
            return Outcome(fault="wanted a reply in UTF-8, got other bytes")
        except DataError as error:
            if body.lstrip()[:1] == b"<":
                return Outcome(fault="wanted a reply in JSON, got HTML or XML: is this the address of an API?")
            return Outcome(fault=self.hidden(str(error))[:300])
        if self._secret is not None and self._secret.shown_in(text):
            return Outcome(fault="the reply holds the key and was not used")
        return Outcome(text=text, cut=reason == "length")

    def hidden(self, text: str) -> str:
        return text if self._secret is None else self._secret.hidden(text)

    def _on_request(self, request: Any) -> None:
        request.extensions = {**request.extensions, "trace": self._on_trace}

    def _on_trace(self, event: str, info: dict[str, Any]) -> None:
        # The connection, from its first moment on: a server may be slow before it has sent a header.
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._stream = info.get("return_value")
            if self._stopped:  # while the name was looked up: nothing is sent any more
                raise _Stopped("the work was stopped")

    def _on_response(self, response: Any) -> None:
        encoding = response.headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise _Stopped("wanted a reply that is not compressed, got a compressed one")
        inner = response.stream
        # Made from the class that the HTTP library checks for, whichever library it is.
        base = next(kind for kind in type(inner).__mro__ if kind.__name__ == "SyncByteStream")
        kind = type(
            "BoundedStream", (base,), {"__iter__": lambda _: self._bounded(inner), "close": lambda _: inner.close()}
        )
        response.stream = kind()

    def _bounded(self, chunks: Any) -> Iterator[bytes]:
        size = 0
        for chunk in chunks:
            size += len(chunk)
            if size > MAX_REPLY_BYTES:
                raise _Stopped(f"wanted a reply of at most {MAX_REPLY_BYTES} bytes, got more")
            if self._stopped or time.monotonic() >= self._end:
                # Told apart from a lost connection by the clock.
                raise OSError("out of time")
            yield chunk

    def cut_if_late(self) -> None:
        """End the request if it has passed its time."""
        if time.monotonic() >= self._end:
            self._shut()

    def cut(self) -> None:
        """End the request, if there is one, and every later one."""
        self._stopped = True
        self._shut()

    def _shut(self) -> None:
        stream = self._stream
        # Shut down and not closed: the other thread waits on this file descriptor.
        with contextlib.suppress(Exception):
            stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection back; for the thread that used it."""
        with contextlib.suppress(Exception):
            self._client.close()


def _content(document: Any) -> tuple[str, str | None]:
    """(text, finish reason) of a chat completion. Raises `DataError` for any other document."""
    choices = document.get("choices") if isinstance(document, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise DataError("wanted a reply with choices, got none")
    reason, message = choices[0].get("finish_reason"), choices[0].get("message")
    if reason not in ("stop", "length", None):
        raise DataError(f"wanted an answer that ended by itself, got the finish reason {excerpt(reason)}")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise DataError("wanted a reply with text, got none")
    return text, reason


def _reason(error: BaseException | None) -> str:
    """What a failed connection is called, without the texts of others: the kind, and the system's word for it."""
    kind = type(error).__name__
    for _ in range(8):
        if isinstance(error, OSError) and error.strerror:
            return f"{kind}: {error.strerror}"
        if error is None:
            break
        error = error.__cause__ or error.__context__
    return kind
