"""Gradients of linear_logprob on every backend against autograd through the whole logits matrix in float64."""

from __future__ import annotations

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels import ops as module
from sapo_kernels.linear_logprob import gradient
from tests.kernels.test_linear_logprob import CASES, DTYPES, LOW, impl, inputs, written_out
from tests.oracles import skip_unless_runnable
from tests.tolerances import assert_close

__all__ = ["impl"]
pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
ops = torch.ops.sapo_kernels
NAMES = ("hidden", "weight", "bias")


def ours(impl):
    def run(hidden, weight, targets, options):
        return sk.linear_logprob(hidden, weight, targets, impl=impl, **options)

    return run


def plain(dtype):
    return lambda *given: written_out(*given, dtype=dtype)


def gradients(run, given, expected, dtype=None, pull=(1.0, 1.0)):
    """{name: gradient or None} of a weighted sum of both outputs; `pull` weighs (logprob, lse), 0 leaves it out."""
    hidden, weight, targets, options = given
    tensors = {"hidden": hidden, "weight": weight, "bias": options.get("bias")}
    tensors = {
        name: None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_(name in expected)
        for name, t in tensors.items()
    }
    options = {name: value for name, value in options.items() if name != "bias"} | {"bias": tensors["bias"]}
    generator, loss = torch.Generator().manual_seed(1), 0
    for output, factor in zip(run(tensors["hidden"], tensors["weight"], targets, options), pull, strict=True):
        draw = torch.randn(output.shape, generator=generator).to(output)
        if factor:
            loss = loss + factor * (output * draw).sum()
    loss.backward()
    return {name: None if t is None else t.grad for name, t in tensors.items()}


def check(row, got, exact, same=None):
    for name in NAMES:
        assert (got[name] is None) == (exact[name] is None), name
        if got[name] is not None:
            assert_close(row, got[name], exact[name], None if same is None else same[name])


HEADS = {"all": NAMES, "frozen head": ("hidden",), "head alone": ("weight", "bias"), "bias alone": ("bias",)}


FROZEN = ("one row", "127 rows", "one word", "softcap", "everything", "many targets a row", "rows without targets")


LOW_CASES = [(*low, expected) for low in (("few rows, many words", "bf16"), ("everything", "fp16"))
             for expected in ("all", "frozen head")]  # fmt: skip


@pytest.mark.parametrize(("case", "precision", "expected"), [
    *((case, "fp32", "all") for case in CASES), *((case, "fp32", "frozen head") for case in FROZEN), *LOW_CASES,
])  # fmt: skip
def test_gradients(case, precision, expected, impl, device):
    dtype, low = DTYPES[precision], precision in LOW
    given = inputs(case, dtype, device)
    got = gradients(ours(impl), given, HEADS[expected])
    assert all(t is None or t.dtype == dtype for t in got.values())
    exact = gradients(plain(torch.float64), given, HEADS[expected], torch.float64)
    same = gradients(plain(dtype), given, HEADS[expected]) if low else None
    check(f"logprob gradient {'low' if low else precision}", got, exact, same)


@pytest.mark.parametrize("dtype", LOW)
def test_a_likely_target_keeps_its_digits(dtype, impl, device):
    """1 - p = 0.006: a mean of weights that held the target's own would be all rounding."""
    hidden, weight, targets, options = inputs("17 rows", LOW[dtype], device, spread=0.1)
    options["bias"] = torch.zeros(len(weight), device=device, dtype=LOW[dtype])
    options["bias"][5] = 10.0
    given = (hidden, weight, targets * 0 + 5, options)
    exact = gradients(plain(torch.float64), given, ("hidden",), torch.float64, (1, 0))["hidden"]
    got, same = (gradients(run, given, ("hidden",), pull=(1, 0))["hidden"] for run in (ours(impl), plain(LOW[dtype])))
    assert 0 < exact.abs().max() < 0.1
    assert (got.double() - exact).norm() < 1.5 * (same.double() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("expected", HEADS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck(impl, expected):
    """Every option in float64, a target twice in a row, gradients of each subset of the inputs."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden": (6, 5), "weight": (23, 5), "bias": (23,)}
    given = [torch.randn(*sizes[name], generator=generator, dtype=torch.float64) for name in NAMES]
    given = [t.requires_grad_(name in HEADS[expected]) for name, t in zip(NAMES, given, strict=True)]
    targets, pointer = torch.tensor([3, 3, 22, 0, 7, 7, 7]), torch.tensor([0, 2, 2, 4, 4, 7, 7])
    for scale, softcap, biased in ((1.0, None, False), (0.7, 2.0, True), (0.0, None, True), (-1.5, 1.0, False)):

        def run(hidden, weight, bias, scale=scale, softcap=softcap, biased=biased):
            bias = bias if biased else None
            return sk.linear_logprob(hidden, weight, targets, bias, scale, softcap, impl, target_ptr=pointer)

        if biased or expected != "bias alone":
            assert torch.autograd.gradcheck(run, tuple(given))


@pytest.mark.parametrize("expected", ["all", "frozen head", "bias alone"])
def test_only_what_is_wanted_is_computed(expected, impl, device, monkeypatch):
    """A frozen head gets no gradient, and no tensor of its size is made on the way."""
    given = inputs("everything", torch.float32, device)
    asked = []
    run = gradient.from_logits
    monkeypatch.setattr(gradient, "from_logits", lambda *a: asked.append(list(a[-1])) or run(*a))
    got = gradients(ours(impl), given, HEADS[expected])
    assert {name for name in NAMES if got[name] is not None} == set(HEADS[expected])
    mask = [name in HEADS[expected] for name in NAMES]
    if impl != "reference":
        # The torch backend has the mean from its forward pass.
        assert asked == ([] if impl == "torch" and mask == [True, False, False] else [mask])
    found = ops.linear_logprob_backward(
        None, None, *ops.linear_logprob(*given[:2], given[2], given[3]["target_ptr"], None, 1.0, None, impl, True),
        *given[:2], given[2], given[3]["target_ptr"], None, 1.0, None, impl, mask,
    )  # fmt: skip
    assert [t is not None for t in found] == mask
    assert all(t is None or not t.any() for t in found)  # of no gradient at all


@pytest.mark.parametrize(("pull", "expected"), [((1.0, 0.0), "all"), ((0.0, 1.0), "frozen head")])
def test_one_output_alone(pull, expected, impl, device):
    given = inputs("everything", torch.float32, device)
    got = gradients(ours(impl), given, HEADS[expected], pull=pull)
    exact = gradients(plain(torch.float64), given, HEADS[expected], torch.float64, pull)
    check("logprob gradient fp32", got, exact)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("expected", ["all", "frozen head"])
def test_chunks_of_rows(impl, expected, monkeypatch):
    """The cuts fall between targets rightly, forward and backward."""
    skip_unless_runnable("linear_logprob", impl, "cpu")
    given = inputs("everything", torch.float32, "cpu")
    exact = gradients(plain(torch.float64), given, HEADS[expected], torch.float64)
    for rows in (7, 32) if impl == "triton" else (1, 7, 16, 32, 33):
        monkeypatch.setattr(gradient, "chunk_rows", lambda *_, rows=rows: rows)
        for got, value in zip(ours(impl)(*given), written_out(*given), strict=True):
            assert_close("linear_logprob fp32", got, value)
        check("logprob gradient fp32", gradients(ours(impl), given, HEADS[expected]), exact)


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
    for expected in ("all", "frozen head"):
        largest, given = 0, inputs((40, 4, 512, {"bias": True, "softcap": 3.0}), torch.float32, "cpu")
        gradients(ours(impl), given, HEADS[expected])
        assert largest == 16 * 512


@pytest.mark.parametrize("expected", ["all", "frozen head"])
def test_a_bad_row_is_bad_alone(expected, impl, device):
    """NaN in one hidden row: its gradient is NaN, those of the others are what they were."""
    hidden, weight, targets, options = inputs("everything", torch.float32, device)
    before = gradients(ours(impl), (hidden, weight, targets, options), HEADS[expected])["hidden"]
    hidden[[0, 20]] = float("nan")
    after = gradients(ours(impl), (hidden, weight, targets, options), HEADS[expected])
    good = torch.ones(len(hidden), dtype=torch.bool, device=device)
    good[[0, 20]] = False
    assert after["hidden"][~good].isnan().all()
    assert_close("logprob gradient fp32", after["hidden"][good], before[good])
    assert after["weight"] is None or after["weight"].isnan().any()


@pytest.mark.parametrize("expected", ["all", "frozen head"])
def test_a_banned_word_gets_no_gradient(expected, impl, device):
    """A bias of -inf: probability 0, and no NaN."""
    hidden, weight, targets, options = inputs("17 rows", torch.float32, device)
    options["bias"] = torch.zeros(len(weight), device=device)
    options["bias"][70:] = float("-inf")
    got = gradients(ours(impl), (hidden, weight, targets % 70, options), HEADS[expected])
    options["bias"] = options["bias"][:70]
    exact = gradients(
        plain(torch.float64), (hidden, weight[:70], targets % 70, options), HEADS[expected], torch.float64
    )
    assert_close("logprob gradient fp32", got["hidden"], exact["hidden"])
    if expected == "all":
        assert_close("logprob gradient fp32", got["weight"][:70], exact["weight"])
        assert (got["weight"][70:] == 0).all()


def test_values_do_not_depend_on_whether_a_gradient_is_wanted(impl, device):
    """And gradients have the same bits again."""
    hidden, weight, targets, options = given = inputs("everything", torch.float32, device)
    first, second = (gradients(ours(impl), given, NAMES) for _ in range(2))
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


@pytest.mark.parametrize(("impl", "expected"), [("torch", "all"), ("reference", "frozen head")])
def test_opcheck(impl, expected):
    hidden, weight, targets, options = inputs("everything", torch.float32, "cpu")
    mask = [name in HEADS[expected] for name in NAMES]
    tensors = [t.clone().requires_grad_(w) for t, w in zip((hidden, weight, options["bias"]), mask, strict=True)]
    pointer, rest = options["target_ptr"], (0.7, 3.0, impl)
    arguments = (*tensors[:2], targets, pointer, tensors[2], *rest, expected != "all")
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


@pytest.mark.parametrize(("expected", "dynamic"), [("all", True), ("frozen head", False)])
def test_compiles_through_the_backward_pass(expected, dynamic):
    given = inputs("everything", torch.float32, "cpu")

    # The operator itself: the public function looks at the targets on the host.
    def run(hidden, weight, targets, options):
        return ops.linear_logprob(
            hidden * 1, weight, targets, options["target_ptr"], options["bias"], 0.7, 3.0, "auto", expected != "all"
        )[:2]

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got, eager = (gradients(f, given, HEADS[expected]) for f in (compiled, run))
    assert all(eager[name] is None or torch.equal(got[name], eager[name]) for name in NAMES)
