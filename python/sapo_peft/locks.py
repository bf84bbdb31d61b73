"""One process at a time in a folder or at a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

MAX_NAME_BYTES = 200


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
        raise RuntimeError(f"{os.fspath(place)}: another process is writing here") from None


@contextlib.contextmanager
def only_writer(path: str | os.PathLike | None) -> Iterator[None]:
    """Nobody else writes to the file or folder `path` meanwhile, and what a killed writer left of it is removed.

    The lock is ``.NAME.lock`` beside it, which goes in the end. None: there is nothing to guard.

    Raises: RuntimeError: another process does. FileNotFoundError: the folder of `path` is not there.
    """
    if path is None:
        yield
        return
    # Here: the command line shows its help without torch.
    from sapo_kernels.files import remove_temporary

    place = Path(os.path.realpath(path))
    if not place.parent.is_dir():  # which the lock would make
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    name = place.name
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    lock = place.parent / f".{name}.lock"
    with alone(lock, path):
        remove_temporary(place)
        try:
            yield
        finally:
            # While it is held: filelock takes a file that has lost its name for none.
            with contextlib.suppress(OSError):
                lock.unlink()
