"""Keeping the key of an endpoint out of everything that is written, also where a server sends it back."""

from __future__ import annotations

import base64
import logging
import threading
import urllib.parse

_MASK = "[key]"
# Pieces of a key of this length are hidden too: a shortened message may end inside it.
_PIECE = 8
# Loggers below which the client and its HTTP libraries write, at DEBUG with the headers of replies.
_ROOTS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


class Secret:
    """A key. Only `reveal` gives it; it has no text form and cannot be pickled."""

    __slots__ = ("_forms", "_value")

    def __init__(self, value: str):
        self._value = value
        encoded = base64.b64encode(value.encode()).decode().rstrip("=")
        forms = {value, urllib.parse.quote(value, safe=""), encoded, value.encode("unicode_escape").decode()}
        self._forms = [form.casefold() for form in forms if form]

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return _MASK

    def __reduce__(self):
        raise TypeError("a key is not written anywhere")

    def hidden(self, text: str) -> str:
        """`text` with the key, its encoded forms and longer pieces of them replaced by ``[key]``."""
        folded = text.casefold()
        if len(folded) != len(text):  # then positions do not agree
            folded = "".join(c.casefold() if len(c.casefold()) == 1 else c for c in text)
        hide = [False] * len(text)
        for form in self._forms:
            size = min(_PIECE, len(form))
            for piece in {form[offset : offset + size] for offset in range(len(form) - size + 1)}:
                place = -1
                while (place := folded.find(piece, place + 1)) >= 0:
                    hide[place : place + size] = [True] * size
        if not any(hide):
            return text
        return "".join(
            c if not hidden else _MASK if place == 0 or not hide[place - 1] else ""
            for place, (c, hidden) in enumerate(zip(text, hide, strict=True))
        )

    def shown_in(self, text: str) -> bool:
        """Whether the key, or a long piece of it, stands in `text`; False for a key too short to be one (``none``)."""
        return len(self._value) >= _PIECE and self.hidden(text) != text


class LogGuard(logging.Filter):
    """While entered, hides a key in every record of the client's and its HTTP libraries' loggers."""

    _lock = threading.Lock()

    def __init__(self, secret: Secret):
        super().__init__()
        self._secret, self._loggers = secret, []

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            text = record.getMessage()
        except Exception:  # a message that does not fit its arguments: logging itself will say so
            text = str(record.msg)
            record.args = ()
        hidden = self._secret.hidden(text)
        if hidden != text:
            record.msg, record.args = hidden, ()
        record.exc_info = record.exc_text = None
        return True

    def __enter__(self) -> LogGuard:
        with self._lock:
            # A filter of a logger does not see the records of the loggers below it.
            names = [name for name in list(logging.root.manager.loggerDict) if name.partition(".")[0] in _ROOTS]
            self._loggers = [logging.getLogger(name) for name in {*names, *_ROOTS}]
            for logger in self._loggers:
                logger.addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for logger in self._loggers:
                logger.removeFilter(self)
            self._loggers = []
