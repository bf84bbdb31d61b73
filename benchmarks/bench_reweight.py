"""reweight_ against the same maths in eager torch and an empty call; ``python -m benchmarks.reweight`` says more."""

from __future__ import annotations

import pytest

from sapo_kernels import native

from .in_place import reweight_case

CASES = {"8x32": (8, 32), "1x21": (1, 21), "64x64": (64, 64)}


@pytest.mark.skipif(native.load("_C") != "loaded", reason="the compiled kernel is what is measured")
@pytest.mark.parametrize("name", CASES)
def test_reweight(name, recorder, benchmark):
    if recorder.device != "cpu":
        pytest.skip("timed on the CPU; on a GPU its launch is all there is to see (python -m benchmarks.gpu_suite)")
    recorder.run(benchmark, reweight_case(name, *CASES[name], rounds=2 if recorder.toy else 100))
