"""Options and fixtures of the benchmarks: ``python -m benchmarks`` runs them, see there."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from .registry import OPS, Setting
from .rows import Row, append_rows
from .timing import Turns
from .workload import data_folder


def pytest_addoption(parser):
    parser.addoption("--bench-op", nargs="*", help="operations (default: all)")
    parser.addoption("--bench-size", choices=("full", "toy"), default="full", help="toy: seconds, figures mean nothing")
    parser.addoption("--bench-out", type=Path, default=None, help="folder for the CSV files (default: none is written)")
    parser.addoption("--bench-data", type=Path, default=None, help="folder with SUPERNI/ and paraphrases.json")
    parser.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption("--bench-base", default=None, help="a real model for the races")
    parser.addoption("--bench-scale", type=float, default=1.0, help="times as many examples as usual")
    parser.addoption("--bench-seconds", type=float, default=600.0, help="no case begins after that")


def pytest_configure(config):
    option = config.getoption
    config.bench_setting = Setting(
        option("--bench-device"), option("--bench-size") == "toy", data_folder(option("--bench-data")),
        option("--bench-scale"), base=option("--bench-base"),
    )  # fmt: skip


@dataclass
class Recorder:
    """Runs cases under pytest-benchmark and appends their rows."""

    setting: Setting
    out: Path | None
    deadline: float
    rows: list[Row] = field(default_factory=list)

    def run(self, benchmark, op: str, name: str) -> None:
        """A round of pytest-benchmark is one turn of every provider; each provider's own times are in the rows.

        Near the deadline it takes fewer rounds, but two at least.
        """
        if time.monotonic() > self.deadline:
            pytest.skip("no time left for this case")
        case = OPS[op].build(name, self.setting)
        if self.setting.toy:
            case.name, case.rounds = f"toy {name}", 2
        turns = Turns(case, self.setting.device)
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


def pytest_terminal_summary(terminalreporter, config):
    """Every case on a line: providers with their p50 and how many times ours that is."""
    recorder = config.stash.get(RECORDER, None)
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in recorder.rows if recorder else []:
        cases.setdefault((row.op, row.case), []).append(row)
    for (op, case), rows in cases.items():
        ours = next((row.p50_s for row in rows if row.provider == "ours"), None)
        shown = [
            f"{r.provider} {r.p50_s * 1e3:.4g} ms{f' ({r.p50_s / ours:.2f}x)' if ours else ''}"
            + (f" [{r.note}]" if r.note else "")
            for r in rows
        ]
        terminalreporter.write_line(f"{op}, {case}: {', '.join(shown)}")


RECORDER = pytest.StashKey()


@pytest.fixture(scope="session")
def recorder(request) -> Recorder:
    option, setting = request.config.getoption, request.config.bench_setting
    if setting.device == "cpu" and setting.toy:
        torch.set_num_threads(1)
    made = Recorder(setting, option("--bench-out"), time.monotonic() + option("--bench-seconds"))
    request.config.stash[RECORDER] = made
    return made
