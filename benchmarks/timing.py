"""Providers of one case in turns: every output checked, every call timed, memory read once.

A turn runs every provider once, each time beginning with another one, so that what else happens on the machine hits
all of them. Of the sizes of one peer only the fastest goes on after the first turn. No time is kept of an output that
the check refuses.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .rows import Row, environment


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

    calls, tokens: of providers that have none of their own. warm_up: instead of one call of each. left_out: providers
    that could not take part, and why.
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
    clock: Callable[[], float] = time.perf_counter
    left_out: dict[str, Exception] = field(default_factory=dict)


def run_case(case: Case, device: str = "cpu", deadline: float = math.inf, say: Callable = print) -> list[Row]:
    """Warm up, take turns until the case's rounds or the deadline (`time.monotonic`); a row for each provider timed.

    A provider that raises or gives a wrong output is a finding about it: it is left out, with a line for `say`. If it
    is ours, it ends the case. Past the deadline no turn begins, but for the first; on a GPU, where late parts are ended
    by force, only ours takes part in it then.
    """
    names = list(case.providers)
    must = "ours" if "ours" in names else names[0]

    def late(turn: int, name: str) -> bool:
        return time.monotonic() > deadline and (turn > 0 or device == "cuda" and name != must)

    if case.warm_up is not None:
        case.warm_up()
    else:
        for name in names:
            if not late(0, name):
                _attempt(case, name, device, 1, must, say)
    gc.collect()  # once, for it takes longer than a small case: memory is read in the first turn
    seconds, errors, peaks = {}, {}, {}
    for turn in range(case.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            provider = case.providers[name]
            sizes = [n for n, other in case.providers.items() if other.peer == provider.peer and n in seconds]
            slower = turn and provider.peer and name in sizes and seconds[name][0] > min(seconds[n][0] for n in sizes)
            over = provider.rounds is not None and turn >= provider.rounds
            if slower or late(turn, name) or over or name in case.left_out:
                continue
            found = _attempt(case, name, device, provider.calls or case.calls, must, say, memory=not turn)
            if found is None:
                seconds.pop(name, None)
                continue
            took, held, error = found
            peaks.setdefault(name, held)
            errors[name] = max(error, errors.get(name, 0.0))
            seconds.setdefault(name, []).append(took)
    where, rows = environment(device), []
    for name in (name for name in names if name in seconds):
        provider, (p20, p50, p80) = case.providers[name], quantiles(seconds[name])
        rows.append(Row(
            op=case.op, case=case.name, provider=name, dtype=case.dtype, shape=case.shape, rounds=len(seconds[name]),
            p20_s=p20, p50_s=p50, p80_s=p80, peak_bytes=peaks[name], tokens=provider.tokens or case.tokens,
            work=float(case.work), work_unit=case.work_unit if case.work else "", formula=case.formula,
            error=errors[name], tolerance=case.tolerance, note=provider.note, environment=where,
        ))  # fmt: skip
    return rows


def _attempt(case: Case, name: str, device: str, calls: int, must: str, say, memory: bool = False):
    """(seconds a call, bytes of memory or -1, error) of some calls; None if the provider is left out from now on."""
    provider = case.providers[name]
    try:
        before = reset_peak(device) if memory else None
        synchronise(device)
        started = case.clock()
        for _ in range(calls):
            output = provider.run()
        synchronise(device)
        took = (case.clock() - started) / (calls * provider.repeats)
        held = -1 if before is None else max(0, peak(device) - before)
        error = float((provider.check or case.check)(output))
        if not error <= case.tolerance:
            raise Disagreement(f"expected within {case.tolerance:.3g} of the oracle, got {error:.3g}")
        return took, held, error
    except Exception as failure:  # of any library
        place = f"{case.op}, {case.name}: {name}"
        if name == must:
            failure.add_note(place)
            raise
        lines = str(failure).strip().splitlines() or ["no message"]
        say(f"{place}: left out: {type(failure).__name__}: {lines[0][:200]}")
        case.left_out[name] = failure
        return None


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """(p20, median, p80); the outer ones by the nearest rank."""
    ordered = sorted(values)
    rank = lambda q: ordered[max(0, math.ceil(q * len(ordered)) - 1)]
    return rank(0.2), statistics.median(ordered), rank(0.8)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> int | None:
    """Forget the peak of the memory and give what is held now, in bytes; None where Linux does not let us."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def peak(device: str) -> int:
    """Bytes that were held at most since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024
