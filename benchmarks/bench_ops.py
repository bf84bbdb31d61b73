"""The cases under pytest-benchmark, a benchmark for each provider: for its options that save, compare and plot.

    python -m pytest benchmarks/bench_ops.py -k linear_logprob --benchmark-group-by=param:name --benchmark-autosave
    SAPO_BENCH=toy python -m pytest benchmarks/bench_ops.py           # does it start? the figures mean nothing

The tables of the docs are made by ``python -m benchmarks``, where providers take turns; here one comes after another.
"""

from __future__ import annotations

import os

import pytest

from . import ops  # noqa: F401
from .registry import OPS, Setting

SETTING = Setting(toy=os.environ.get("SAPO_BENCH") == "toy")
# Whole models have one provider here: their peers take minutes.
CASES = [
    (op.name, name, provider)
    for op in OPS.values() for name in op.names(SETTING) for provider in op.providers or ("ours",)
]  # fmt: skip


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("op", "name", "provider"), CASES)
def test_case(op, name, provider, benchmark):
    if why := OPS[op].left_out(SETTING.device).get(provider):
        pytest.skip(why)
    case = OPS[op].build(name, SETTING, only=[provider])
    if provider not in case.providers:
        pytest.skip("it does not take this case")
    chosen = case.providers[provider]
    error = float((chosen.check or case.check)(chosen.run()))
    assert error <= case.tolerance, f"expected within {case.tolerance:.3g} of the oracle, got {error:.3g}"
    benchmark.pedantic(chosen.run, rounds=case.rounds, iterations=chosen.calls or case.calls)
