"""linear_logprob against the full product with log-softmax, and the fused heads that are installed."""

from __future__ import annotations

import pytest
import torch

from .heads import make_case

# name: rows, vocabulary, hidden. On a CPU as many rows as wait for each other, and few.
CASES = {
    "V 32k": (512, 32000, 512),
    "V 50k": (512, 50257, 512),
    "V 152k": (256, 151936, 512),
    "V 256k": (256, 256000, 512),
    "few rows": (32, 50257, 512),
}
GPU_CASES = {
    "0.6B 4k rows": (4096, 151936, 1024),
    "8B 512 rows": (512, 151936, 4096),
    "8B 4k rows": (4096, 151936, 4096),
    "8B 16k rows": (16384, 151936, 4096),
    "V 256k": (4096, 256000, 2304),
    "V 32k": (4096, 32000, 4096),
}


@pytest.mark.parametrize("name", sorted({*CASES, *GPU_CASES}))
def test_linear_logprob(name, recorder, benchmark):
    on_gpu = recorder.device == "cuda"
    cases = GPU_CASES if on_gpu else CASES
    if name not in cases:
        pytest.skip(f"a case for another device than {recorder.device}")
    rows, vocabulary, hidden = (8, 300, 16) if recorder.toy else cases[name]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    recorder.run(
        benchmark, make_case(name, rows, vocabulary, hidden, dtype, recorder.device, rounds=2 if recorder.toy else 5)
    )
