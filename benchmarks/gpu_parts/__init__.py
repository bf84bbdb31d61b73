"""The parts of the GPU suite: each a function that measures one thing, in a process of its own.

`PARTS` names them in the order in which they run, with their share of the time and what they show.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from dataclasses import dataclass, field
from pathlib import Path

from sapo_kernels.files import atomic_write

from ..rows import Row, append_rows
from ..timing import Case, run_case, synchronise

NO_TIME = "not run: no time left"


class Skipped(Exception):
    """A part cannot do its job on this machine, through no fault of the project's: the message says what is lacking."""


@dataclass(frozen=True)
class Part:
    """where: "module.function" of this package. share: of the suite's time. ops: what the function is given."""

    where: str
    share: float
    about: str
    ops: tuple[str, ...] = ()


PARTS = {
    "build": Part("machine.build", 0.08, "compile the native modules, CUDA kernels included"),
    "ceilings": Part("machine.ceilings", 0.04, "what copying and bf16 matrix products reach on this device"),
    "tests": Part("machine.tests", 0.14, "pytest -m gpu"),
    "tree_attention": Part(
        "measure.operators",
        0.09,
        "against FlexAttention and SDPA, backward too",
        ("tree_attention", "tree_attention_backward"),
    ),
    "linear_logprob": Part(
        "measure.operators", 0.09, "against cuBLAS and fused heads", ("linear_logprob", "linear_logprob_backward")
    ),
    "in_place": Part("measure.operators", 0.03, "accumulate_ and reweight_", ("accumulate", "reweight")),
    "small_model": Part("models.small", 0.13, "end to end, 0.6B shape, every peer; kernel counts"),
    "large_model": Part("models.large", 0.18, "end to end, 8B shape, peers; K=21, M=250 alone"),
    "training": Part("models.training", 0.06, "a LoRA step of the 8B shape over a trie, beside padded rows"),
    "configs": Part("measure.configurations", 0.10, "kernel configurations, the one in use first"),
    "sanitizer": Part("machine.sanitizer", 0.06, "compute-sanitizer over every kernel"),
}


@dataclass
class Job:
    """What a part is given: where to measure, how long, where to write.

    seconds: the part should be done by then; it is ended some time later. lines: what it says in the summary. missed:
    what it had no time for.
    """

    device: str
    toy: bool
    seconds: float
    out: Path
    name: str
    data: Path | None = None
    started: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    @property
    def deadline(self) -> float:
        return self.started + self.seconds

    def emit(self, rows: list[Row]) -> None:
        """Rows, as soon as they are there: what comes later may fail."""
        rows = [dataclasses.replace(row, case=f"toy {row.case}") if self.toy else row for row in rows]
        append_rows(self.out / "rows" / f"{self.name}.csv", rows)
        for row in rows:
            rate = f", {row.work / row.p50_s / 1e12:.3g} T{row.work_unit}/s" if row.work else ""
            print(f"{row.op}, {row.case}: {row.provider} {row.p50_s * 1e3:.4g} ms{rate}", flush=True)

    def say(self, line: str) -> None:
        """A line for the summary."""
        self.lines.append(line)
        print(line, flush=True)
        (self.out / "notes").mkdir(parents=True, exist_ok=True)
        atomic_write(self.out / "notes" / f"{self.name}.txt", "\n".join(self.lines) + "\n")

    def miss(self, what: str) -> None:
        """The same for something that there was no time for."""
        self.missed.append(what)
        self.say(f"no time for {what}")


def run_part(job: Job) -> str:
    """Run the part that `job` names, in this process, and give its status, which also goes to ``OUT/status/NAME.txt``.

    "passed"; "passed in part: no time for N things"; "skipped: WHY"; "not run: no time left" if it measured nothing.
    """
    part, status = PARTS[job.name], "passed"
    try:
        module, _, function = part.where.partition(".")
        getattr(importlib.import_module(f"{__name__}.{module}"), function)(job, *part.ops)
    except Skipped as why:
        status = f"skipped: {why}"
    if status == "passed" and job.missed:
        measured = (job.out / "rows" / f"{job.name}.csv").exists()
        status = f"passed in part: no time for {len(job.missed)} things" if measured else NO_TIME
    (job.out / "status").mkdir(parents=True, exist_ok=True)
    atomic_write(job.out / "status" / f"{job.name}.txt", status)
    return status


# A first run also warms up, so a size is given up only if it takes so many times as long as its peer's fastest.
SLOWER = 1.5


def settle(job: Job, case: Case, must: str = "ours") -> list[str]:
    """Run every provider once, which is its warm-up too, and leave out, with a line each, those that cannot take part.

    What a peer raises (out of memory, a kernel that does not compile) is a finding about the peer; what `must` raises,
    or an output of it that is wrong, ends the part. Of a peer's sizes those go that are far from its fastest.
    Returns the names of the providers whose output was wrong.
    """
    place, wrong, took = f"{case.op}, {case.name}", [], {}
    for name, provider in list(case.providers.items()):
        if name != must and job.left <= 0:
            job.miss(f"{place}: {name}")
            del case.providers[name]
            continue
        began = time.monotonic()
        try:
            output = provider.run()
            synchronise(job.device)
            took[name] = time.monotonic() - began
            error = float((provider.check or case.check)(output))
        except Exception as failure:  # see above
            if name == must:
                raise
            lines = str(failure).strip().splitlines() or ["no message"]
            job.say(f"{place}: {name} does not run: {type(failure).__name__}: {lines[0][:200]}")
            del case.providers[name]
            continue
        if error <= case.tolerance:
            continue
        what = f"{place}: {name}: expected within {case.tolerance:.3g} of the oracle, got {error:.3g}"
        if name == must:
            raise RuntimeError(what)
        job.say(f"{what}; left out")
        wrong.append(name)
        del case.providers[name]
    for name, provider in list(case.providers.items()):
        best = min(took[other] for other, of in case.providers.items() if of.peer == provider.peer)
        if provider.peer and took[name] > SLOWER * best:
            job.say(f"{place}: {name}: {took[name]:.3g} s, another size {best:.3g} s; left out")
            del case.providers[name]
    case.warm_up = lambda: None
    return wrong


def measured(job: Job, case: Case) -> list[Row]:
    """The rows of a settled case; a line for each provider that was not reached in time."""
    rows = run_case(case, job.device, job.deadline)
    for name in case.providers.keys() - {row.provider for row in rows}:
        job.miss(f"{case.op}, {case.name}: {name}")
    return rows
