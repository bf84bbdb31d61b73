"""Files and folders that commands write: refused where they would do harm, named where writing fails."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sapo_kernels.files import DataError

_PROBE_BYTES = 2**20
# How torch reports that it could not write: without file and cause.
_TORCH_WRITER = re.compile(r"inline_container|iostream error")


def check_file(
    option: str, path: str | None, inputs: Iterable[str | os.PathLike | None], ours: bytes, overwrite: bool
) -> None:
    """Refuse an output file that is an input, that exists and is not ours, or that cannot be written.

    ours: what stands in the first bytes of files that this command writes; they are replaced without asking.

    Raises: `DataError` naming the option, what was expected and got.
    """
    if path is None:
        return
    file = Path(path)
    if file.is_dir() or not file.resolve().parent.is_dir():
        raise DataError(f"{option} {path}: expected a file in an existing folder, got none")
    if file.exists():
        for name in inputs:
            if name is not None and os.path.exists(name) and os.path.samefile(name, file):
                raise DataError(f"{option} {path}: expected another file than the input {os.fspath(name)}")
        if not overwrite and not _is_ours(file, ours):
            raise DataError(
                f"{option} {path}: expected a new file or one that this command wrote, got another one; "
                "--overwrite replaces it"
            )
    check_folder(option, file.resolve().parent)


def check_folder(option: str, folder: str | os.PathLike) -> None:
    """Find out now, not after an hour, that nothing can be written to a folder that exists."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        got = error.strerror or str(error)
        raise DataError(f"{option} {os.fspath(folder)}: expected a folder that can be written to, got: {got}") from None


def _is_ours(file: Path, ours: bytes) -> bool:
    # A FIFO nobody writes to would block for ever.
    if not file.is_file():
        return False
    with open(file, "rb") as opened:
        return ours in opened.read(256)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Failures to write inside say which file or folder it was, and why."""
    try:
        yield
    except OSError as error:
        # Temporary files and locks are nothing that a user knows.
        known = error.filename is not None and not str(error.filename).endswith((".tmp", ".lock"))
        if known or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    except DataError:
        raise
    except Exception as error:
        # Writers of tensors do not name the file; those in Rust name the cause.
        said = re.search(r"\(os error (\d+)\)", str(error))
        cause = OSError(int(said[1]), os.strerror(int(said[1]))) if said else None
        if _TORCH_WRITER.search(str(error)):
            cause = _cause(path)
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, os.fspath(path)) from error


def _cause(path: str | os.PathLike) -> OSError | None:
    """What the system says to a megabyte in that folder."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        # Buffered: a single write may stop where the room ends, and that is no error.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        return error
    return None
