"""Ranks that do one job together, and what each of them learns when another is lost.

Messages go from rank to rank over gloo on the CPU, so that every wait is a wait for *one* rank and can name it. A rank
that is killed closes its connections, and whoever sends to it or waits for it knows at once; one that is stopped, or
does not come, is known by the deadline. A rank that raises says why before it does; whoever learns of a loss passes it
on before raising, so that the ranks that leave because of the first one are not taken for the cause.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections import deque

import torch
import torch.distributed as dist

from .model_state import Unrecoverable

# ASKING: a gathering of the model's weights failed, and whoever is there may say so.
WORKING, IDLE, FAILED, ASKING = 1, 0, 2, 3
# int64 in the message of a round: a status and what the job puts behind it.
MESSAGE = 16
# int64 in an alarm: the rank that it is about, then text.
ALARM = 128
# How long a message is waited for that has been sent, if it ever will be.
GRACE = 2.0

_connected: dict[tuple[int, ...], tuple[object, Ranks]] = {}
# Ranks that failed: gloo may still be reading their buffers.
_abandoned: list[Ranks] = []
# How often ranks have connected in this default group; another one has another store.
_attempts: dict[tuple[int, ...], tuple[object, int]] = {}


class RankError(Unrecoverable):
    """Another rank failed, was killed, or was not heard of within the deadline; `rank` is its global number."""

    def __init__(self, rank: int, reason: str):
        super().__init__(f"rank {rank} {reason}")
        self.rank, self.reason = rank, reason


def ranks_of(group, timeout: float) -> Ranks | None:
    """The connected ranks of a process group (None: all), made at the first call; None for a process that is alone.

    Raises:
        ValueError: this process is not in the group.
        RankError: a rank did not come within `timeout` seconds.
    """
    if not (isinstance(timeout, (int, float)) and math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if dist.get_rank(group) < 0:
        raise ValueError(f"group: expected one that rank {dist.get_rank()} is in")
    members = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
    if len(members) == 1:
        return None
    world, ranks = _connected.get(members, (None, None))
    if world is not dist.group.WORLD:
        _connected.pop(members, None)
        ranks = Ranks(members, timeout)
        _connected[members] = (dist.group.WORLD, ranks)
    ranks.timeout = float(timeout)
    return ranks


@contextlib.contextmanager
def patience(groups, seconds: float):
    """Collectives of these process groups over gloo fail after `seconds` in the block, not after the groups' own time.

    What goes over NCCL keeps its own: there a collective that is late ends the process.
    """
    held = []
    for group in groups:
        # Neither has a public name; without them the groups' own time holds.
        with contextlib.suppress(AttributeError, RuntimeError):
            backend = group._get_backend(torch.device("cpu"))
            if isinstance(backend, dist.ProcessGroupGloo):
                own = backend.options._timeout
                backend._set_default_timeout(datetime.timedelta(seconds=seconds))
                held.append((backend, own))
    try:
        yield
    finally:
        for backend, own in reversed(held):
            backend._set_default_timeout(own)


def is_of_a_collective(error: Exception) -> bool:
    """Whether an error says that other ranks did not come to a collective; not one of this rank's own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Ranks:
    """The connection of `members` (global ranks); all of them make it at the same time.

    Everything is done in rounds: `post` sends this rank's message to all and asks for theirs, `take` waits for the
    oldest round that was posted. `timeout`: seconds after which a rank that is waited for is given up.
    """

    def __init__(self, members: tuple[int, ...], timeout: float):
        self.members, self.timeout, self.rank = members, float(timeout), dist.get_rank()
        self.others = [rank for rank in members if rank != self.rank]
        self._rounds: deque = deque()
        self._place = {rank: place for place, rank in enumerate(members)}
        self._beats, self._alarms = self._connect()
        # Asked for now and read when something has gone wrong: a wait for them would end their connections.
        self._alarm_of = {rank: self._receive(rank, ALARM, self._alarms) for rank in self.others}
        self._kept: list = []

    def _connect(self) -> list:
        """Two sets of connections of their own: `dist.new_group` would have to be called by ranks outside too.

        The rendezvous does not say who is missing, so everybody signs in first.
        """
        world, attempt = _attempts.get(self.members, (None, 0))
        attempt = attempt + 1 if world is dist.group.WORLD else 1
        _attempts[self.members] = (dist.group.WORLD, attempt)
        store = dist.PrefixStore(f"sapo_kernels/{self.members}/{attempt}", dist.distributed_c10d._get_default_store())
        deadline = time.monotonic() + self.timeout
        store.set(f"{self.rank}", "here")
        for rank in self.others:
            try:
                store.wait([f"{rank}"], datetime.timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
            except RuntimeError as error:
                raise RankError(rank, f"did not come to score within {self.timeout:g} s") from error
        limit = datetime.timedelta(seconds=self.timeout)
        place, size = self._place[self.rank], len(self.members)
        try:
            return [dist.ProcessGroupGloo(dist.PrefixStore(name, store), place, size, limit) for name in "ab"]
        except RuntimeError as error:
            raise RuntimeError(f"ranks {self.members}: one was lost while they connected: {error}") from error

    def _receive(self, rank: int, size: int, group, tag: int = 0):
        buffer = torch.zeros(size, dtype=torch.int64)
        return group.recv([buffer], self._place[rank], tag), buffer

    def _send(self, rank: int, values: torch.Tensor, group, tag: int = 0):
        return group.send([values], self._place[rank], tag)

    def _trade(self, values: torch.Tensor, sizes: dict[int, int], tag: int = 0) -> tuple[dict, dict]:
        """Begin to send `values` to every other rank and to receive `sizes` of it; by rank, what is under way."""
        received, sent = {}, {}
        for rank, size in sizes.items():
            try:
                if size:
                    received[rank] = self._receive(rank, size, self._beats, tag)
                if len(values):
                    sent[rank] = self._send(rank, values, self._beats, tag)
            except RuntimeError as error:
                self._lost(rank, None, error)
        return received, sent

    def post(self, status: int, payload: torch.Tensor | None = None) -> None:
        """Begin a round: this rank's status and up to ``MESSAGE - 1`` int64 behind it."""
        message = torch.zeros(MESSAGE, dtype=torch.int64)
        message[0] = status
        if payload is not None:
            message[1 : 1 + len(payload)] = payload
        received, sent = self._trade(message, dict.fromkeys(self.others, MESSAGE))
        self._rounds.append((message, received, sent))

    @property
    def posted(self) -> int:
        """Rounds that were posted and not taken."""
        return len(self._rounds)

    def take(self) -> torch.Tensor:
        """[W, MESSAGE] int64, the messages of the oldest round, in the order of `members`.

        Raises:
            RankError: naming the rank that failed or is lost.
        """
        message, received, sent = self._rounds.popleft()
        found = self._wait(received)
        for rank in self.others:
            if found[rank][0] in (FAILED, ASKING):
                self._lost(rank, None, None)
        # A rank whose message of this round is here has asked for ours.
        self._finish(sent)
        found[self.rank] = message
        return torch.stack([found[rank] for rank in self.members])

    def exchange(self, values: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        """Every rank's int64 `values`, in the order of `members`; `sizes`: how many each has."""
        sizes = dict(zip(self.members, sizes, strict=True))
        del sizes[self.rank]
        received, sent = self._trade(values, sizes, tag=1)
        found = self._wait(received)
        self._finish(sent)
        found[self.rank] = values
        return [found.get(rank, values[:0]) for rank in self.members]

    def _wait(self, received: dict) -> dict[int, torch.Tensor]:
        began, found = time.monotonic(), {}
        for rank, (work, buffer) in received.items():
            left = self.timeout - (time.monotonic() - began)
            try:
                work.wait(datetime.timedelta(seconds=max(left, 0.001)))
            except RuntimeError as error:
                waited = time.monotonic() - began
                if self._in_vain(waited):
                    # Whoever is a round ahead misses those too that wait for the lost one; they know which it is.
                    missing = [other for other in received if other not in found and not _arrived(received[other][0])]
                    teller = self._alarmed(missing) if len(missing) > 1 else None
                    rank, waited = (rank, waited) if teller is None else (teller, None)
                self._lost(rank, waited, error)
            found[rank] = buffer
        return found

    def _in_vain(self, waited: float) -> bool:
        """Whether a wait of so many seconds ended because its time was over."""
        return waited >= 0.99 * self.timeout

    def _alarmed(self, ranks: list[int]) -> int | None:
        """The first of these ranks that sends an alarm within a `GRACE`, if one does.

        The text of an alarm is not empty, and looking is all that can be done: a wait in vain ends a gloo connection.
        """
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            for rank in ranks:
                if self._alarm_of[rank][1][1:].any():
                    return rank
            time.sleep(0.01)
        return None

    def _finish(self, sent: dict) -> None:
        for rank, work in sent.items():
            began = time.monotonic()
            try:
                work.wait(datetime.timedelta(seconds=self.timeout))
            except RuntimeError as error:
                self._lost(rank, time.monotonic() - began, error)

    def _lost(self, rank: int, waited: float | None, error: Exception | None) -> None:
        """Tell the others that a rank failed, is gone or was waited for in vain, and raise the `RankError`."""
        if waited is not None and self._in_vain(waited):
            about, reason = rank, f"was not heard of for {self.timeout:g} s (stopped, hung or slower than the timeout)"
        else:
            about, reason = self._said_by(rank)
        self._tell(about, reason)
        raise RankError(about, reason) from error

    def name_lost(self, error: Exception) -> None:
        """Raise the `RankError` for the rank that a collective of the model failed for, if one is gone or silent.

        Only if `error` is a collective's: one rank's own trouble is no reason to ask for others, who cannot answer.
        Ranks run in step here, so whoever is alive has failed in the same gathering and asks too, or waits for the next
        round; the one that is not heard of is the one that was waited for.
        """
        if not is_of_a_collective(error):
            return
        asked = torch.zeros(MESSAGE, dtype=torch.int64)
        asked[0] = ASKING
        answers = {}
        for rank in self.others:
            try:
                self._kept.append((asked, self._send(rank, asked, self._beats)))
                answers[rank] = self._receive(rank, MESSAGE, self._beats)
            except RuntimeError:
                self._lost(rank, None, error)
        deadline = time.monotonic() + GRACE
        for rank, (work, buffer) in answers.items():
            try:
                work.wait(datetime.timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
            except RuntimeError:
                silent = time.monotonic() >= deadline - 0.01 * GRACE
                self._lost(rank, self.timeout if silent else None, error)
            if buffer[0] == FAILED:
                self._lost(rank, None, error)

    def _said_by(self, rank: int) -> tuple[int, str]:
        """(the rank to blame, why) as a rank that failed put it before it went; if it did not, it was killed."""
        work, buffer = self._alarm_of[rank]
        try:
            # Whoever asks who is lost takes a `GRACE` before it can say.
            work.wait(datetime.timedelta(seconds=2 * GRACE))
        except RuntimeError:
            return rank, "is gone: it closed its connection without a word (killed, or its process ended)"
        about, text = int(buffer[0]), bytes(buffer[1:].view(torch.uint8).tolist())
        return about, text.rstrip(b"\0").decode("utf-8", "replace")

    def _tell(self, about: int, reason: str) -> None:
        """Send every rank an alarm, and wake those that wait for this one."""
        text = reason.encode("utf-8", "replace")[: 8 * (ALARM - 1)]
        alarm = torch.zeros(ALARM, dtype=torch.int64)
        alarm[0] = about
        alarm[1:].view(torch.uint8)[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        wake = torch.zeros(MESSAGE, dtype=torch.int64)
        wake[0] = FAILED
        sent = []
        for rank in self.others:
            for message, group in ((alarm, self._alarms), (wake, self._beats)):
                with contextlib.suppress(RuntimeError):
                    work = self._send(rank, message, group)
                    self._kept.append((message, work))
                    # The one that it is about is told too, if it should wake up; nobody waits for that.
                    sent += [work] if group is self._alarms and rank != about else []
        deadline = time.monotonic() + GRACE
        for work in sent:
            with contextlib.suppress(RuntimeError):
                work.wait(datetime.timedelta(seconds=max(deadline - time.monotonic(), 0.001)))

    @contextlib.contextmanager
    def together(self):
        """Tell the others if the block raises, whatever it is; the connection is not used again then."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, RankError):
                self._tell(self.rank, f"failed: {type(error).__name__}: {error}")
            _abandoned.append(self)
            _connected.pop(self.members, None)
            raise


def _arrived(work) -> bool:
    """Whether a message that is received is here."""
    try:
        return bool(work.wait(datetime.timedelta(seconds=0.001)))
    except RuntimeError:
        return False
