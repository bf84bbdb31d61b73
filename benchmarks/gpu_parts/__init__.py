"""The parts of the GPU suite: each a function that measures one thing, in a process of its own.

`PARTS` names them in the order in which they run, with their share of the time.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from dataclasses import dataclass, field
from pathlib import Path

from sapo_kernels.files import atomic_write

from ..rows import Row, append_rows
from ..timing import Case, run_case

NO_TIME = "not run: no time left"


class Skipped(Exception):
    """A part cannot do its job on this machine, through no fault of the project's: the message says what is lacking."""


# Name: ("module.function" of this package, share of the suite's time, operations that the function is given).
PARTS: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "build": ("machine.build", 0.08, ()),
    "ceilings": ("machine.ceilings", 0.04, ()),
    "tests": ("machine.tests", 0.14, ()),
    "tree_attention": ("measure.operators", 0.09, ("tree_attention", "tree_attention_backward")),
    "linear_logprob": ("measure.operators", 0.09, ("linear_logprob", "linear_logprob_backward")),
    "in_place": ("measure.operators", 0.03, ("accumulate", "reweight")),
    "small_model": ("models.small", 0.13, ()),
    "large_model": ("models.large", 0.18, ()),
    "training": ("models.training", 0.06, ()),
    "configs": ("measure.configurations", 0.10, ()),
    "sanitizer": ("machine.sanitizer", 0.06, ()),
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
    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.deadline = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def write(self, kind: str, text: str) -> None:
        """OUT/KIND/NAME.txt."""
        (self.out / kind).mkdir(parents=True, exist_ok=True)
        atomic_write(self.out / kind / f"{self.name}.txt", text)

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
        self.write("notes", "\n".join(self.lines) + "\n")

    def miss(self, what: str) -> None:
        """The same for something that there was no time for."""
        self.missed.append(what)
        self.say(f"no time for {what}")


def run_part(job: Job) -> None:
    """Run the part that `job` names, in this process; how it ended goes to ``OUT/status/NAME.txt``.

    "passed"; "passed in part: no time for N things"; "skipped: WHY"; "not run: no time left" if it measured nothing.
    """
    (where, _, ops), status = PARTS[job.name], "passed"
    module, _, function = where.partition(".")
    try:
        getattr(importlib.import_module(f"{__name__}.{module}"), function)(job, *ops)
    except Skipped as why:
        status = f"skipped: {why}"
    if status == "passed" and job.missed:
        measured = (job.out / "rows" / f"{job.name}.csv").exists()
        status = f"passed in part: no time for {len(job.missed)} things" if measured else NO_TIME
    job.write("status", status)


def measured(job: Job, case: Case) -> list[Row]:
    """The rows of a case, written; a line for each provider that was left out or not reached in time."""
    rows = run_case(case, job.device, job.deadline, job.say)
    for name in case.providers.keys() - case.left_out.keys() - {row.provider for row in rows}:
        job.miss(f"{case.op}, {case.name}: {name}")
    job.emit(rows)
    return rows
