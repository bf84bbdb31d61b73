"""What only the Triton kernels have, under the interpreter: views in NaN, memory bounds, descriptors, schedules.

Values of every option are in test_tree_attention.py and test_linear_logprob.py, which run on each backend.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.9", reason="Triton's older interpreters know no `range` of loaded numbers")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

import sapo_kernels as sk
from sapo_kernels.linear_logprob import triton as kernel
from sapo_kernels.linear_logprob.triton import linear_logprob_triton
from sapo_kernels.tree_attention.triton import tree_attention_triton
from tests.kernels.test_linear_logprob import inputs, written_out
from tests.tolerances import assert_close
from tests.triton_cases import chain, layout

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    # numpy, under the interpreter, comments on inf - inf and log(0); the kernels mean them.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

ROOT = Path(__file__).resolve().parents[2]


def test_attention_refuses():
    (part,) = chain(4).passes()
    q = torch.zeros(4, 1, 16)
    rest = (*layout(part), None, 1.0, None, None, 64, False)
    with pytest.raises(TypeError, match="float64"):
        tree_attention_triton(q.double(), q.double(), q.double(), *rest)
    with pytest.raises(ValueError, match="stride"):
        tree_attention_triton(q, q, torch.zeros(4, 1, 32)[..., ::2], *rest)
    with pytest.raises(ValueError, match="head_dim"):
        tree_attention_triton(*[torch.zeros(4, 1, 520)] * 3, *rest)


@pytest.mark.parametrize(
    "case",
    [(17, 32, 33, {"owned": (3, 0)}), (9, 24, 70, {"bias": True, "softcap": 2.0}), (20, 96, 200, {})],
    ids=["tiles", "options", "bf16"],
)
def test_logprob_through_descriptors(case, monkeypatch):
    """The interpreter takes them where their hardware is not."""
    low = case[0] == 20
    hidden, weight, targets, given = inputs(case, torch.bfloat16 if low else torch.float32, "cpu")
    monkeypatch.setattr(kernel, "describes", lambda *_: True)
    got = sk.linear_logprob(hidden, weight, targets, impl="triton", **given)
    plain = written_out(hidden, weight, targets, given, torch.bfloat16) if low else (None, None)
    for ours, exact, same in zip(got, written_out(hidden, weight, targets, given), plain, strict=True):
        assert_close("linear_logprob low" if low else "linear_logprob fp32", ours, exact, same)


def test_descriptors_are_for_aligned_rows_on_their_hardware():
    weight = torch.zeros(8, 64, dtype=torch.bfloat16)
    hidden = torch.zeros(9, 72, dtype=torch.bfloat16)
    assert [kernel.describes(hidden[:, :64], weight, part) for part in (0, 80, 90, 100, 120)] == [
        False, False, True, True, False,
    ]  # fmt: skip
    assert not kernel.describes(hidden.float(), weight.float(), 90)
    assert not kernel.describes(hidden[:, 1:65], weight, 90), "begins off a 16-byte border"
    assert not kernel.describes(torch.zeros(9, 65, dtype=torch.bfloat16)[:, :64], weight, 90)


def test_logprob_bits_do_not_depend_on_the_batch(monkeypatch):
    """Rows alone, shuffled, in slabs and under any schedule: the same bits."""
    monkeypatch.setattr(kernel, "MAX_CHUNKS", 5)
    hidden, weight, targets, given = inputs((40, 24, 500, {"owned": (2,)}), torch.float32, "cpu")
    ptr = given["target_ptr"]
    # On this grid every product and sum is exact: the interpreter's matrix product is numpy's, whose order of summation
    # depends on where a row lies in the tile. Log-sum-exp is not exact, and its order is what is tested.
    hidden, weight = (hidden * 4).round() / 4, (weight * 16).round() / 16
    whole, lse, _ = linear_logprob_triton(hidden, weight, targets, ptr, None, 1.0, None)
    exact = written_out(hidden, weight, targets, given)
    for got, expected in zip((whole, lse), exact, strict=True):
        assert_close("linear_logprob fp32", got, expected)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = linear_logprob_triton(hidden[order], weight, targets.view(40, 2)[order].flatten(), ptr, None, 1.0, None)
    assert torch.equal(shuffled[0].view(40, 2), whole.view(40, 2)[order]) and torch.equal(shuffled[1], lse[order])

    alone = linear_logprob_triton(hidden[3:4], weight, targets[6:8], ptr[:2], None, 1.0, None)
    assert torch.equal(alone[0], whole[6:8]) and torch.equal(alone[1], lse[3:4])

    monkeypatch.setattr(kernel, "SLAB_ROWS", 16)
    monkeypatch.setattr(kernel, "chunks_per_split", lambda *_: 2)
    other = linear_logprob_triton(hidden, weight, targets, ptr, None, 1.0, None)
    assert torch.equal(other[0], whole) and torch.equal(other[1], lse)


def test_logprob_target_outside_the_vocabulary_is_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", torch.zeros)  # old memory can hold plausible numbers
    hidden, weight, targets, given = inputs((3, 8, 40, {}), torch.float32, "cpu")
    targets[1], targets[2] = 40, -1
    got, lse, _ = linear_logprob_triton(hidden, weight, targets, given["target_ptr"], None, 1.0, None)
    assert torch.isfinite(got[0]) and torch.isnan(got[1:]).all() and torch.isfinite(lse).all()


def test_logprob_schedule():
    """How many chunks a program takes: any number in range, all processors busy, few enough row tiles for the cache."""
    for tiles, chunks, processors in ((1, 1, 132), (1, 238, 132), (128, 238, 132), (8, 3, 4), (128, 250, 304)):
        assert 1 <= kernel.chunks_per_split(tiles, chunks, 128 * 4096 * 2, processors) <= chunks
    assert kernel.chunks_per_split(1, 238, 1 << 20, 132) == 1
    # 128 row tiles of 1 MiB: about 24 of them at a time, so about 6 programs share one.
    assert 5 <= 238 / kernel.chunks_per_split(128, 238, 1 << 20, 132) <= 13


GUARDED = """
import ctypes, mmap, torch
from tests.triton_cases import branches, layout
from sapo_kernels.tree_attention.triton import tree_attention_backward_triton, tree_attention_triton
from sapo_kernels.linear_logprob.triton import linear_logprob_triton
libc, kept = ctypes.CDLL(None, use_errno=True), []

def guarded(t):
    # The tensor ends where an unreadable page begins.
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    room = -(-size // page) * page
    region = mmap.mmap(-1, room + page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert libc.mprotect(ctypes.c_void_p(base + room), page, 0) == 0
    kept.append(region)
    copy = torch.frombuffer(region, dtype=t.dtype, count=t.numel(), offset=room - size).view(t.shape)
    copy.copy_(t)
    return copy

plain_empty = torch.empty
torch.empty = lambda *a, **k: guarded(t) if (t := plain_empty(*a, **k)).numel() else t
for window in (None, 3):
    for part in branches(prompts=2, examples=2).passes(max_tokens=60, block_tokens=24):
        q, k, v = torch.randn(len(part.input_ids), 3, 24), *torch.randn(2, len(part.position), 1, 24)
        index = tuple(guarded(t) if t.numel() else t for t in layout(part))
        tensors = [guarded(t) for t in (q, k, v)]
        rest = (*index, guarded(torch.zeros(3)), 0.2, window, None, 24)
        out, lse = tree_attention_triton(*tensors, *rest, True)
        tree_attention_backward_triton(guarded(out), *tensors, out, lse, *rest)
for rows, width, vocab in ((17, 33, 65), (3, 16, 31)):
    tensors = torch.randn(rows, width), torch.randn(vocab, width), torch.arange(rows), torch.arange(rows + 1)
    linear_logprob_triton(*map(guarded, tensors), guarded(torch.zeros(vocab)), 1.0, None)
print("inside the bounds")
"""


OFFSETS = """
import mmap, torch
from tests.triton_cases import chain, layout
from sapo_kernels.tree_attention.triton import tree_attention_backward_triton, tree_attention_triton
from sapo_kernels.linear_logprob.triton import linear_logprob_triton

# Rows 2**30 elements apart in a mapping of which only the touched pages exist: 32-bit products would wrap.
apart = 2**30
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
region = mmap.mmap(-1, (3 * apart + 4096) * 4, flags=flags)
far = torch.frombuffer(region, dtype=torch.float32).as_strided((4, 1, 16), (apart, 16, 1))
near = torch.randn(4, 1, 16)
far.copy_(near)
rest = (*layout(chain(4).passes()[0]), None, 0.25, None, None, 64, True)
(out, lse), far_results = (tree_attention_triton(t, t, t, *rest) for t in (near, far))
gradients = (tree_attention_backward_triton(out, t, t, t, out, lse, *rest[:-1])[:3] for t in (far, near))
for got, want in (*zip(far_results, (out, lse), strict=True), *zip(*gradients, strict=True)):
    assert torch.equal(got, want)
rest = torch.arange(4), torch.arange(5), None, 1.0, None
for got, want in zip(*(linear_logprob_triton(t[:, 0], t[:, 0], *rest) for t in (far, near)), strict=True):
    assert torch.equal(got, want)
print("inside the bounds")
"""


@pytest.mark.parametrize("script", [GUARDED, OFFSETS], ids=["guard pages", "offsets past 2**31"])
def test_memory(script):
    """In a process of its own, because a failure is a crash."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "inside the bounds" in done.stdout, done.stderr[-2000:]
