"""torch.ops.sapo_kernels.*: registration, fake kernels, compilation, the missing backward."""

from __future__ import annotations

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels import plan_trie
from sapo_kernels.ops import BACKENDS, resolve_impl, triton_status
from tests.oracles import flatten, random_cells

ops = torch.ops.sapo_kernels
STEP = plan_trie(*flatten(random_cells(5))).passes(24)[1]
assert STEP.num_past and len(STEP.span) and len(STEP.next_past)


def attention_arguments(dtype=torch.float32, device="cpu", impl="sdpa", window=None, softcap=None, sinks=False):
    """Arguments of the operator for a pass with past keys."""
    generator = torch.Generator().manual_seed(0)
    fresh, keys = len(STEP.input_ids), len(STEP.position)
    shapes = ((fresh, 4, 16), (keys, 2, 16), (keys, 2, 8))
    q, k, v = (torch.randn(*s, generator=generator).to(device, dtype) for s in shapes)
    index = (STEP.position, STEP.subtree_end, STEP.block_start, STEP.span_ptr, STEP.span)
    sink = torch.randn(4, generator=generator).to(device) if sinks else None
    return (q, k, v, *(t.to(device) for t in index), sink, 0.25, window, softcap, STEP.block_tokens, impl, False)


def logprob_arguments(dtype=torch.float32, device="cpu", impl="torch", bias=False, softcap=None):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(device, dtype) for n in (6, 40))
    targets = torch.tensor([3, 39, 0, 0, 7], device=device)
    pointer = torch.tensor([0, 2, 2, 3, 4, 4, 5], device=device)
    return (hidden, weight, targets, pointer, weight[:, 0].clone() if bias else None, 1.5, softcap, impl)


CALLS = {
    "attention sdpa": (ops.tree_attention, attention_arguments()),
    "attention everything": (ops.tree_attention, attention_arguments(window=5, softcap=2.0, sinks=True)),
    "attention bf16": (ops.tree_attention, attention_arguments(torch.bfloat16, impl="reference")),
    "logprob torch": (ops.linear_logprob, logprob_arguments()),
    "logprob everything": (ops.linear_logprob, logprob_arguments(bias=True, softcap=3.0)),
    "logprob bf16": (ops.linear_logprob, logprob_arguments(torch.bfloat16, impl="reference")),
    "logprob fp64": (ops.linear_logprob, logprob_arguments(torch.float64)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Schema, registration of the backward pass, and that meta tensors get the shapes, dtypes and strides."""
    op, arguments = CALLS[name]
    done = torch.library.opcheck(op.default, arguments)
    assert set(done.values()) == {"SUCCESS"} and len(done) == 4, done


def outputs(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["attention everything", "logprob everything"])
def test_compiles_without_a_graph_break(name, dynamic):
    op, arguments = CALLS[name]
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]

    def around(*tensors):
        given = iter(tensors)
        result = outputs(op(*(next(given) if isinstance(a, torch.Tensor) else a for a in arguments)))
        return [r * 2 for r in result]

    torch.compiler.reset()
    got = torch.compile(around, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, around(*tensors), strict=True))


def test_a_backward_pass_without_the_log_sum_exp_is_refused():
    """The public function asks for it where a gradient is wanted; who calls the operator has to."""
    first, *rest = attention_arguments()
    out, _ = ops.tree_attention(first.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="expected with_lse=True for a backward pass"):
        out.sum().backward()


@pytest.mark.parametrize("op", BACKENDS)
def test_backends_are_resolved(op):
    second = {"tree_attention": "sdpa", "linear_logprob": "torch"}[op]
    assert BACKENDS[op] == ("triton", second, "reference")
    assert resolve_impl(op, "auto", torch.device("cpu")) == second
    for impl in (second, "reference"):
        assert resolve_impl(op, impl, torch.device("cpu")) == impl
    for impl in ("", "Triton", "cuda", "eager"):
        with pytest.raises(ValueError, match=f"{op}: impl: expected 'auto' or one of .*got '{impl}'"):
            resolve_impl(op, impl, torch.device("cpu"))


def test_triton_needs_its_package_and_a_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_status(cpu)[0]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not triton_status(cpu)[0] and triton_status(cuda)[0]
    q, trie = torch.ones(2, 1, 16), plan_trie([1, 2, 3], [0, 3], [1])
    assert float(sk.tree_attention(q, q, q, trie).sum()) == 32.0
    for op, call in (
        ("tree_attention", lambda: sk.tree_attention(q, q, q, trie, impl="triton")),
        ("linear_logprob", lambda: sk.linear_logprob(q[:, 0], q[:, 0], torch.tensor([0, 1]), impl="triton")),
    ):
        with pytest.raises(RuntimeError, match=f"^{op}: impl='triton' cannot run on cpu"):  # nor another in silence
            call()
    for op, (_, second, _) in BACKENDS.items():
        assert resolve_impl(op, "auto", cuda, torch.bfloat16) == "triton"
        assert resolve_impl(op, "auto", cuda, torch.float64) == second, "where float64 is kept"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton_status(cuda) == (False, "triton is not installed")
    assert resolve_impl("tree_attention", "auto", cuda) == "sdpa"
    with pytest.raises(RuntimeError, match="impl='triton' cannot run on cuda: triton is not installed"):
        resolve_impl("tree_attention", "triton", cuda)


def test_no_queries():
    """The early way out of the operator: shapes and dtypes as ever."""
    q, k, v, *_ = attention_arguments()
    none = torch.zeros(0, dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int32)
    index = (none, none, zero, zero, none.view(0, 2))
    empty = ops.tree_attention(q[:0], k[:0], v[:0], *index, None, 1.0, None, None, 64, "sdpa", True)
    assert [(t.shape, t.dtype) for t in empty] == [((0, 4, 8), torch.float32), ((0, 4), torch.float32)]
