"""The backward pass of linear_logprob: what is computed and kept, in chunks of rows, compiled, or refused."""

from __future__ import annotations

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels import ops as module
from sapo_kernels.linear_logprob import gradient
from tests.kernels.test_linear_logprob import HEADS, LOW, NAMES, check, impl, inputs, ours, plain, results
from tests.oracles import skip_unless_runnable

__all__ = ["impl"]
pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
ops = torch.ops.sapo_kernels


@pytest.mark.parametrize("dtype", LOW)
def test_a_likely_target_keeps_its_digits(dtype, impl, device):
    """1 - p = 0.006: a mean of weights that held the target's own would be all rounding."""
    hidden, weight, targets, options = inputs("17 rows", LOW[dtype], device, spread=0.1)
    options["bias"] = torch.zeros(len(weight), device=device, dtype=LOW[dtype])
    options["bias"][5] = 10.0
    given = (hidden, weight, targets * 0 + 5, options)
    exact = results(plain(torch.float64), given, "frozen head", torch.float64, (1, 0))[1]["hidden"]
    got, same = (
        results(run, given, "frozen head", pull=(1, 0))[1]["hidden"] for run in (ours(impl), plain(LOW[dtype]))
    )
    assert 0 < exact.abs().max() < 0.1
    assert (got.double() - exact).norm() < 1.5 * (same.double() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck(impl, head):
    """Every option in float64, a target twice in a row, gradients of each subset of the inputs."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden": (6, 5), "weight": (23, 5), "bias": (23,)}
    given = [torch.randn(*sizes[name], generator=generator, dtype=torch.float64) for name in NAMES]
    given = [t.requires_grad_(name in HEADS[head]) for name, t in zip(NAMES, given, strict=True)]
    targets, pointer = torch.tensor([3, 3, 22, 0, 7, 7, 7]), torch.tensor([0, 2, 2, 4, 4, 7, 7])
    for scale, softcap, biased in ((1.0, None, False), (0.7, 2.0, True), (0.0, None, True), (-1.5, 1.0, False)):

        def run(hidden, weight, bias, scale=scale, softcap=softcap, biased=biased):
            bias = bias if biased else None
            return sk.linear_logprob(hidden, weight, targets, bias, scale, softcap, impl, target_ptr=pointer)

        if biased or head != "bias alone":
            assert torch.autograd.gradcheck(run, tuple(given))


@pytest.mark.parametrize("head", ["all", "frozen head", "bias alone"])
def test_only_what_is_wanted_is_computed(head, impl, device, monkeypatch):
    """A frozen head gets no gradient, and no tensor of its size is made on the way."""
    given = inputs("everything", torch.float32, device)
    asked = []
    run = gradient.from_logits
    monkeypatch.setattr(gradient, "from_logits", lambda *a: asked.append(list(a[-1])) or run(*a))
    _, got = results(ours(impl), given, head)
    assert {name for name in NAMES if got[name] is not None} == set(HEADS[head])
    mask = [name in HEADS[head] for name in NAMES]
    if impl != "reference":
        # The torch backend has the mean from its forward pass.
        assert asked == ([] if impl == "torch" and mask == [True, False, False] else [mask])
    found = ops.linear_logprob_backward(
        None, None, *ops.linear_logprob(*given[:2], given[2], given[3]["target_ptr"], None, 1.0, None, impl, True),
        *given[:2], given[2], given[3]["target_ptr"], None, 1.0, None, impl, mask,
    )  # fmt: skip
    assert [t is not None for t in found] == mask
    assert all(t is None or not t.any() for t in found)  # of no gradient at all


@pytest.mark.parametrize(("pull", "head"), [((1.0, 0.0), "all"), ((0.0, 1.0), "frozen head")])
def test_one_output_alone(pull, head, impl, device):
    given = inputs("everything", torch.float32, device)
    exact = results(plain(torch.float64), given, head, torch.float64, pull)
    check("fp32", results(ours(impl), given, head, pull=pull), exact)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("head", ["all", "frozen head"])
def test_chunks_of_rows(impl, head, monkeypatch):
    """The cuts fall between targets rightly, forward and backward."""
    skip_unless_runnable("linear_logprob", impl, "cpu")
    given = inputs("everything", torch.float32, "cpu")
    exact = results(plain(torch.float64), given, head, torch.float64)
    for rows in (7, 32) if impl == "triton" else (1, 7, 16, 32, 33):
        monkeypatch.setattr(gradient, "chunk_rows", lambda *_, rows=rows: rows)
        check("fp32", results(ours(impl), given, head), exact)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_logits_of_all_rows_in_memory(impl, monkeypatch):
    """Forward and backward of 40 rows hold no tensor larger than one chunk of 16 rows."""
    skip_unless_runnable("linear_logprob", impl, "cpu")
    monkeypatch.setattr(gradient, "CHUNK_BYTES", 16 * 4 * 512)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple | list) else [result]:
                # The interpreter copies tensors as bytes.
                if isinstance(t, torch.Tensor) and t.is_floating_point():
                    largest = max(largest, t.numel())
            return result

    def watched(*which, backend=module._backend, **options):
        def run(*arguments):
            with Watch():
                return backend(*which, **options)(*arguments)

        return run

    monkeypatch.setattr(module, "_backend", watched)
    for head in ("all", "frozen head"):
        largest, given = 0, inputs((40, 4, 512, {"bias": True, "softcap": 3.0}), torch.float32, "cpu")
        results(ours(impl), given, head)
        assert largest == 16 * 512


def test_values_do_not_depend_on_whether_a_gradient_is_wanted(impl, device):
    """And gradients have the same bits again."""
    hidden, weight, targets, options = given = inputs("everything", torch.float32, device)
    first, second = (results(ours(impl), given, "all")[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)
    plain = sk.linear_logprob(hidden, weight, targets, impl=impl, **options)
    frozen = sk.linear_logprob(hidden.clone().requires_grad_(), weight, targets, impl=impl, **options)
    whole = sk.linear_logprob(hidden, weight.clone().requires_grad_(), targets, impl=impl, **options)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, frozen, whole, strict=True))


def test_no_rows_and_no_gradients(impl, device):
    weight = torch.randn(11, 4, device=device, requires_grad=True)
    hidden = torch.zeros(0, 4, device=device, requires_grad=True)
    logprob, lse = sk.linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64, device=device), impl=impl)
    (logprob.sum() + lse.sum()).backward()
    assert hidden.grad.shape == (0, 4) and not weight.grad.any()
    with torch.no_grad():
        assert not sk.linear_logprob(weight, weight, torch.arange(11, device=device), impl=impl)[0].requires_grad


def test_double_backward_is_refused():
    hidden, weight, targets, options = inputs("everything", torch.float32, "cpu")
    for t in (weight, weight.clone().requires_grad_()):
        hidden = hidden.detach().requires_grad_()
        logprob, _ = sk.linear_logprob(hidden, t, targets, **options)
        (once,) = torch.autograd.grad((logprob**2).sum(), hidden, create_graph=True)
        with pytest.raises(NotImplementedError, match="linear_logprob_backward has no backward"):
            once.sum().backward()


def test_an_input_changed_in_between_is_noticed():
    hidden, weight, targets, options = inputs("everything", torch.float32, "cpu")
    logprob, _ = sk.linear_logprob(hidden.requires_grad_(), weight, targets, **options)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.sum().backward()


@pytest.mark.parametrize(("impl", "head"), [("torch", "all"), ("reference", "frozen head")])
def test_opcheck(impl, head):
    hidden, weight, targets, options = inputs("everything", torch.float32, "cpu")
    mask = [name in HEADS[head] for name in NAMES]
    tensors = [t.clone().requires_grad_(w) for t, w in zip((hidden, weight, options["bias"]), mask, strict=True)]
    pointer, rest = options["target_ptr"], (0.7, 3.0, impl)
    arguments = (*tensors[:2], targets, pointer, tensors[2], *rest, head != "all")
    done = torch.library.opcheck(ops.linear_logprob.default, arguments)
    assert set(done.values()) == {"SUCCESS"}, done
    logprob, lse, mean = (t.detach() for t in ops.linear_logprob(*arguments))
    for first in (None, torch.randn_like(logprob)):
        done = torch.library.opcheck(
            ops.linear_logprob_backward.default,
            (first, torch.randn_like(lse), logprob, lse, mean, hidden, weight, targets, pointer, options["bias"],
             *rest, mask),
        )  # fmt: skip
        assert set(done.values()) == {"SUCCESS"}, done


@pytest.mark.parametrize(("head", "dynamic"), [("all", True), ("frozen head", False)])
def test_compiles_through_the_backward_pass(head, dynamic):
    given = inputs("everything", torch.float32, "cpu")

    # The operator itself: the public function looks at the targets on the host.
    def run(hidden, weight, targets, options):
        return ops.linear_logprob(
            hidden * 1, weight, targets, options["target_ptr"], options["bias"], 0.7, 3.0, "auto", head != "all"
        )[:2]

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    (values, got), (eager_values, eager) = (results(f, given, head) for f in (compiled, run))
    assert all(map(torch.equal, values, eager_values))
    assert all(eager[name] is None or torch.equal(got[name], eager[name]) for name in NAMES)
