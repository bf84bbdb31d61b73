"""Providers of one case in turns: every output checked, every call timed, memory read once.

A turn runs every provider once, each time beginning with another one, so that what else happens on the machine hits
all of them. Of the sizes of one peer only the fastest goes on after the first turn. An output that the check refuses
ends the case: no time of it is worth keeping.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .rows import Environment, Row, environment


class Disagreement(AssertionError):
    """A provider's output is not the oracle's."""


@dataclass
class Provider:
    """One column of a table.

    run: computes the output. calls: how many runs one timing covers; repeats: how often one run does the work; times
    are of one. tokens: what goes through it. rounds: turns it takes part in at most, for a slow one (None: all). peer:
    the name of the peer that this is one size of, if it is. check: overrides the case's check, for a provider that
    gives something else (a mean where others give cells).
    """

    run: Callable[[], object]
    calls: int = 0
    tokens: int = 0
    repeats: int = 1
    rounds: int | None = None
    check: Callable[[object], float] | None = None
    note: str = ""
    peer: str = ""


@dataclass
class Case:
    """What is measured: providers by name, the check that gives an output's error, and the work that it stands for.

    calls, tokens: of providers that have none of their own.
    """

    op: str
    name: str
    providers: dict[str, Provider] = field(default_factory=dict)
    check: Callable[[object], float] = lambda _: math.inf
    tolerance: float = 0.0
    shape: str = ""
    dtype: str = "fp32"
    work: float = 0.0
    work_unit: str = "FLOP"
    formula: str = ""
    rounds: int = 5
    calls: int = 1
    tokens: int = 0
    warm_up: Callable[[], object] | None = None


@dataclass
class Turns:
    """The timings of a case, collected turn by turn."""

    case: Case
    device: str = "cpu"
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def warm_up(self) -> None:
        """The case's own warm-up, or a turn that is not kept."""
        if self.case.warm_up is not None:
            self.case.warm_up()
        else:
            for name, provider in self.case.providers.items():
                self._check(name, provider, provider.run())

    def turn(self, deadline: float | None = None) -> None:
        """Every provider once, timed and checked; past the deadline none begins any more, but for the very first."""
        if not self.count:
            gc.collect()  # once, for it takes longer than a small case: memory is read in the first turn
        names = list(self.case.providers)
        first = self.count % len(names)
        for name in names[first:] + names[:first]:
            provider = self.case.providers[name]
            if (provider.rounds is not None and self.count >= provider.rounds) or self._slower(provider, name):
                continue
            if self.seconds and deadline is not None and time.monotonic() > deadline:
                continue
            calls = provider.calls or self.case.calls
            read = contextlib.nullcontext() if self.count else _peak_memory(self.device)
            synchronise(self.device)
            with read as memory:
                started = time.perf_counter()
                for _ in range(calls - 1):
                    provider.run()
                output = provider.run()
                synchronise(self.device)
                took = (time.perf_counter() - started) / (calls * provider.repeats)
            if memory is not None:
                self.peak[name] = memory.bytes
            self._check(name, provider, output)
            self.seconds.setdefault(name, []).append(took)
        self.count += 1

    def _slower(self, provider: Provider, name: str) -> bool:
        if not (self.count and provider.peer):
            return False
        sizes = [other for other, of in self.case.providers.items() if of.peer == provider.peer]
        first = {size: self.seconds[size][0] for size in sizes if size in self.seconds}
        return name in first and first[name] > min(first.values())

    def _check(self, name: str, provider: Provider, output: object) -> None:
        error = float((provider.check or self.case.check)(output))
        if not error <= self.case.tolerance:
            raise Disagreement(
                f"{self.case.op}, {self.case.name}: {name}: expected within {self.case.tolerance:.3g} of the oracle, "
                f"got {error:.3g}; no time is worth keeping"
            )
        self.error[name] = max(error, self.error.get(name, 0.0))

    def rows(self, where: Environment | None = None) -> list[Row]:
        """A row for each provider that was timed."""
        where, case = where or environment(self.device), self.case
        rows = []
        for name, provider in case.providers.items():
            if name not in self.seconds:
                continue
            p20, p50, p80 = quantiles(self.seconds[name])
            made = Row(
                op=case.op, case=case.name, provider=name, dtype=case.dtype, shape=case.shape,
                rounds=len(self.seconds[name]), p20_s=p20, p50_s=p50, p80_s=p80, peak_bytes=self.peak.get(name, -1),
                tokens=provider.tokens or case.tokens, work=float(case.work),
                work_unit=case.work_unit if case.work else "", formula=case.formula, error=self.error[name],
                tolerance=case.tolerance, note=provider.note, environment=where,
            )  # fmt: skip
            rows.append(made)
        return rows


def run_case(case: Case, device: str = "cpu", deadline: float | None = None) -> list[Row]:
    """Warm up, take turns until the case's rounds or the deadline (`time.monotonic`), return the rows."""
    turns = Turns(case, device)
    turns.warm_up()
    for _ in range(case.rounds):
        turns.turn(deadline)
        if deadline is not None and time.monotonic() > deadline:
            break
    return turns.rows()


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """(p20, median, p80); the outer ones by the nearest rank."""
    ordered = sorted(values)
    rank = lambda q: ordered[max(0, math.ceil(q * len(ordered)) - 1)]
    return rank(0.2), statistics.median(ordered), rank(0.8)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class _Memory:
    bytes: int = -1


@contextlib.contextmanager
def _peak_memory(device: str):
    """Gives an object whose `bytes` is the peak above what was held before, once the block is left; -1 if unknown."""
    memory = _Memory()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield memory
        memory.bytes = torch.cuda.max_memory_allocated() - before
        return
    before = _reset_resident_peak()
    yield memory
    if before is not None:
        memory.bytes = max(0, _status("VmHWM") - before)


def _reset_resident_peak() -> int | None:
    """Give freed memory back, forget the peak; the resident bytes now, None where Linux does not let us."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024
