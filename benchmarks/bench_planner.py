"""plan_trie against the numpy planner; ``python -m benchmarks.planner`` says more."""

from __future__ import annotations

import pytest

from .in_place import planner_case

CASES = {"10 k tokens": 10_000, "100 k tokens": 100_000, "1 M tokens": 1_050_000}


@pytest.mark.parametrize("name", CASES)
def test_planner(name, recorder, benchmark):
    recorder.run(
        benchmark, planner_case(name, 2_000 if recorder.toy else CASES[name], rounds=2 if recorder.toy else 15)
    )
