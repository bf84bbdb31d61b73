"""A wire across the file calls of a process: at the n-th of them it is sent a signal, as if by chance."""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

# With the place of the path in the arguments of the audit event.
_AUDITED = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.chmod": 0, "os.link": 1, "os.truncate": 0}


class Wire:
    """Counts what happens to files below `folder`: opened to write, written, flushed, renamed, made, removed.

    A native writer counts three times: before, half way (its file is cut in half) and after. A write by `os.write`
    counts twice, the second time with half of it done. At number `stop`, counted from 1, the process gets `sent`.
    """

    def __init__(self, folder: Path, stop: int | None, sent: int = signal.SIGKILL):
        self.folder, self.stop, self.sent, self.count, self.on = str(folder.resolve()), stop, sent, 0, False

    def install(self) -> None:
        import safetensors.torch
        import torch

        self._write, self._fsync = os.write, os.fsync
        os.write, os.fsync = self.write, self.fsync
        for module, name, place in ((safetensors.torch, "serialize_file", 1), (torch, "save", 1)):
            setattr(module, name, self._native(getattr(module, name), place))
        sys.addaudithook(self._audit)
        self.on = True

    def step(self) -> bool:
        """Whether it is the one; the signal is up to the caller."""
        self.count += 1
        return self.count == self.stop

    def hit(self) -> None:
        if self.step():
            os.kill(os.getpid(), self.sent)

    def inside(self, path: Any) -> bool:
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return False
        try:
            path = os.path.abspath(os.fsdecode(path))
        except (TypeError, ValueError):
            return False
        return path.startswith(self.folder + os.sep)

    def write(self, fd: int, data: Any) -> int:
        if self.inside(fd):
            self.hit()
            if self.step():
                self._write(fd, memoryview(data)[: len(data) // 2])
                os.kill(os.getpid(), self.sent)
        return self._write(fd, data)

    def fsync(self, fd: int) -> None:
        if self.inside(fd):
            self.hit()
        self._fsync(fd)

    def _native(self, plain, place: int):
        @functools.wraps(plain)
        def call(*args, **options):
            path = args[place] if len(args) > place else None
            if not self.inside(path):
                return plain(*args, **options)
            self.hit()
            found = plain(*args, **options)
            if self.step():
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), self.sent)
            self.hit()
            return found

        return call

    def _audit(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            writes = (isinstance(mode, str) and mode.strip("brt")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes and self.inside(path):
                self.hit()
        elif event in _AUDITED and self.inside(args[_AUDITED[event]]):
            self.hit()


def spread(total: int, count: int) -> list[int]:
    """`count` numbers from 1 to `total` (all, if there are fewer), evenly apart."""
    if count >= total:
        return list(range(1, total + 1))
    return sorted({1 + round(i * (total - 1) / (count - 1)) for i in range(count)} if count > 1 else {total // 2})
