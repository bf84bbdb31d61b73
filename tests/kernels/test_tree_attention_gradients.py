"""The backward pass of tree_attention: finite differences, keys of earlier passes, compiled, refused."""

from __future__ import annotations

import pytest
import torch

import sapo_kernels as sk
from tests.kernels.test_tree_attention import TREES, impl, in_passes, inputs, pull, results
from tests.tolerances import assert_close

__all__ = ["impl"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
# Every option on few tokens.
ALL = ("short", 4, 2, 24, 16, {"window": 4, "softcap": 2.0, "sinks": True, "scale": 0.7})


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 0.7}, {"window": 4, "softcap": 2.0, "sinks": True, "scale": 0.4}], ids=str
)
def test_gradcheck(impl, options):
    """Finite differences in float64."""
    q, k, v, options = inputs(("short", 4, 2, 4, 2, options), torch.float64, "cpu")
    names = ["q", "k", "v", *(["sinks"] if options.get("sinks") is not None else [])]
    if "sinks" in names:
        options["sinks"] = options["sinks"].double()
    given = {"q": q, "k": k, "v": v, **options}

    def attend(*tensors):
        return sk.tree_attention(
            **{**given, **dict(zip(names, tensors, strict=True))}, trie=TREES["short"][0], impl=impl
        )

    assert torch.autograd.gradcheck(attend, [given[name].requires_grad_() for name in names])


@pytest.mark.parametrize(("case", "apart"), [(ALL, False), ("job short", True)], ids=["joined", "apart"])
def test_past_keys_of_earlier_passes_get_their_gradients(case, apart, impl, device):
    """Passes one after the other are the whole, backward too."""
    q, k, v, options = inputs(case, torch.float32, device)
    trie = TREES["short"][0]

    def whole(q, k, v, options):
        return sk.tree_attention(q, k, v, trie, impl=impl, **options)

    def pass_by_pass(q, k, v, options):
        return torch.cat(in_passes(trie, q, k, v, impl, options, apart))

    tensors = {"q": q, "k": k, "v": v}
    (_, got), (_, expected) = (results(attend, tensors, options, pull(q, v)) for attend in (pass_by_pass, whole))
    for name in expected:
        assert_close("tree_attention gradient fp32", got[name], expected[name].double())


def test_only_what_is_wanted_and_the_same_bits_again(impl, device):
    q, k, v, options = inputs(ALL, torch.float32, device)
    found = []
    for _ in range(2):
        leaf = v.clone().requires_grad_()
        out = sk.tree_attention(q, k, leaf, TREES["short"][0], impl=impl, **options)
        out.square().sum().backward()
        found.append((out, leaf.grad))
    assert all(map(torch.equal, *found)) and q.grad is k.grad is None
    with torch.no_grad():
        assert not sk.tree_attention(q, k, leaf, TREES["short"][0], impl=impl, **options).requires_grad


def test_a_second_derivative_is_refused(impl, device):
    q, k, v, _ = inputs(ALL, torch.float32, device)
    q.requires_grad_()
    (first,) = torch.autograd.grad(
        sk.tree_attention(q, k, v, TREES["short"][0], impl=impl).sum(), [q], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="tree_attention_backward .* no backward"):
        first.sum().backward()


def test_opcheck_and_compile(impl, device):
    q, k, v, options = inputs(ALL, torch.float32, device)
    trie = TREES["short"][0].passes()[0].to(device)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    sinks, window, softcap = (options.get(name) for name in ("sinks", "window", "softcap"))
    plan = (trie.position, trie.subtree_end, trie.block_start, trie.span_ptr, trie.span)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for tensors, lse, which in (
        (leaves, True, checks), ([t.bfloat16() for t in (q, k, v)], False, (*checks, "test_aot_dispatch_dynamic"))
    ):  # fmt: skip
        arguments = (*tensors, *plan, sinks, 0.3, window, softcap, trie.block_tokens, impl, lse)
        done = torch.library.opcheck(torch.ops.sapo_kernels.tree_attention.default, arguments, test_utils=which)
        assert set(done.values()) == {"SUCCESS"}, done

    def loss(q, k, v):
        return sk.tree_attention(q, k, v, trie, impl=impl, **options).square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    trie._lists.clear()  # made while it compiles
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert torch.equal(a, b)
