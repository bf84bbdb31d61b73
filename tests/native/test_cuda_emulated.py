"""The CUDA kernels on a CPU: compiled by g++ against an emulator of warps, beside the CPU kernels.

This checks their logic (indices, order of sums, shuffles, bounds) where there is no GPU; the `gpu` tests of
test_reweight.py and test_accumulate.py check the compiled kernels themselves.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.reweight.prompt_state import DTYPES

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The library of both launchers, built for the CPU."""
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    sources = [CSRC / "cuda" / "reweight.cu", CSRC / "cuda" / "accumulate.cu", HERE / "cuda_emulator" / "driver.cpp"]
    done = subprocess.run(
        ["g++", "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-pthread",
         f"-I{HERE / 'cuda_emulator'}", "-x", "c++", *map(str, sources), "-o", str(library)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("prompts", [1, 2, 31, 32, 33, 70])
@pytest.mark.parametrize("choice", [(1.0, 0.0, 0.0), (0.9, 0.2, 0.1), (0.5, 1e-300, 1.0), (0.0, 3.0, 0.0)])
def test_reweight(emulated, prompts, choice):
    decay, temperature, floor = choice
    generator = torch.Generator().manual_seed(prompts)
    # Six pools are two blocks of warps, the second one not full.
    states = [sk.PromptState(6, prompts), sk.PromptState(6, prompts)]
    live = torch.rand(6, prompts, generator=generator) < 0.8
    live[5] = False
    for state in states:
        state.live.copy_(live)
    for step in range(4):
        tokens = torch.randint(0, 9, (6, prompts), generator=generator)
        nll = (torch.rand(6, prompts, generator=generator) * 8).round().double() * tokens
        nll[torch.rand(6, prompts, generator=generator) < 0.1] = (math.nan, math.inf, -math.inf, 1e308)[step]
        ours, other = states
        sk.reweight_(ours, nll, tokens, decay, temperature, floor)
        inverse = 1 / temperature if temperature else 0.0
        emulated.emulate_reweight(
            *(pointer(getattr(other, name)) for name in DTYPES), pointer(nll), pointer(tokens), ctypes.c_int64(6),
            ctypes.c_int64(prompts), ctypes.c_double(decay), ctypes.c_double(inverse), ctypes.c_double(floor),
        )  # fmt: skip
        for name in DTYPES:
            a, b = getattr(ours, name), getattr(other, name)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-300, equal_nan=True, msg=f"{name}, step {step}")
    assert states[0].best[5] == -1 and (prompts < 3 or (states[0].best[:5] >= 0).any())


def test_accumulate(emulated):
    """300 cells are three blocks; pieces of several sizes; a cell whose list does not fit is NaN and no other."""
    generator = torch.Generator().manual_seed(0)
    logprob = torch.randn(500, generator=generator)
    lists = [torch.randperm(500, generator=generator)[: n % 41].sort().values for n in range(300)]
    cell_ptr = torch.tensor([0, *np.cumsum([len(one) for one in lists])])
    cell_target = torch.cat(lists)
    sums = [(torch.zeros(300, dtype=torch.float64), torch.zeros(300, dtype=torch.int64)) for _ in range(2)]
    for start, stop in ((0, 1), (1, 200), (200, 200), (200, 499), (499, 500)):
        piece = logprob[start:stop].clone()
        sk.accumulate_(*sums[0], piece, cell_target, cell_ptr, start)
        call_accumulate(emulated, *sums[1], piece, cell_target, cell_ptr, start)
        assert torch.equal(sums[0][0], sums[1][0]) and torch.equal(sums[0][1], sums[1][1])
    assert torch.equal(sums[1][1], cell_ptr.diff())

    for spoil in (dict(tokens=-1), dict(tokens=99), dict(left_out=True)):
        nll, tokens = torch.zeros(300, dtype=torch.float64), torch.zeros(300, dtype=torch.int64)
        if "tokens" in spoil:
            tokens[7] = spoil["tokens"]
            call_accumulate(emulated, nll, tokens, logprob, cell_target, cell_ptr, 0)
            assert nll.isnan().nonzero().tolist() == [[7]] and tokens[7] == spoil["tokens"]
        else:
            call_accumulate(emulated, nll, tokens, logprob[250:].clone(), cell_target, cell_ptr, 250)
            early = torch.tensor([len(one) > 0 and int(one[0]) < 250 for one in lists])
            assert torch.equal(nll.isnan(), early) and 100 < early.sum() < 300
    for at, wrong in ((8, -1), (8, 10**15), (9, 0)):
        spoiled, nll = cell_ptr.clone(), torch.zeros(300, dtype=torch.float64)
        spoiled[at] = wrong
        call_accumulate(emulated, nll, torch.zeros(300, dtype=torch.int64), logprob, cell_target, spoiled, 0)
        assert 1 <= nll.isnan().sum() <= 2 and nll[at - 1].isnan()


def call_accumulate(emulated, nll, tokens, logprob, cell_target, cell_ptr, start):
    emulated.emulate_accumulate(
        *map(pointer, (nll, tokens, logprob, cell_target, cell_ptr)),
        *map(ctypes.c_int64, (len(nll), len(cell_target), start, len(logprob))),
    )
