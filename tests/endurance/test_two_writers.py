"""Two writers on one output: the second is refused in a line, the first ends as if it had been alone."""

from __future__ import annotations

import signal

import pytest

from tests.endurance.jobs import JOBS, prepare


@pytest.mark.parametrize("job", JOBS)
def test_the_second_is_refused(server, run, unbroken, tmp_path, job):
    expected, events = unbroken(job)
    prepare(tmp_path / "here")
    # Somewhere in the middle it stands still.
    stopped = server.run(job, tmp_path / "here", run, stop=max(2, events // 2), sent=signal.SIGSTOP)
    assert "stopped" in stopped, stopped
    try:
        second = server.run(job, tmp_path / "here", run)
    finally:
        first = server.go_on(stopped["stopped"])
    errors = [line for line in second["err"].splitlines() if line.startswith("sapo: error: ")]
    assert second["rc"] == 2 and len(errors) == 1 and "another process is writing here" in errors[0], second
    assert first["rc"] == 0 and JOBS[job].result(tmp_path / "here") == expected, first["err"]
