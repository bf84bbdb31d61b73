"""Ranks that do one job together, and how each learns that another is lost.

Everything they tell each other goes through the store of the process group, which torchrun's agent or rank 0 keeps:
values, signs of life, and the first loss that anybody finds. A rank gives a sign before each forward and whenever it
waits, so the one that gives none is the one that is waited for, and never one that waits itself.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from .model_state import Unrecoverable

# Seconds between two signs of a rank that waits, and at least between those of one that works.
BEAT = 0.2
# Seconds between two looks for what others write.
LONGEST_PAUSE = 0.02
# Seconds more for ranks that wait for a lost one in a collective, which began to wait a little later.
GRACE = 2.0
# Bytes of one value in a store; torch's takes 8 MiB.
PIECE = 4 << 20

# How the reason of a rank that raised begins.
FAILED = "failed: "
GONE = "is gone, or the process that keeps the store of the process group"
SILENT = "killed, stopped, hung, never there, or slower than the timeout"

# Those of the call before: its keys go when all ranks are in the next.
_before: dict[tuple[int, ...], tuple[object, Ranks]] = {}


class _Answering:
    """A store that is given up if it does not answer: its own calls wait for ever for a keeper that is stopped."""

    def __init__(self, store, timeout: float):
        self._store, self._timeout = store, timeout

    def __getattr__(self, name: str):
        def call(*args):
            found = []

            def ask():
                try:
                    found.append((getattr(self._store, name)(*args), None))
                except Exception as error:
                    found.append((None, error))

            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            thread.join(self._timeout)
            if not found:
                who = "or the process that keeps the store"
                raise RankError(0, f"{who} was not heard from for {self._timeout:g} s ({SILENT})")
            value, error = found[0]
            if error is not None:
                raise error
            return value

        return call


class RankError(Unrecoverable):
    """Another rank failed, was killed, or was not heard from within the deadline; `rank` is its global number."""

    def __init__(self, rank: int, reason: str):
        super().__init__(f"rank {rank} {reason}")
        self.rank, self.reason = rank, reason


def ranks_of(group, timeout: float) -> Ranks:
    """The ranks of a process group (None: all); of a process that is alone, itself.

    Raises:
        ValueError: this process is not in the group.
    """
    if not (isinstance(timeout, (int, float)) and math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks((0,), 0, None, timeout)
    if dist.get_rank(group) < 0:
        raise ValueError(f"group: expected one that rank {dist.get_rank()} is in")
    members = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
    try:
        ranks = Ranks(members, dist.get_rank(), dist.distributed_c10d._get_default_store(), timeout)
    except dist.DistNetworkError as error:
        raise RankError(0, GONE) from error
    world, before = _before.get(members, (None, None))
    if world is dist.group.WORLD:
        ranks.follow(before)
    _before[members] = dist.group.WORLD, ranks
    return ranks


class Ranks:
    """`members` (global ranks), of which this process is `rank`; all of them do the same exchanges in the same order.

    timeout: seconds without a sign after which a rank that is waited for is given up.
    """

    def __init__(self, members: tuple[int, ...], rank: int, store, timeout: float):
        self.members, self.rank, self.timeout = members, rank, float(timeout)
        self.others = [other for other in members if other != rank]
        self._exchanges, self._exchanged, self._beaten, self._sent = 0, 0.0, 0.0, []
        if self.others:
            # Each call has a place of its own, whether the one before failed on all ranks, on some or on none: all
            # make the same calls, so they meet again in the next, and nothing of before is read there.
            place = f"sapo_kernels/{members}"
            call = _Answering(store, self.timeout).add(f"{place}/{rank}", 1)
            self._store = _Answering(dist.PrefixStore(f"{place}/{call}", store), self.timeout)

    def follow(self, before: Ranks) -> None:
        """Delete what this rank has left of the previous call, once no rank can be in it any more."""
        if self.others:
            self._sent = [*before._sent, (before._store, f"beat/{self.rank}")]

    def beat(self) -> None:
        """A sign of life. Raises `RankError` if another rank has reported a loss."""
        if not self.others or time.monotonic() - self._beaten < BEAT:
            return
        self._beaten = time.monotonic()
        self._store.set(f"beat/{self.rank}", repr(self._beaten))
        if self._store.check(["lost"]):
            raise self._told(self._store.get("lost"))

    def exchange(self, value: Any, timeout: float | None = None) -> list:
        """Every rank's `value`, of JSON's types (NaN too), in the order of `members`; tuples come as lists.

        timeout: of this exchange; None: that of all.

        Raises:
            RankError: naming the rank that failed or is lost.
        """
        if not self.others:
            return [value]
        number, self._exchanges = self._exchanges, self._exchanges + 1
        data, sent = json.dumps(value), [f"{number}/{self.rank}"]
        for begin in range(0, len(data), PIECE):
            sent.append(f"{number}/{self.rank}/{begin}")
            self._store.set(sent[-1], data[begin : begin + PIECE])
        self._store.set(sent[0], str(len(data)))
        self._wait({rank: f"{number}/{rank}" for rank in self.others}, timeout or self.timeout)
        # A rank that was given up for its silence may answer after all, but those that gave it up have raised.
        if self._store.check(["lost"]) and not (lost := self._told(self._store.get("lost"))).reason.startswith(FAILED):
            raise lost
        # Whoever is in this exchange has read what the one before brought.
        for store, key in self._sent:
            store.delete_key(key)
        self._sent, self._exchanged = [(self._store, key) for key in sent], time.monotonic()
        return [json.loads(data) if rank == self.rank else self._read(f"{number}/{rank}") for rank in self.members]

    def since_exchange(self) -> float:
        """Seconds since the last exchange."""
        return time.monotonic() - self._exchanged

    def _read(self, key: str) -> Any:
        pieces = range(0, int(self._store.get(key)), PIECE)
        return json.loads(b"".join(self._store.get(f"{key}/{begin}") for begin in pieces))

    def _wait(self, key_of: dict[int, str], timeout: float) -> None:
        """Until each rank has written its key; the first one that has given no sign for `timeout` seconds is lost."""
        heard: dict[int, tuple[bytes | None, float]] = {}
        pause, looked, keys = 0.001, time.monotonic(), list(key_of.values())
        # The store's own wait writes to stderr whenever its time is over.
        while not self._store.check(keys):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            try:
                self.beat()
            except RankError:
                # One that failed after this exchange has failed by what it brought, as this rank will.
                if self._store.check(keys):
                    return
                raise
            if time.monotonic() - looked < BEAT:
                continue
            looked = time.monotonic()
            for rank, key in key_of.items():
                if self._store.check([key]):
                    continue
                sign = self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else None
                before, since = heard.setdefault(rank, (sign, time.monotonic()))
                if sign != before:
                    heard[rank] = sign, time.monotonic()
                elif time.monotonic() - since > timeout:
                    raise self._lost(rank, f"was not heard from for {timeout:g} s ({SILENT})")

    def _lost(self, rank: int, reason: str) -> RankError:
        """The first lost rank that any rank has reported; this one, if none has."""
        # A lone surrogate in a text of the user's has no UTF-8 form.
        reason = reason.encode("utf-8", "replace").decode()
        return self._told(self._store.compare_set("lost", "", f"{rank} {reason}"))

    def _told(self, text: bytes) -> RankError:
        rank, _, reason = text.decode().partition(" ")
        return RankError(int(rank), reason)

    @contextlib.contextmanager
    def together(self):
        """Tell the others if the block raises, whatever it is."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, dist.DistNetworkError):
                raise RankError(0, GONE) from error
            if self.others and not isinstance(error, RankError):
                with contextlib.suppress(RuntimeError):
                    self._lost(self.rank, f"{FAILED}{type(error).__name__}: {error}")
            raise


@contextlib.contextmanager
def collective_timeout(groups, seconds: float):
    """Collectives of these process groups over gloo fail after `seconds` in the block, not after the groups' own time.

    What goes over NCCL keeps its own: there a collective that is late ends the process.
    """
    before = []
    for group in groups:
        # Neither has a public name; without them the groups' own time holds.
        with contextlib.suppress(AttributeError, RuntimeError):
            backend = group._get_backend(torch.device("cpu"))
            if isinstance(backend, dist.ProcessGroupGloo):
                own = backend.options._timeout
                backend._set_default_timeout(datetime.timedelta(seconds=seconds))
                before.append((backend, own))
    try:
        yield
    finally:
        for backend, own in reversed(before):
            backend._set_default_timeout(own)


def is_of_a_collective(error: Exception) -> bool:
    """Whether an error says that other ranks did not join a collective, rather than being this rank's own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
