"""Manifests: what a folder holds, written last, so that whatever is missing, added or changed later is noticed.

Standard library only. ``sapo_manifest.json`` names every file below the folder with its size and SHA-256; of a folder
inside that has a manifest of its own, that manifest stands for its files. ::

    write_manifest(folder, "sapo_adapter")   # after the last file: flushes them all to disk first
    check_manifest(folder, "sapo_adapter")   # before the first one is used: `DataError` by name

What is damaged by accident or edited by hand is found; who forges a file can forge the manifest with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

from .files import DataError, atomic_write, excerpt, flush, parse_json, read_json, read_text

MANIFEST = "sapo_manifest.json"
VERSION = 1
MAX_MANIFEST_BYTES = 16 * 2**20
# Left by `atomic_write` where a process was killed; never read.
TEMPORARY = ".sapo-*.tmp"
Skip = Callable[[str], bool]


def _nothing(path: str) -> bool:
    return False


def write_manifest(
    folder: str | os.PathLike, schema: str, *, skip: Skip = _nothing, pending: Mapping[str, bytes] | None = None
) -> None:
    """Flush every file below `folder` to disk, and only then write the manifest, all or nothing.

    Args:
        folder: what it holds is listed as it is now. schema: what kind of folder it is, e.g. "sapo_adapter".
        skip: whether a path in the folder, like "sub/file" or "sub/" for a folder, is passed over.
        pending: the bytes that files are about to get, by path. Until the next manifest `check_manifest` takes the
            file as it is (or is not) and as it will be: a process killed between the two leaves a sound folder.

    Raises: `DataError` for what is no regular file; `OSError`.
    """
    files = {name: _entry(path, durable=True) for name, path in _files(folder, skip)}
    # A file that was flushed can still be without its name after a power cut.
    for inside in {"", *(str(parent) for name in files for parent in PurePosixPath(name).parents)}:
        flush_folder(os.path.join(folder, inside))
    document: dict[str, Any] = {"schema": schema, "version": VERSION, "files": files}
    if pending:
        document["pending"] = {name: _digest(len(data), hashlib.sha256(data)) for name, data in pending.items()}
    atomic_write(os.path.join(folder, MANIFEST), _text(document))


def check_manifest(folder: str | os.PathLike, schema: str | tuple[str, ...], *, skip: Skip = _nothing) -> None:
    """Compare a folder with its manifest, and the folders inside that have one with theirs.

    schema: what kind of folder it may be. skip: what is passed over, as `write_manifest` has it.

    Raises: `DataError` naming the first file that is missing, unexpected or other than it was written; or the manifest,
    if there is none, it is damaged or is of another schema or version. `OSError` from reading.
    """
    place = os.path.join(folder, MANIFEST)
    kept, pending = _read(place, schema)
    found = dict(_files(folder, skip))
    for name in kept:
        if name not in found and not skip(name):
            raise DataError(f"{os.path.join(folder, name)}: expected this file, as {MANIFEST} lists it, got none")
    for name, path in found.items():
        allowed = [one[name] for one in (kept, pending) if name in one]
        if not allowed:
            raise DataError(f"{path}: expected only files that {MANIFEST} lists, got this one")
        got = _entry(path)
        if got not in allowed:
            key = "size" if all(got["size"] != one["size"] for one in allowed) else "sha256"
            expected, unit = allowed[0][key], " bytes" if key == "size" else ""
            raise DataError(f"{path}: expected {key} {expected}{unit} as in {MANIFEST}, got {got[key]}{unit}")
    for name, path in found.items():
        if os.path.basename(name) == MANIFEST:
            check_manifest(os.path.dirname(path), _schema(path))


def settle_manifest(folder: str | os.PathLike, schema: str, *, skip: Skip = _nothing) -> None:
    """After `check_manifest`: what a process that was killed had announced is not announced any more.

    Arguments as of `write_manifest`.
    """
    if _read(os.path.join(folder, MANIFEST), schema)[1]:
        write_manifest(folder, schema, skip=skip)


def _text(document: dict[str, Any]) -> str:
    """A manifest as it is written: with a digest of itself, so that not a byte of it can change either."""
    digest = hashlib.sha256(json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
    return json.dumps({**document, "sha256": digest}, ensure_ascii=False, indent=1) + "\n"


def _read(place: str, schema: str | tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(files, pending) of a manifest."""
    try:
        text = read_text(place, max_bytes=MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise DataError(f"{place}: expected the manifest of this folder, got none: its writing was cut short") from None
    document = parse_json(text, place)
    known = (schema,) if isinstance(schema, str) else schema
    if not isinstance(document, dict) or document.get("schema") not in known or document.get("version") != VERSION:
        names = " or ".join(known)
        raise DataError(f"{place}: expected a manifest of {names}, version {VERSION}, got {excerpt(document)}")
    digest = document.pop("sha256", None)
    if text != _text(document):
        raise DataError(f"{place}: expected an unchanged manifest, sha256 {excerpt(digest)}, got an edited one")
    return document["files"], document.get("pending", {})


def _schema(place: str) -> str:
    """The schema of a manifest inside a folder, whose own bytes the outer manifest vouches for."""
    document = read_json(place, max_bytes=MAX_MANIFEST_BYTES)
    return document.get("schema", "") if isinstance(document, dict) else ""


def _files(folder: str | os.PathLike, skip: Skip) -> Iterator[tuple[str, str]]:
    """(path in the folder with "/", path) of every file that its manifest lists."""

    def fail(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(folder, onerror=fail):
        inside = os.path.relpath(where, folder)
        prefix = "" if inside == "." else inside.replace(os.sep, "/") + "/"
        if prefix and MANIFEST in names:
            folders[:], names = [], [MANIFEST]
        for name in sorted(names):
            if skip(prefix + name) or fnmatch(name, TEMPORARY) or (name == MANIFEST and not prefix):
                continue
            yield prefix + name, os.path.join(where, name)
        folders[:] = sorted(one for one in folders if not skip(f"{prefix}{one}/"))
        for name in folders:
            if os.path.islink(os.path.join(where, name)):
                raise DataError(f"{os.path.join(where, name)}: expected a folder, got a link to one")


def _entry(path: str, *, durable: bool = False) -> dict[str, Any]:
    """{"size", "sha256"} of a regular file, which is flushed to disk if `durable`."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise DataError(f"{path}: expected a regular file, got another kind")
    with open(path, "rb", buffering=0) as file:
        found = hashlib.file_digest(file, "sha256")
        size = file.tell()
        if durable:
            flush(file.fileno())
    return _digest(size, found)


def _digest(size: int, found: Any) -> dict[str, Any]:
    return {"size": size, "sha256": found.hexdigest()}


def flush_folder(folder: str | os.PathLike) -> None:
    """Flush the names of a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        flush(handle)
    finally:
        os.close(handle)
