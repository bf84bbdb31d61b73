"""One process at a time in a folder or at a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def alone(lock: str | os.PathLike, place: str | os.PathLike) -> Iterator[None]:
    """Hold the lock file for the block; `place` is what it guards, for the message.

    The lock goes with the process, however it ends; the empty file stays.

    Raises: RuntimeError: another process holds it.
    """
    from filelock import FileLock, Timeout

    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise RuntimeError(f"{os.fspath(place)}: another process is at work here") from None
