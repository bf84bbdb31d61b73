"""One server and one finished run for all tests of this folder."""

from __future__ import annotations

import pytest

from tests.endurance.jobs import JOBS, prepare
from tests.endurance.server import Server


@pytest.fixture(scope="session")
def server():
    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def run(server, tmp_path_factory):
    """The folder of a finished run of two tasks."""
    here = tmp_path_factory.mktemp("run")
    found = server.run("sequence", here, here)
    assert found["rc"] == 0, found["err"]
    return here / "out"


@pytest.fixture(scope="session")
def unbroken(server, run, tmp_path_factory):
    """By job: (what it ends with when nothing happens, how many file calls that takes)."""
    made = {}

    def of(job):
        if job not in made:
            here = tmp_path_factory.mktemp(job)
            prepare(here)
            found = server.run(job, here, run)
            assert found["rc"] == 0, found["err"]
            made[job] = JOBS[job].result(here), found["events"]
        return made[job]

    return of
