"""Options and fixtures of the benchmarks: ``python -m benchmarks`` runs them, see there."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from .rows import Row, append_rows
from .timing import Case, Turns
from .workload import data_folder


def pytest_addoption(parser):
    parser.addoption("--bench-size", choices=("full", "toy"), default="full", help="toy: seconds, figures mean nothing")
    parser.addoption("--bench-out", type=Path, default=None, help="folder for the CSV files (default: none is written)")
    parser.addoption("--bench-data", type=Path, default=None, help="folder with SUPERNI/ and paraphrases.json")
    parser.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption("--bench-scale", type=float, default=1.0, help="times as many examples as usual")
    parser.addoption("--bench-seconds", type=float, default=600.0, help="no case begins after that")


@dataclass
class Recorder:
    """Runs cases under pytest-benchmark and appends their rows."""

    toy: bool
    device: str
    data: Path
    out: Path | None
    deadline: float
    scale: float = 1.0
    rows: list[Row] = field(default_factory=list)

    def run(self, benchmark, case: Case) -> list[Row]:
        """A round of pytest-benchmark is one turn of every provider; each provider's own times are in the rows.

        Near the deadline it takes fewer rounds, but two at least.
        """
        if time.monotonic() > self.deadline:
            pytest.skip("no time left for this case")
        if self.toy:
            case.name = f"toy {case.name}"
        turns = Turns(case, self.device)
        turns.warm_up()
        started = time.monotonic()
        turns.turn()
        left = (self.deadline - time.monotonic()) / max(time.monotonic() - started, 1e-9)
        benchmark.pedantic(turns.turn, rounds=max(1, min(case.rounds - 1, int(left))), iterations=1, warmup_rounds=0)
        rows = turns.rows()
        for row in rows:
            benchmark.extra_info[row.provider] = {"p20_s": row.p20_s, "p50_s": row.p50_s, "p80_s": row.p80_s}
        if self.out is not None:
            append_rows(self.out / f"{case.op}.csv", rows)
        self.rows += rows
        return rows


def pytest_terminal_summary(terminalreporter, config):
    """Every case on a line: providers with their p50 and how many times ours that is."""
    recorder = config.stash.get(RECORDER, None)
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in recorder.rows if recorder else []:
        cases.setdefault((row.op, row.case), []).append(row)
    for (op, case), rows in cases.items():
        ours = next((row.p50_s for row in rows if row.provider == "ours"), None)
        shown = [f"{r.provider} {r.p50_s * 1e3:.4g} ms" + (f" ({r.p50_s / ours:.2f}x)" if ours else "") for r in rows]
        terminalreporter.write_line(f"{op}, {case}: {', '.join(shown)}")


RECORDER = pytest.StashKey()


@pytest.fixture(scope="session")
def recorder(request) -> Recorder:
    option = request.config.getoption
    if option("--bench-device") == "cpu" and option("--bench-size") == "toy":
        torch.set_num_threads(1)
    made = Recorder(
        toy=option("--bench-size") == "toy",
        device=option("--bench-device"),
        data=data_folder(option("--bench-data")),
        out=option("--bench-out"),
        deadline=time.monotonic() + option("--bench-seconds"),
        scale=option("--bench-scale"),
    )
    request.config.stash[RECORDER] = made
    return made
