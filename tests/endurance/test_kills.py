"""Killed at a file call, half way through a write too, and started again: the same bytes as a run that never was."""

from __future__ import annotations

import shutil
import signal

import pytest

from tests.endurance.jobs import JOBS, left_over, prepare
from tests.endurance.wire import spread


def slow(job: str, count: int):
    return pytest.param(job, count, marks=pytest.mark.slow)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("job, count", [
    ("train", 2), ("sequence", 2), ("score", 2), ("paraphrase", 6), ("export", 6), ("report", 3),
    slow("train", 150), slow("sequence", 120), slow("score", 35), slow("paraphrase", 120), slow("export", 40),
    slow("report", 5),
])  # fmt: skip
def test_killed_at_file_calls(server, run, unbroken, tmp_path, job, count):
    expected, events = unbroken(job)
    points, faults = spread(events, count), []
    for point in points:
        here = tmp_path / str(point)
        prepare(here)
        killed = server.run(job, here, run, stop=point)
        assert killed["rc"] == -signal.SIGKILL, killed
        # One that was killed when all was done need not be resumed; an export may not.
        whole = job == "export" and (here / "one").exists()
        again = {"rc": 0, "err": ""} if whole else server.run(job, here, run)
        left = left_over(here)
        if again["rc"] != 0 or JOBS[job].result(here) != expected or left:
            faults.append((point, again["rc"], again["err"][-300:], left))
        shutil.rmtree(here)
    same = len(points) - len(faults)
    print(f"\n{job}: killed at {len(points)} of {events} file calls, {same} went on to the same end")
    assert not faults
