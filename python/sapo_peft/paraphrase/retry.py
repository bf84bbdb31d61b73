"""How long to wait before asking again: back-off with jitter, and both forms of Retry-After."""

from __future__ import annotations

import math
import random
import threading
import time
from email.utils import parsedate_to_datetime

# Longer headers are no date and no number, and are not looked at.
_MAX_HEADER = 100


def retry_after(header: str | None, now: float | None = None) -> float | None:
    """Seconds to wait by a Retry-After header: whole or decimal seconds, or an HTTP date; None if it says nothing.

    `now` is the time in seconds since 1970. A date that is past means 0.0. Negative, endless and unreadable
    values are None.
    """
    if header is None or len(header) > _MAX_HEADER:
        return None
    header = header.strip()
    if header.isascii() and header.replace(".", "", 1).isdigit():
        seconds = float(header)
        return seconds if math.isfinite(seconds) else None
    try:
        moment = parsedate_to_datetime(header).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError, OSError):
        return None
    return max(0.0, moment - (time.time() if now is None else now))


class Backoff:
    """Waits that double from `base` to `longest` seconds, each drawn from its upper half (seeded; thread-safe)."""

    def __init__(self, base: float = 0.5, longest: float = 20.0, seed: int | None = None):
        self._base, self._longest = base, longest
        self._random, self._lock = random.Random(seed), threading.Lock()

    def wait(self, tries: int) -> float:
        """Seconds to wait after `tries` failures in a row (from 1 on)."""
        with self._lock:
            part = self._random.uniform(0.5, 1.0)
        # The exponent is bounded: 2.0**2000 is an error.
        return part * min(self._longest, self._base * 2.0 ** min(tries - 1, 60))
