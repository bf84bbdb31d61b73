"""tree_attention against SDPA with a dense mask, SDPA on every sequence apart, and FlexAttention (GPU)."""

from __future__ import annotations

import pytest
import torch

from .attention import make_case
from .workload import Cells

CASES = {
    # name: cells, (q heads, kv heads, head_dim)
    "4x8 prompts first": (Cells(4, 8, 60, 80), (8, 4, 64)),
    "4x8 prompts last": (Cells(4, 8, 60, 80, last=True), (8, 4, 64)),
    "4x4 long inputs": (Cells(4, 4, 60, 400), (8, 4, 64)),
    "4x8 head 128": (Cells(4, 8, 60, 80), (16, 8, 128)),
}
GPU_CASES = {
    "0.6B 16k tokens": (Cells(21, 8, 100, 80), (16, 8, 128)),
    "8B 16k tokens": (Cells(21, 8, 100, 80), (32, 8, 128)),
    "8B prompts last": (Cells(21, 24, 30, 300, last=True), (32, 8, 128)),
    "8B long inputs": (Cells(21, 4, 60, 400), (32, 8, 128)),
}
TOY = Cells(2, 3, 6, 10, 2)


@pytest.mark.parametrize("name", [*CASES, *GPU_CASES])
def test_tree_attention(name, recorder, benchmark):
    on_gpu = recorder.device == "cuda"
    if (name in GPU_CASES) != on_gpu:
        pytest.skip(f"a case for another device than {recorder.device}")
    cells, heads = {**CASES, **GPU_CASES}[name]
    if recorder.toy:
        cells, heads = TOY, (4, 2, 16)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    recorder.run(benchmark, make_case(cells, name, heads, dtype, recorder.device, rounds=2 if recorder.toy else 7))
