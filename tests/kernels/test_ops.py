"""torch.ops.sapo_kernels.*: who serves them, and what the operator alone does."""

from __future__ import annotations

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels import plan_trie
from sapo_kernels.ops import BACKENDS, resolve_impl, triton_status

ops = torch.ops.sapo_kernels


def test_a_backward_pass_without_the_log_sum_exp_is_refused_and_no_queries_are_none():
    """The public function asks for it where a gradient is wanted; who calls the operator has to."""
    (step,) = plan_trie([1, 2, 3, 4, 5], [0, 5], [1]).passes()
    index = (step.position, step.subtree_end, step.block_start, step.span_ptr, step.span)
    q, k = torch.randn(4, 4, 16, requires_grad=True), torch.randn(4, 2, 16)
    out, _ = ops.tree_attention(q, k, k, *index, None, 0.25, None, None, 64, "sdpa", False)
    with pytest.raises(RuntimeError, match="expected with_lse=True for a backward pass"):
        out.sum().backward()
    none, zero = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    index = (none, none, zero, zero, none.view(0, 2))
    empty = ops.tree_attention(q[:0], k[:0], k[:0, :, :8], *index, None, 1.0, None, None, 64, "sdpa", True)
    assert [(t.shape, t.dtype) for t in empty] == [((0, 4, 8), torch.float32), ((0, 4), torch.float32)]


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
