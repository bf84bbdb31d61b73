"""accumulate_ and reweight_ as operators: calls that are refused, tracing, who serves them, CUDA graphs."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from tests.native_cases import (
    SMALLEST,
    TENSORS,
    WRITTEN,
    Implementation,
    Job,
    assert_same_bits,
    everywhere,
    losses,
    misaligned,
    needs_cuda_kernels,
    new_state,
    refusal,
    strided,
)

LOW, TOP = -(2**63), 2**63 - 1
OPS = {name: getattr(torch.ops.sapo_kernels, name) for name in ("accumulate_", "reweight_")}
LISTS = ("nll", "tokens", "logprob", "cell_target", "cell_ptr")
NAMES = {"accumulate_": LISTS, "reweight_": TENSORS}
both = pytest.mark.parametrize("op", OPS)


def int64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def accumulate(dtype=torch.float32, device="cpu") -> dict:
    """A call with everything in it: a shared target, an empty cell, sums begun before."""
    values = {
        "nll": torch.tensor([0.25, -0.0, 3.0], dtype=torch.float64), "tokens": int64(0, 0, 1),
        "logprob": torch.tensor([-0.1, -2.0, -0.3, -1e-3, -5.0, -0.7], dtype=dtype),
        "cell_target": int64(0, 2, 5, 1, 2, 4), "cell_ptr": int64(0, 3, 3, 6),
    }  # fmt: skip
    return {**{name: value.to(device) for name, value in values.items()}, "start": 0}


def reweight(device="cpu", pools=3, prompts=40) -> dict:
    """A call in the middle of a run."""
    rng = np.random.default_rng(0)
    state = [value.to(device) for value in new_state(pools, prompts)]
    first, step = ([v.to(device) for v in losses(rng, pools, prompts, bad=bad)] for bad in (0.0, 0.03))
    Implementation("plain", device).reweight_(*state, *first, 1.0, 0.5, 0.0)
    return {**dict(zip(TENSORS, (*state, *step), strict=True)), "decay": 0.9, "temperature": 0.1, "floor": 0.05}


CALLS = {"accumulate_": accumulate, "reweight_": reweight}


def shared(a: dict, written: str, other: str) -> dict:
    """`other` lies in the memory of `written`, byte by byte from its beginning."""
    size = max(a[name].numel() * a[name].element_size() for name in (written, other))
    memory = torch.zeros(size, dtype=torch.uint8)
    return {
        name: memory[: a[name].numel() * a[name].element_size()].view(a[name].dtype).view(a[name].shape)
        for name in (written, other)
    }


# What any tensor may be instead of what it should be, and what is said of it.
ANY = {
    "dtype": (lambda v: v.to(torch.int16), r"expected \w+, got another dtype|expected [\w]+, got int16"),
    "shape": (lambda v: v[..., None], r"expected (shape|\[pools|1 dimension)"),
    "size": (lambda v: v[:-1], r"(cell 2: )?expected (shape \[\d|an ascending range)"),
    "strides": (strided, r"expected contiguous strides, got \["),
    "place": (misaligned, "expected memory aligned to its elements, got an address that is not"),
    "device": (lambda v: v.to("meta"), "expected it on the device of the other arguments"),
}
MOST = "1.79769e+308"


def number(name: str, high: str, got: str) -> str:
    return rf"{name}: expected a number from 0 to {re.escape(high)}, got {re.escape(got)}$"


# What is wrong with a call, and what is said of it.
SPECIAL = {
    "accumulate_": {
        "the last of nll is the first of logprob": (
            lambda a: {"nll": (f := torch.zeros(8).double())[:3], "logprob": f[2:]},
            "logprob: expected memory of its own, got some of nll's"),
        "the last half of nll's last is logprob's": (
            lambda a: {"nll": (f := torch.zeros(20))[:6].view(torch.float64), "logprob": f[5:11]},
            "logprob: expected memory of its own, got some of nll's"),
        "the first token is the last of cell_ptr": (
            lambda a: {"cell_ptr": (i := int64(*[0] * 6))[:4], "tokens": i[3:]},
            "cell_ptr: expected memory of its own, got some of tokens's"),
        "start -1": (lambda a: {"start": -1}, "start: expected at least 0, got -1"),
    },
    "reweight_": {
        **{
            f"{other} in {written}": (
                lambda a, written=written, other=other: shared(a, written, other),
                f"{other}: expected memory of its own, got some of {written}'s")
            for i, written in enumerate(WRITTEN)
            for other in TENSORS[i + 1 :]
        },
        "decay below 0": (lambda a: {"decay": -1e-9}, number("decay", "1", "-1e-09")),
        "decay NaN": (lambda a: {"decay": math.nan}, number("decay", "1", "nan")),
        "temperature infinite": (lambda a: {"temperature": math.inf}, number("temperature", MOST, "inf")),
        "temperature just below 0": (
            lambda a: {"temperature": -SMALLEST}, number("temperature", MOST, "-4.94066e-324")),
        "floor above 1": (lambda a: {"floor": 1.01}, number("floor", "1", "1.01")),
    },
}  # fmt: skip
# Not seen on the host where the lists are on another device: there such a cell becomes NaN.
UNREADABLE = {
    "cell_ptr below 0": (lambda a: {"cell_ptr": int64(-1, 3, 3, 6)}, "cell_ptr: cell 0: .* 6 entries, got -1 to 3"),
    "cell_ptr descends": (lambda a: {"cell_ptr": int64(0, 3, 2, 6)}, "cell_ptr: cell 1: .* got 3 to 2"),
    "cell_ptr past the end": (lambda a: {"cell_ptr": int64(0, 3, 3, 7)}, "cell_ptr: cell 2: .* got 3 to 7"),
    "tokens below 0": (
        lambda a: {"tokens": int64(0, 0, -1)}, "tokens: cell 2: expected from 0 to its 3 entries, got -1"),
    "tokens one too many": (lambda a: {"tokens": int64(0, 1, 0)}, "tokens: cell 1: .* its 0 entries, got 1"),
    "a target at the bottom": (
        lambda a: {"cell_target": int64(0, 2, 5, 1, LOW, 4), "start": 2, "tokens": int64(1, 0, 1)},
        f"cell_target: cell 2: .* begins at 2, or after it, got {LOW}: a piece was left out"),
    "the first piece left out": (
        lambda a: {"start": 1}, "cell_target: cell 0: .* begins at 1, or after it, got 0: a piece was left out"),
}  # fmt: skip
TOLD = {"accumulate_": {**SPECIAL["accumulate_"], **UNREADABLE}, "reweight_": SPECIAL["reweight_"]}


def refused_alike(op: str, given: list) -> str:
    """What both implementations say."""
    kinds = ("compiled", "plain") if Implementation.available("compiled") else ("plain",)
    texts = {refusal(getattr(Implementation(which, "cpu"), op), given).replace("int16", "another dtype")
             for which in kinds}  # fmt: skip
    assert len(texts) == 1, texts
    return texts.pop()


@pytest.mark.parametrize("kind", ANY)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in NAMES.items() for name in names])
def test_no_tensor_may_be_another(op, name, kind):
    change, text = ANY[kind]
    given = CALLS[op]()
    if (kind, name) in (("place", "live"), ("size", "logprob")):
        return  # bytes, and a shorter piece
    given[name] = change(given[name])
    if kind == "device":  # the dispatcher's choice: whichever kernel it takes must refuse
        assert re.match(f"{op}: \\w+: {text}", refusal(OPS[op], list(given.values())))
    else:
        assert re.match(f"{op}: \\w+: ({text})", refused_alike(op, list(given.values())))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, rows in TOLD.items() for name in rows])
def test_refused_before_anything_is_written(op, name):
    change, text = TOLD[op][name]
    given = CALLS[op]()
    given.update(change(given))
    assert re.search(f"^{op}: {text}", refused_alike(op, list(given.values())))


@pytest.mark.gpu
@needs_cuda_kernels
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_cell_whose_lists_do_not_fit_is_nan_on_the_gpu(name):
    given = accumulate()
    given.update(UNREADABLE[name][0](given))
    given = [v.cuda() if isinstance(v, torch.Tensor) else v for v in given.values()]
    kept = [value.clone() for value in given[2:5]]
    OPS["accumulate_"](*given)
    bad = int(re.search(r"cell (\d)", UNREADABLE[name][1])[1])
    assert given[0][bad].isnan() and not given[0].isnan().all()
    assert_same_bits(given[2:5], kept)


@both
def test_operator_is_served_by_the_right_kernels(op):
    """The dispatcher has a CPU kernel of its own exactly if the module is loaded, and the plain one in any case."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"sapo_kernels::{op}", "CPU") == Implementation.available("compiled")
    assert has(f"sapo_kernels::{op}", "CompositeExplicitAutograd")


@pytest.mark.parametrize("variant", [torch.float32, torch.float64, 0.0, 0.5], ids=str)
def test_operator_passes_opcheck(variant, device):
    op = "accumulate_" if isinstance(variant, torch.dtype) else "reweight_"
    given = accumulate(variant, device) if op == "accumulate_" else {**reweight(device), "temperature": variant}
    done = torch.library.opcheck(OPS[op].default, tuple(given.values()))
    assert set(done.values()) == {"SUCCESS"} and len(done) == 4, done


@pytest.mark.parametrize("dynamic", [False, True])
def test_operator_compiles_without_a_graph_break(dynamic, device):
    def sums(logprob, cell_target, cell_ptr, cut: int):
        nll = logprob.new_zeros(cell_ptr.shape[0] - 1, dtype=torch.float64)
        tokens = torch.zeros_like(nll, dtype=torch.int64)
        OPS["accumulate_"](nll, tokens, logprob[:cut], cell_target, cell_ptr, 0)
        half = nll * 1
        OPS["accumulate_"](nll, tokens, logprob[cut:], cell_target, cell_ptr, cut)
        return nll, tokens, half

    def two_steps(state, nll, tokens):
        sk.reweight_(state, nll, tokens, decay=0.9, temperature=0.25, floor=0.1)
        between = state.probs * 2
        sk.reweight_(state, nll / 2, tokens, decay=0.5)
        return between, state.best + 1

    torch.compiler.reset()
    compiled = torch.compile(sums, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seed in (1, 2, 3):
        _, logprob, lists, _ = Job(seed).composition()
        inputs = (logprob.to(device), *(v.to(device) for v in lists), len(logprob) // 2)
        assert_same_bits(compiled(*inputs), sums(*inputs))
    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for pools, prompts in ((2, 33), (5, 8)):
        ours, other = (sk.PromptState(pools, prompts, device) for _ in range(2))
        for seed in range(3):
            _, nll, tokens = losses(np.random.default_rng(seed), pools, prompts)
            nll, tokens = nll.to(device), tokens.to(device)
            assert_same_bits(compiled(ours, nll, tokens), two_steps(other, nll, tokens))
            assert_same_bits(*(list(state.state_dict().values()) for state in (ours, other)))


@everywhere
def test_arguments_that_touch_share_no_memory(impl):
    """Slices of larger tensors, end to end, inputs that share memory among themselves; nothing is written beside."""
    for op in OPS:
        given, plain = CALLS[op](), CALLS[op]()
        tensors = [n for n in given if isinstance(given[n], torch.Tensor)]
        offsets = np.cumsum([8, *(8 * given[n].numel() for n in tensors)]).tolist()
        whole = torch.full((offsets[-1] + 8,), 9, dtype=torch.uint8, device=impl.device)
        for name, begin in zip(tensors, offsets, strict=False):
            value = given[name]
            part = whole[begin : begin + value.numel() * value.element_size()].view(value.dtype).view(value.shape)
            given[name] = part.copy_(value)
        if op == "reweight_":
            given["nll"] = given["tokens"].view(torch.float64)
            plain["nll"] = plain["tokens"].view(torch.float64)
        before = whole.clone()
        getattr(impl, op)(*given.values())
        getattr(Implementation("plain", "cpu"), op)(*plain.values())
        for name in tensors:
            torch.testing.assert_close(given[name].cpu(), plain[name], rtol=1e-13, atol=1e-9, equal_nan=True)
        written = ("nll", "tokens") if op == "accumulate_" else WRITTEN
        for name, begin in zip(tensors, offsets, strict=False):
            if name in written:
                before[begin : begin + 8 * given[name].numel()] = whole[begin : begin + 8 * given[name].numel()]
        assert torch.equal(whole, before)


@pytest.mark.gpu
@needs_cuda_kernels
@both
def test_in_a_cuda_graph(op):
    """Captured on a stream of its own: a kernel on another one would not be in the graph."""
    given, fresh = CALLS[op](device="cuda"), list(CALLS[op](device="cuda").values())
    OPS[op](*fresh)
    values = list(given.values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS[op](*values)
    expected = list(CALLS[op]().values())
    for _ in range(3):
        graph.replay()
        getattr(Implementation("plain", "cpu"), op)(*expected)
        for a, b in zip(values, expected, strict=True):
            if isinstance(b, torch.Tensor):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-9, equal_nan=True)
