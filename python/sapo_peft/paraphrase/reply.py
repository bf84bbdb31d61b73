"""What an endpoint replied, as plain values: a text, or what is wrong and whether asking again may help."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from sapo_kernels.files import excerpt

_MAX_WORDS = 200
# Limits that do not go away by waiting, whatever the status.
_FINAL = re.compile(r"insufficient_quota|billing_hard_limit_reached|billing_not_active|exceed_context_size")
_TOO_LONG = re.compile(r"context.?(length|window|size)|maximum context|(prompt|input|request) (is )?too (long|large)")
_CUT = re.compile(r"length|max.?tokens")
_UNFIT = re.compile(r"filter|safety|tool|function|error|recitation|refus|block|prohibit|abort|cancel")
_UNITS = {"ms": 0.001, "mi": 0.001, "h": 3600.0, "m": 60.0, "s": 1.0, "": 1.0}
_PART = r"(\d{1,15}(?:\.\d{1,15})?)\s?(ms|mi(?=lli)|h|m|s|)(?:[a-z]{2,10})?s?(?![a-z])"
_DURATION = re.compile(rf"(?:{_PART}[\s,]{{0,3}}(?:and\s)?){{1,4}}")
# "try again in 1m2s", "retry after 26 seconds", "wait 20 s", "retryDelay": "27s", "retry_after_ms": 1500, ...
_TOLD = re.compile(
    r"(?:retry|again|wait)[\s_-]{0,9}(?:after|in|delay|for|at least)?[\s_]{0,9}(?:about\s|another\s)?"
    r"(ms|milliseconds)?(?:seconds|secs)?[\"'\s:=]{0,9}(?=\d)"
)


@dataclass(frozen=True)
class Reply:
    """A `text` (`cut`: the model was stopped), or a `fault` and what it is good for.

    kind: "answer": the model's last word; "failure", "late": it may be well next time; "limited": the endpoint is
    there and asks to wait, `after` seconds where it says so; "refusal": it would say the same again.
    """

    text: str = ""
    cut: bool = False
    fault: str | None = None
    kind: Literal["answer", "failure", "late", "limited", "refusal"] = "answer"
    after: float | None = None


def completion(document: Any) -> Reply:
    """What a chat completion, or whatever else the client made of a reply with status 200, says."""
    try:
        choice = document.choices[0]
        reason, content = str(choice.finish_reason or "").lower(), choice.message.content
    except (AttributeError, IndexError, TypeError):
        if error := getattr(document, "error", None):  # gateways put an error into a reply with status 200
            code = error.get("code") if isinstance(error, dict) else None
            return refused(code if type(code) is int and 400 <= code < 600 else 200, error, {}, str(error)[:10_000])
        got = excerpt(document) if isinstance(document, str) else "another document"
        return Reply(fault=f"expected a chat completion, got {got} (is this the address of an API?)", kind="failure")
    if _UNFIT.search(reason):
        return Reply(fault=f"expected an answer that ended by itself, got the finish reason {excerpt(reason)}")
    if isinstance(content, list):  # parts; thoughts are of another type
        texts = [
            part.get("text") for part in content if isinstance(part, dict) and "think" not in str(part.get("type"))
        ]
        content = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str) or not content.strip():
        return Reply(fault="expected a reply with text, got none")
    return Reply(text=content, cut=bool(_CUT.search(reason)))


def refused(status: int, error: Any, headers: Mapping[str, str], body: str, left: float = 0.0) -> Reply:
    """A reply with an error `status`; `error` is its description, read from the `body`. `left`: see `told_wait`."""
    words, codes = error, ""
    if isinstance(error, dict):
        words = next((error[name] for name in ("message", "detail", "msg") if error.get(name)), "")
        codes = " ".join(str(error.get(name)) for name in ("code", "type", "status"))
    words = " ".join(str(words or "").split())
    fault = f"status {status}"
    if status in (401, 403, 407):
        # Replies to a wrong key are known to quote it, also in part or changed.
        fault += " (is the key right, and may it use this model?)"
    elif words and not words.startswith("<"):
        fault += f", {excerpt(words, _MAX_WORDS)}"
    if not (status in (408, 409, 429) or status >= 500) or _FINAL.search(codes) or _TOO_LONG.search(words.lower()):
        return Reply(fault=fault, kind="refusal")
    after = told_wait(headers, body, left)
    limited = status == 429 or (after is not None and after >= 1.0)
    return Reply(fault=fault, kind="limited" if limited else "failure", after=after)


def told_wait(headers: Mapping[str, str], body: str, left: float, now: float | None = None) -> float | None:
    """Seconds that an endpoint asks to wait, None if it does not say: by header, in words or by a limit's reset.

    A reset counts only if it lies within the `left` seconds: it may be that of another limit. `now` is the time in
    seconds since 1970.
    """
    now = time.time() if now is None else now
    stated = [_moment(f"{headers.get('retry-after-ms', '')}ms", now), _moment(headers.get("retry-after", ""), now)]
    body = body.lower()
    if (match := _TOLD.search(body)) and (duration := _DURATION.match(body, match.end())):
        stated.append(_seconds(duration.group()) * (0.001 if match.group(1) else 1.0))
    resets, used_up = [], []
    for name, value in headers.items():
        if "ratelimit" in name.lower() and "reset" in name.lower():
            moment = _moment(value, now)
            if moment is not None and moment < left:
                exhausted = headers.get(name.lower().replace("reset", "remaining")) == "0"
                (used_up if exhausted else resets).append(moment)
    return next((seconds for seconds in (*stated, min(used_up or resets, default=None)) if seconds), None)


def _moment(value: str, now: float) -> float | None:
    """Seconds from now on to what a header says: a duration, seconds or milliseconds since 1970, or a date."""
    value = value.strip()
    if len(value) > 100:
        return None
    if value.isascii() and value.replace(".", "", 1).isdigit():
        seconds = float(value)
        return seconds if seconds < 1e9 else max(0.0, (seconds if seconds < 1e11 else seconds / 1000) - now)
    if _DURATION.fullmatch(value.lower()):
        return _seconds(value.lower())
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            return max(0.0, read(value).timestamp() - now)
        except (ValueError, TypeError, OverflowError, IndexError, OSError):
            continue
    return None


def _seconds(duration: str) -> float:
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, duration))
