"""Every case of `benchmarks.registry` under pytest-benchmark; ``python -m benchmarks`` runs it, op by op."""

from __future__ import annotations

import pytest

from . import ops  # noqa: F401
from .registry import OPS


def pytest_generate_tests(metafunc):
    chosen, setting = metafunc.config.getoption("--bench-op"), metafunc.config.bench_setting
    found = [(op, name) for op in chosen or OPS for name in OPS[op].names(setting)]
    metafunc.parametrize(("op", "name"), found, ids=[f"{op}-{name}" for op, name in found])


@pytest.mark.timeout(1200)
def test_case(op, name, recorder, benchmark):
    recorder.run(benchmark, op, name)
