"""The Triton kernels under the interpreter against the float64 oracles: values, bounds, non-finite numbers, bits.

Dropped on purpose: the cross product of options; each option has a case, and one case has all of them.
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

from sapo_kernels.linear_logprob import triton as logprob_kernel
from sapo_kernels.linear_logprob.reference import linear_logprob_reference
from sapo_kernels.linear_logprob.triton import linear_logprob_triton
from sapo_kernels.tree_attention import triton as attention_kernel
from sapo_kernels.tree_attention.reference import tree_attention_backward_reference, tree_attention_reference
from sapo_kernels.tree_attention.triton import tree_attention_backward_triton, tree_attention_triton
from tests.tolerances import assert_close
from tests.triton_cases import attention_oracle, branches, chain, layout, plain_attention, poisoned

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    # numpy, under the interpreter, comments on inf - inf and log(0); the kernels mean them.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
NAN, INF = float("nan"), float("inf")


def check(op: str, got, plain, want, dtype) -> None:
    """The row of tests.tolerances for `op` in `dtype`."""
    low = dtype != torch.float32
    assert_close(f"{op} {'low' if low else 'fp32'}", got, want, plain if low else None)


def make_attention(part, dtype, heads, dims, sinks):
    """Random q, k, v and sinks (or None) for a pass."""
    generator = torch.Generator().manual_seed(len(part.position))
    group, kv_heads = heads
    q = torch.randn(len(part.input_ids), group * kv_heads, dims[0], generator=generator).to(dtype)
    k, v = (torch.randn(len(part.position), kv_heads, d, generator=generator).to(dtype) for d in dims)
    return q, k, v, torch.randn(group * kv_heads, generator=generator) * 2 if sinks else None


def attend(part, dtype=torch.float32, heads=(2, 1), dims=(16, 16), sinks=False, gain=1.0, strides=None, **options):
    """Random tensors for a pass; returns (kernel, plain torch, oracle)."""
    q, k, v, sink = make_attention(part, dtype, heads, dims, sinks)
    q = q * gain
    scale, window, softcap = dims[0] ** -0.5, options.get("window"), options.get("softcap")
    inputs = (q, k, v) if strides is None else tuple(poisoned(t, strides) for t in (q, k, v))
    arguments = (*inputs, *layout(part), sink, scale, window, softcap, part.block_tokens)
    got, lse = tree_attention_triton(*arguments, True)
    alone, none = tree_attention_triton(*arguments, False)
    rest = (part, sink, scale, window, softcap)
    assert got.dtype == dtype and got.shape == (*q.shape[:2], dims[1]) and torch.equal(got, alone) and not len(none)
    want, want_lse = attention_oracle(q, k, v, *rest)
    assert lse.dtype == torch.float32
    # Their precision is that of the largest product, whatever the sum of products comes to.
    assert_close("linear_logprob extreme" if gain > 1e3 else "linear_logprob fp32", lse, want_lse)
    return got, plain_attention(q, k, v, *rest), want


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 127])
def test_attention_chain_lengths(length):
    (part,) = chain(length).passes()
    check("tree_attention", *attend(part), torch.float32)


ATTENTION = {
    "group 1": {"heads": (1, 2)},
    "group 3, head 80": {"heads": (3, 1), "dims": (80, 80)},
    "group 8": {"heads": (8, 1)},
    "values narrower than keys": {"dims": (24, 16)},
    "values wider than keys": {"dims": (16, 40)},
    "window 1 sees itself only": {"window": 1},
    "window 7": {"window": 7},
    "window longer than any path": {"window": 1000},
    "softcap, large logits": {"softcap": 5.0, "gain": 100.0},
    "sinks": {"sinks": True},
    "everything": {"heads": (3, 2), "dims": (24, 16), "window": 9, "softcap": 3.0, "sinks": True, "strides": "rows"},
    "gaps around every row": {"strides": "rows"},
    "head-major": {"strides": "heads"},
    "logits of 1e4": {"gain": 1e4},
    "bfloat16": {"dtype": torch.bfloat16, "heads": (4, 1), "dims": (32, 32)},
    "float16": {"dtype": torch.float16, "heads": (2, 2), "window": 11, "sinks": True},
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case):
    options = {"dtype": torch.float32, **ATTENTION[case]}
    (part,) = branches().passes(block_tokens=16)
    check("tree_attention", *attend(part, **options), options["dtype"])


def test_attention_with_carried_keys():
    parts = branches(seed=3).passes(max_tokens=40, block_tokens=8)
    assert any(part.carried for part in parts)
    for part in parts:
        check("tree_attention", *attend(part, heads=(3, 1), window=13), torch.float32)


def test_attention_one_group_over_many_tiles():
    """More (token, head) rows in a block than a tile holds, and a head group larger than a tile."""
    (part,) = branches(prompts=1, examples=2).passes(block_tokens=64)
    check("tree_attention", *attend(part, heads=(37, 1)), torch.float32)


@pytest.mark.parametrize("case", ["everything", "head-major", "bfloat16"])
def test_attention_gradients_of_strided_inputs(case):
    """Views into buffers of NaN, a group of heads larger than a tile: as plain torch has it."""
    options = {"dtype": torch.float32, "dims": (24, 16), "strides": "rows", **ATTENTION[case], "heads": (37, 1)}
    (part,) = branches(prompts=2, examples=2).passes(block_tokens=16)
    q, k, v, sinks = make_attention(part, **{n: options.get(n) for n in ("dtype", "heads", "dims", "sinks")})
    scale, window, softcap = 0.3, options.get("window"), options.get("softcap")
    rest = (*layout(part), sinks, scale, window, softcap, part.block_tokens)
    views = [poisoned(t, options["strides"]) for t in (q, k, v)]
    out, lse = tree_attention_triton(*views, *rest, True)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(q.dtype)
    got = [tree_attention_backward_triton(up, *views, out, lse, *rest) for _ in range(2)]
    wide = [t.double() for t in (q, k, v)]
    wide_rest = (*layout(part), None if sinks is None else sinks.double(), *rest[6:])
    want = tree_attention_backward_reference(up.double(), *wide, None, None, *wide_rest)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    plain = torch.autograd.grad(plain_attention(*leaves, part, sinks, scale, window, softcap), leaves, up)
    for ours, again, exact, theirs in zip(*got, want, (*plain, None), strict=True):
        assert exact is None or torch.equal(ours, again), "the same bits each time"
        if theirs is not None:
            check("tree_attention gradient", ours, theirs, exact, q.dtype)
        elif exact is not None:
            assert_close("tree_attention gradient fp32", ours, exact)


def test_attention_empty():
    part = chain(1).passes()[0]
    none = torch.zeros(1, dtype=torch.int32)
    got = tree_attention_triton(
        torch.zeros(0, 2, 16), torch.zeros(0, 1, 16), torch.zeros(0, 1, 8), part.position[:0], part.subtree_end[:0],
        none, none, part.span[:0], None, 1.0, None, None, 64, True,
    )  # fmt: skip
    assert got[0].shape == (0, 2, 8) and got[1].shape == (0, 2)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("what", ["k", "v"])
def test_attention_non_finite_stays_in_its_subtree(what, value):
    """Rows that see the bad key are bad, as in the reference; the others, in the same tile too, keep their values."""
    (part,) = branches().passes(block_tokens=16)
    q, k, v = (torch.randn(len(part.position), n, 16) for n in (3, 1, 1))
    (k if what == "k" else v)[len(part.position) - 4] = value
    rest = (*layout(part), None, 0.25, 9, None, part.block_tokens, False)
    got, want = (attend(q, k, v, *rest)[0] for attend in (tree_attention_triton, tree_attention_reference))
    good = want.isfinite().all(-1)
    assert torch.equal(got.isfinite().all(-1), good) and 0 < int((~good).sum()) < good.numel() // 2
    assert_close("tree_attention fp32", got[good], want[good])


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


def make_rows(rows, width, vocab, dtype=torch.float32, per_row=1, seed=0, gain=1.0, bias=False):
    """hidden, weight, targets, target_ptr, bias; `per_row` targets a row or a list of counts."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, width, generator=generator) * gain).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype)
    counts = torch.tensor(per_row if isinstance(per_row, list) else [per_row] * rows)
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    targets = torch.randint(vocab, (int(ptr[-1]),), generator=generator)
    return hidden, weight, targets, ptr, torch.randn(vocab, generator=generator).to(dtype) if bias else None


def plain_logprob(hidden, weight, targets, ptr, bias, scale, softcap):
    """What a model does: logits rounded to its dtype, then log_softmax in float32."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    row = torch.repeat_interleave(torch.arange(len(hidden)), ptr.diff())
    return torch.log_softmax(logits.float(), -1)[row, targets], torch.logsumexp(logits.float(), -1)


def check_logprob(inputs, scale=1.0, softcap=None, extreme=False):
    hidden, weight, targets, ptr, bias = inputs
    got = linear_logprob_triton(*inputs, scale, softcap)[:2]
    wide = (hidden.double(), weight.double(), targets, ptr, None if bias is None else bias.double())
    want = linear_logprob_reference(*wide, scale, softcap)[:2]
    plain = plain_logprob(*inputs, scale, softcap)
    for ours, theirs, true in zip(got, plain, want, strict=True):
        assert ours.dtype == torch.float32
        if extreme:
            assert_close("linear_logprob extreme", ours, true)
        elif len(true):
            check("linear_logprob", ours, theirs, true, hidden.dtype)


LOGPROB = {
    "one of everything": ({"rows": 1, "width": 1, "vocab": 1}, {}),
    "V = 1, D = 16": ({"rows": 17, "width": 16, "vocab": 1, "per_row": 2}, {}),
    "one below the tiles": ({"rows": 15, "width": 31, "vocab": 31}, {}),
    "exactly the tiles": ({"rows": 16, "width": 32, "vocab": 32}, {}),
    "one above the tiles": ({"rows": 17, "width": 33, "vocab": 33}, {}),
    "127 rows": ({"rows": 127, "width": 40, "vocab": 100}, {}),
    "many targets and none": ({"rows": 5, "width": 20, "vocab": 70, "per_row": [0, 9, 1, 0, 40]}, {}),
    "no targets": ({"rows": 3, "width": 20, "vocab": 70, "per_row": 0}, {}),
    "bias, scale, softcap": ({"rows": 9, "width": 20, "vocab": 70, "bias": True}, {"scale": 0.7, "softcap": 2.0}),
    "logits of 1e4": ({"rows": 9, "width": 20, "vocab": 70, "gain": 1e4, "per_row": 3}, {"extreme": True}),
    "bfloat16": ({"rows": 20, "width": 96, "vocab": 200, "dtype": torch.bfloat16, "bias": True, "per_row": 2}, {}),
    "float16": ({"rows": 20, "width": 96, "vocab": 200, "dtype": torch.float16}, {"softcap": 30.0}),
}


@pytest.mark.parametrize("described", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("case", LOGPROB)
def test_logprob(case, described, monkeypatch):
    """Descriptors want rows of whole 16 bytes; the interpreter takes them where their hardware is not."""
    shape, options = LOGPROB[case]
    inputs = make_rows(**shape)
    if described and (logprob_kernel.TensorDescriptor is None or inputs[0].stride(0) * inputs[0].element_size() % 16):
        pytest.skip("no descriptor of these rows")
    monkeypatch.setattr(logprob_kernel, "describes", lambda *_: described)
    check_logprob(inputs, **options)


def test_descriptors_are_for_aligned_rows_on_their_hardware():
    weight = torch.zeros(8, 64, dtype=torch.bfloat16)
    hidden = torch.zeros(9, 72, dtype=torch.bfloat16)
    assert [logprob_kernel.describes(hidden[:, :64], weight, part) for part in (0, 80, 90, 100, 120)] == [
        False, False, True, True, False,
    ]  # fmt: skip
    assert not logprob_kernel.describes(hidden.float(), weight.float(), 90)
    assert not logprob_kernel.describes(hidden[:, 1:65], weight, 90), "begins off a 16-byte border"
    assert not logprob_kernel.describes(torch.zeros(9, 65, dtype=torch.bfloat16)[:, :64], weight, 90)


def test_logprob_strided_inputs_in_nan():
    hidden, weight, *rest = make_rows(9, 20, 70)
    inputs = [torch.full((t.shape[0] + 4, t.shape[1] + 7), NAN) for t in (hidden, weight)]
    views = [b[2 : 2 + t.shape[0], 3 : 3 + t.shape[1]] for b, t in zip(inputs, (hidden, weight), strict=True)]
    for view, t in zip(views, (hidden, weight), strict=True):
        view.copy_(t)
    check_logprob((*views, *rest))


def test_logprob_bits_do_not_depend_on_the_batch(monkeypatch):
    """Rows alone, shuffled, in slabs and under any schedule: the same bits."""
    monkeypatch.setattr(logprob_kernel, "MAX_CHUNKS", 5)
    hidden, weight, targets, ptr, _ = make_rows(40, 24, 500, per_row=2)
    # On this grid every product and sum is exact: the interpreter's matrix product is numpy's, whose order of summation
    # depends on where a row lies in the tile. Log-sum-exp is not exact, and its order is what is tested.
    hidden, weight = (hidden * 4).round() / 4, (weight * 16).round() / 16
    whole, lse, _ = linear_logprob_triton(hidden, weight, targets, ptr, None, 1.0, None)
    check_logprob((hidden, weight, targets, ptr, None))

    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = linear_logprob_triton(hidden[order], weight, targets.view(40, 2)[order].flatten(), ptr, None, 1.0, None)
    assert torch.equal(shuffled[0].view(40, 2), whole.view(40, 2)[order]) and torch.equal(shuffled[1], lse[order])

    alone = linear_logprob_triton(hidden[3:4], weight, targets[6:8], ptr[:2], None, 1.0, None)
    assert torch.equal(alone[0], whole[6:8]) and torch.equal(alone[1], lse[3:4])

    monkeypatch.setattr(logprob_kernel, "SLAB_ROWS", 16)
    monkeypatch.setattr(logprob_kernel, "chunks_per_split", lambda *_: 2)
    other = linear_logprob_triton(hidden, weight, targets, ptr, None, 1.0, None)
    assert torch.equal(other[0], whole) and torch.equal(other[1], lse)


@pytest.mark.parametrize(
    ("value", "lse_is"),
    [(NAN, torch.isnan), (INF, torch.isposinf), (-INF, torch.isfinite)],
    ids=["nan", "+inf", "-inf"],
)
def test_logprob_non_finite_logits(value, lse_is):
    """One logit of one row, away from the target: as torch.logsumexp has it, and no other row changes."""
    inputs = make_rows(4, 1, 100, bias=False)
    hidden, weight, targets, ptr, _ = inputs
    targets.fill_(90)
    clean, clean_lse, _ = linear_logprob_triton(*inputs, 1.0, None)
    bias = torch.zeros(100)
    bias[40] = value
    got, lse, _ = linear_logprob_triton(hidden, weight, targets, ptr, bias, 1.0, None)
    want = linear_logprob_reference(hidden, weight, targets, ptr, bias, 1.0, None)[1]
    assert lse_is(lse).all() and torch.allclose(lse, want, equal_nan=True)
    assert not torch.isfinite(got).any() if value != -INF else torch.isfinite(got).all()

    hidden = hidden.clone()
    hidden[2] = NAN
    got, lse, _ = linear_logprob_triton(hidden, weight, targets, ptr, None, 1.0, None)
    assert torch.isnan(got[2]) and torch.isnan(lse[2])
    rest = torch.tensor([0, 1, 3])
    assert torch.equal(got[rest], clean[rest]) and torch.equal(lse[rest], clean_lse[rest])


def test_logprob_target_outside_the_vocabulary_is_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", torch.zeros)  # old memory can hold plausible numbers
    hidden, weight, targets, ptr, _ = make_rows(3, 8, 40)
    targets[1], targets[2] = 40, -1
    got, lse, _ = linear_logprob_triton(hidden, weight, targets, ptr, None, 1.0, None)
    assert torch.isfinite(got[0]) and torch.isnan(got[1:]).all() and torch.isfinite(lse).all()


def test_logprob_scratch_and_schedule():
    assert logprob_kernel.scratch_bytes(16384, 151936) < 64 << 20
    assert max(logprob_kernel.scratch_bytes(10**6, v) for v in (1, 129, 32000, 151936, 262144)) < 64 << 20
    for tiles, chunks, processors in ((1, 1, 132), (1, 238, 132), (128, 238, 132), (8, 3, 4), (128, 250, 304)):
        each = logprob_kernel.chunks_per_split(tiles, chunks, 128 * 4096 * 2, processors)
        assert 1 <= each <= chunks
    assert logprob_kernel.chunks_per_split(1, 238, 1 << 20, 132) == 1
    # 128 row tiles of 1 MiB: about 24 of them at a time, so about 6 programs share one.
    assert 5 <= 238 / logprob_kernel.chunks_per_split(128, 238, 1 << 20, 132) <= 13


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


def test_configurations_are_plain_functions():
    assert attention_kernel.config(128, torch.bfloat16, 90) == attention_kernel.config(128, torch.bfloat16, 90)
    assert logprob_kernel.config(4096, torch.bfloat16, 90) == logprob_kernel.config(4096, torch.bfloat16, 90)
