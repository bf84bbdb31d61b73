"""Reading and writing small files so that neither a crash nor a hostile file does harm.

Standard library only.

Writing: `atomic_write`, `write_json`. After a crash at any instant the path holds the old bytes or the new
ones, whole. Reading: `read_text`, `read_json`, `parse_json`. They accept less than Python's `json` does: what
two readers could understand in two ways (duplicate keys, NaN, numbers that overflow) is refused, and so is what could
exhaust memory or the stack. Every refusal is a `DataError`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import reprlib
import secrets
import stat
import zlib
from typing import Any

MAX_BYTES = 64 * 2**20
# Of JSON: what opens and ends objects, a string (before a colon: a key), a number or a word.
_TOKEN = re.compile(r'[{}]|("(?:[^"\\]|\\.)*")(\s*:)?|[^\s"{}\[\]:,]+')
# Half of a pair of surrogates.
_HALF = re.compile(r"[\ud800-\udfff]")


class DataError(ValueError):
    """Outside data that is refused. The message names the file, the place, what was expected and got."""


def excerpt(text: object, limit: int = 60) -> str:
    """`repr` on one line, ASCII only, of about `limit` characters at most: safe inside any message."""
    if isinstance(text, str):
        return ascii(text if len(text) <= limit else text[:limit] + "...")
    shown = reprlib.repr(text).encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= limit else shown[:limit] + "..."


def atomic_write(path: str | os.PathLike, data: bytes | str) -> None:
    """Replace the file at `path` by `data` (text is encoded as UTF-8), all or nothing.

    The bytes go to a temporary file in the same directory, which is flushed to disk and renamed over
    `path`; then the directory is flushed. On any failure up to the rename the old file is untouched and the
    temporary file is removed; a failure to flush the directory after it is raised too, and `path` then holds
    the complete new file. A new file gets the mode the umask gives, an existing one keeps its mode; a
    symbolic link is followed.

    Raises: `DataError` if `path` exists and is no regular file, or if the text has no UTF-8 form; otherwise
    `OSError`.
    """
    path = os.path.realpath(os.fspath(path))
    if isinstance(data, str):
        try:
            data = data.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{path}: expected text, got a lone surrogate at character {error.start}") from None
    mode = None
    try:
        old = os.stat(path)
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISREG(old.st_mode):
            raise DataError(f"{path}: expected a path for a regular file, got {_kind(old.st_mode)}")
        mode = stat.S_IMODE(old.st_mode)

    directory = os.path.dirname(path)
    directory_fd = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        temporary = os.path.join(directory, f"{_temporary(path)}{secrets.token_hex(4)}.tmp")
        try:
            _write_new(temporary, data, mode)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        flush(directory_fd)
    finally:
        os.close(directory_fd)


def _temporary(path: str) -> str:
    """How the names of temporary files for `path` begin: not with its own, which may have the maximum length."""
    return f".sapo-{zlib.crc32(os.fsencode(os.path.basename(path))):08x}-"


def remove_temporary(path: str | os.PathLike) -> None:
    """Remove what killed writers of the file at `path` have left. Call it only if no process writes to it now."""
    path = os.path.realpath(os.fspath(path))
    directory, start = os.path.dirname(path), _temporary(path)
    for name in os.listdir(directory):
        if name.startswith(start) and name.endswith(".tmp"):
            os.unlink(os.path.join(directory, name))


def flush(fd: int) -> None:
    """`os.fsync` of a file or directory; that a file system cannot flush directories at all is no failure."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """`atomic_write` of `obj` as UTF-8 JSON that `read_json` accepts.

    Raises: `DataError` for NaN, infinities and objects JSON does not know; `OSError` from writing.
    """
    try:
        text = json.dumps(obj, allow_nan=False, ensure_ascii=False, indent=1)
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{os.fspath(path)}: cannot be written as JSON: {error}") from None
    # A file that this package would refuse to read must fail now, while the data still exists.
    parse_json(text, f"{os.fspath(path)} (not written)")
    atomic_write(path, text + "\n")


def _write_new(path: str, data: bytes, mode: int | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    fd = os.open(path, flags, 0o666)
    try:
        if mode is not None:
            os.chmod(path, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def read_bytes(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes.

    Raises: `DataError` (also for directories, FIFOs and devices); `OSError` from opening or reading.
    """
    # O_NONBLOCK: opening a FIFO nobody writes to would block for ever, before it can be recognised.
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise DataError(f"{os.fspath(path)}: expected a regular file, got {_kind(mode)}")
        # Counted while reading: the size in the directory may be wrong (/proc) or change.
        chunks, left = [], max_bytes + 1
        while left > 0 and (chunk := os.read(fd, min(left, 2**20))):
            chunks.append(chunk)
            left -= len(chunk)
    finally:
        os.close(fd)
    if left <= 0:
        raise DataError(f"{os.fspath(path)}: expected at most {max_bytes} bytes, got a larger file")
    return b"".join(chunks)


def read_text(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> str:
    """The content of a UTF-8 file; a byte-order mark is dropped, line ends are left as they are.

    Raises: `DataError` for other encodings and NUL characters; `OSError` from opening or reading.
    """
    return decode(read_bytes(path, max_bytes=max_bytes), os.fspath(path))


def decode(data: bytes, name: str) -> str:
    """UTF-8 text as `read_text` takes it; `name` says in messages where it is from."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name}: expected UTF-8 text, got UTF-16 or UTF-32; save it again as UTF-8")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if (where := data.find(b"\0")) >= 0:
        raise DataError(f"{name}: line {data.count(10, 0, where) + 1}: expected text, got a NUL byte")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise DataError(f"{name}: line {line}: expected UTF-8 text, got {got}") from None


def read_json(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> Any:
    """`parse_json` of `read_text`: one strict JSON document from a regular UTF-8 file of bounded size."""
    return parse_json(read_text(path, max_bytes=max_bytes), os.fspath(path))


def parse_json(text: str, name: str) -> Any:
    """One JSON document, equal to `json.loads(text)`; `name` is the text's origin in messages.

    Raises: `DataError` for anything that is not exactly one JSON document, NaN and Infinity, numbers that overflow a
    float, duplicate keys, lone surrogates, and nesting or integers too long for Python.
    """
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite)
        if "\\u" in text:  # half of a pair of surrogates has no UTF-8 form and could not be written again
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except json.JSONDecodeError as error:
        got = excerpt(text[error.pos : error.pos + 30]) if error.pos < len(text) else "the end of the text"
        raise DataError(
            f"{name}: line {error.lineno} column {error.colno}: not valid JSON: {error.msg}, got {got}"
        ) from None
    except RecursionError:
        raise DataError(f"{name}: expected some hundred levels of nesting at most, got more") from None
    except ValueError as error:  # from below, or an integer of thousands of digits
        raise DataError(f"{name}: {_placed(text, error)}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("expected each key once, got one again")
    return found


def _placed(text: str, error: ValueError) -> str:
    """What `parse_json` refuses in `text` with line and column, which `json` does not tell its hooks."""
    objects: list[set[str]] = []
    for token in _TOKEN.finditer(text):
        found, string, colon = token[0], token[1], token[2]
        try:
            if string is not None and _HALF.search(json.loads(string)):
                raise ValueError("expected text, got a lone surrogate")
            if found == "{":
                objects.append(set())
            elif found == "}":
                objects.pop()
            elif colon is not None:
                key = json.loads(string)
                if key in objects[-1]:
                    raise ValueError(f"expected each key once, got {excerpt(key)} again")
                objects[-1].add(key)
            elif string is None:
                json.loads(found, parse_constant=_finite, parse_float=_finite)
        except ValueError as fault:
            place = json.JSONDecodeError("", text, token.start())
            return f"line {place.lineno} column {place.colno}: {fault}"
    return str(error)


def _finite(token: str) -> float:
    value = float(token)
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {excerpt(token)}")
    return value


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")
