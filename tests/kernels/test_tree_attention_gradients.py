"""Gradients of tree_attention on every backend against torch's own through each sequence alone, in float64."""

from __future__ import annotations

import pytest
import torch

import sapo_kernels as sk
from tests.kernels.test_tree_attention import (
    CASES,
    DTYPES,
    LOW,
    TREES,
    cached_passes,
    each_alone,
    impl,
    in_passes,
    inputs,
    torch_attention,
)
from tests.tolerances import assert_close

__all__ = ["impl"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
# Shapes and options that go another way through the backward pass than through the forward one.
GRADIENTS = ["job one token", "job lengths", "job short siblings", "job deep", "one kv head, 7 groups", "head 80",
             "head 16/48", "window 1", "window 5", "softcap", "sinks", "scale", "everything"]  # fmt: skip
# Every option on few tokens.
ALL = ("short", 4, 2, 24, 16, {"window": 4, "softcap": 2.0, "sinks": True, "scale": 0.7})


def gradients(attend, tensors, options, up):
    """Gradients of q, k, v and of the sinks where there are any."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    options = dict(options)
    if options.get("sinks") is not None:
        leaves["sinks"] = options["sinks"] = options["sinks"].detach().clone().requires_grad_()
    out = attend(leaves["q"], leaves["k"], leaves["v"], options)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), up.to(out.dtype)), strict=True))


def both(case, dtype, device, impl):
    """(ours, exact, torch's own in the same dtype) gradients of a case, by name."""
    q, k, v, options = inputs(case, dtype, device)
    job = CASES[case][0]
    up = torch.randn(q.shape[0], q.shape[1], v.shape[2], generator=torch.Generator().manual_seed(1)).to(device)
    tensors = {"q": q, "k": k, "v": v}

    def alone(attend, dtype):
        return lambda q, k, v, options: each_alone(job, q, k, v, options, dtype, attend)

    ours = gradients(lambda q, k, v, o: sk.tree_attention(q, k, v, TREES[job][0], impl=impl, **o), tensors, options, up)
    wide = {name: t.double() for name, t in tensors.items()}
    wide_options = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    exact = gradients(alone(each_alone.__defaults__[0], torch.float64), wide, wide_options, up)
    return ours, exact, lambda: gradients(alone(torch_attention, dtype), tensors, options, up)


@pytest.mark.parametrize(
    ("case", "precision"), [*((case, "fp32") for case in GRADIENTS), ("head 192/128", "bf16"), ("sinks", "fp16")]
)
def test_gradients_of_every_sequence_alone(case, precision, impl, device, poisoned_outputs):
    ours, exact, plain = both(case, DTYPES[precision], device, impl)
    plain = plain() if precision in LOW else {}
    for name, expected in exact.items():
        if name != "sinks":
            assert ours[name].dtype == DTYPES[precision]
        row = "low" if precision in LOW else precision
        assert_close(f"tree_attention gradient {row}", ours[name], expected, plain.get(name))


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
    up = torch.randn(q.shape[0], q.shape[1], v.shape[2]).to(device)

    def whole(q, k, v, options):
        return sk.tree_attention(q, k, v, trie, impl=impl, **options)

    def pass_by_pass(q, k, v, options):
        return torch.cat(in_passes(trie, q, k, v, impl, options, apart))

    tensors = {"q": q, "k": k, "v": v}
    got, expected = (gradients(attend, tensors, options, up) for attend in (pass_by_pass, whole))
    for name in expected:
        assert_close("tree_attention gradient fp32", got[name], expected[name].double())


@pytest.mark.parametrize("case", ["job random", "window 5"])
def test_keys_that_the_caller_holds_get_their_gradients(case, impl, device, poisoned_outputs):
    """Keys in front of a pass that are seen from its middle on, as in a trie of which nothing is cached."""
    if impl == "reference":
        pytest.skip("the reference refuses passes with cached tokens")
    q, k, v, options = inputs(case, torch.float32, device)
    cached, steps = cached_passes(case, device)

    def alone(q, k, v, options):
        return each_alone(CASES[case][0], q, k, v, options, torch.float64)[~cached]

    def of_the_others(q, k, v, options):
        return torch.cat(
            [sk.tree_attention(q[new], k[keys], v[keys], s, impl=impl, **options) for s, new, keys in steps]
        )

    tensors = {"q": q, "k": k, "v": v}
    up = torch.randn(int((~cached).sum()), q.shape[1], v.shape[2]).to(device)
    got, expected = (gradients(attend, tensors, options, up) for attend in (of_the_others, alone))
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
    leaves = [t.requires_grad_() for t in (q, k, v)]
    sinks, window, softcap = (options.get(name) for name in ("sinks", "window", "softcap"))
    plan = (trie.position, trie.subtree_end, trie.block_start, trie.span_ptr, trie.span)
    arguments = (*leaves, *plan, sinks, 0.3, window, softcap, trie.block_tokens, impl, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    assert set(torch.library.opcheck(torch.ops.sapo_kernels.tree_attention.default, arguments, test_utils=checks)
               .values()) == {"SUCCESS"}  # fmt: skip

    def loss(q, k, v):
        return sk.tree_attention(q, k, v, trie, impl=impl, **options).square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    trie._lists.clear()  # made while it compiles
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert torch.equal(a, b)
