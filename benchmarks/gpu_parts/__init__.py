"""The parts of the GPU suite: each a function that measures one thing, in a process of its own.

`PARTS` names them in the order in which they run, with their share of the time.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..registry import Setting
from ..rows import Row, append_rows
from ..timing import Case, run_case

NO_TIME = "not run: no time left"
# How lines of a log begin that are notes, and the last one.
NOTE, STATUS = "note: ", "status: "


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
    """What a part, or an operation on a CPU, is given.

    seconds: it should be done by then; a part is ended some time later. rows: file that they are added to. cases: names
    of those that are wanted (None: all). missed: what there was no time for.
    """

    setting: Setting
    seconds: float
    rows: Path
    cases: list[str] | None = None
    missed: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.deadline = time.monotonic() + self.seconds
        self.device, self.toy, self.data = self.setting.device, self.setting.toy, self.setting.data

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def emit(self, rows: list[Row]) -> None:
        """Rows, as soon as they are there: what comes later may fail."""
        rows = [dataclasses.replace(row, case=f"toy {row.case}") if self.toy else row for row in rows]
        append_rows(self.rows, rows)
        ours = next((row.p50_s for row in rows if row.provider == "ours"), None)
        shown = [
            f"{row.provider} {row.p50_s * 1e3:.4g} ms" + (f" ({row.p50_s / ours:.2f}x)" if ours else "")
            + (f" [{row.note}]" if row.note else "") for row in rows
        ]  # fmt: skip
        print(f"{rows[0].op}, {rows[0].case}: {', '.join(shown)}", flush=True)

    def say(self, line: str) -> None:
        """A line for the summary."""
        print(f"{NOTE}{line}", flush=True)

    def miss(self, what: str) -> None:
        """The same for something that there was no time for."""
        self.missed.append(what)
        self.say(f"no time for {what}")


def run_part(name: str, job: Job) -> None:
    """Run a part in this process; the last line that it prints says how it ended.

    "passed"; "passed in part: no time for N things"; "skipped: WHY"; "not run: no time left" if it measured nothing.
    """
    (where, _, ops), status = PARTS[name], "passed"
    module, _, function = where.partition(".")
    try:
        getattr(importlib.import_module(f"{__name__}.{module}"), function)(job, *ops)
    except Skipped as why:
        status = f"skipped: {why}"
    if status == "passed" and job.missed:
        status = f"passed in part: no time for {len(job.missed)} things" if job.rows.exists() else NO_TIME
    print(f"{STATUS}{status}", flush=True)


def measured(job: Job, case: Case) -> list[Row]:
    """The rows of a case, written; a line for each provider that was left out or not reached in time."""
    rows = run_case(case, job.device, job.deadline, job.say)
    for name in case.providers.keys() - case.left_out.keys() - {row.provider for row in rows}:
        job.miss(f"{case.op}, {case.name}: {name}")
    job.emit(rows)
    return rows
