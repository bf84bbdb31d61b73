"""linear_logprob on every backend against log_softmax of the whole logits matrix in float64, gradients too."""

from __future__ import annotations

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.ops import BACKENDS
from tests.oracles import skip_unless_runnable
from tests.tolerances import assert_close

# The interpreter computes with numpy, which warns of the NaN and infinities that tests put in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, **LOW}
# name: (rows, width, vocabulary, options); "owned" says how many targets the rows own, in turn.
CASES = {
    "one row": (1, 16, 50, {}),
    "17 rows": (17, 16, 128, {}),
    "63 rows": (63, 80, 127, {}),
    "127 rows": (127, 16, 257, {}),
    "one word": (5, 16, 1, {}),
    "width 200": (9, 200, 130, {}),
    "few rows, many words": (2, 32, 1301, {}),
    "bias": (17, 16, 129, {"bias": True}),
    "scale": (17, 16, 129, {"scale": 0.125}),
    "softcap": (17, 16, 129, {"softcap": 3.0}),
    "everything": (33, 48, 300, {"bias": True, "scale": 2.5, "softcap": 4.0, "owned": (2, 0, 5, 1)}),
    "many targets a row": (7, 16, 60, {"owned": (60, 3)}),
    "rows without targets": (9, 16, 60, {"owned": (0, 1, 0, 0, 2)}),
    "no targets at all": (6, 16, 60, {"owned": (0,)}),
}


@pytest.fixture(params=BACKENDS["linear_logprob"])
def impl(request, device):
    skip_unless_runnable("linear_logprob", request.param, device)
    return request.param


def inputs(case, dtype, device, spread=1.0):
    """(hidden, weight, targets, options with target_ptr); logits are N(0, (3 * spread)^2)."""
    rows, width, vocabulary, options = CASES[case] if isinstance(case, str) else case
    generator = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    options = dict(options)
    owned = options.pop("owned", (1,))
    counts = torch.tensor([owned[r % len(owned)] for r in range(rows)])
    hidden = 3 * spread * torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    targets = torch.randint(0, vocabulary, (int(counts.sum()),), generator=generator)
    if len(targets) > 1:
        targets[0], targets[-1] = 0, vocabulary - 1
    if options.get("bias"):
        options["bias"] = torch.randn(vocabulary, generator=generator).to(device, dtype)
    options["target_ptr"] = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(device)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), options


def written_out(hidden, weight, targets, options, dtype=torch.float64):
    """(logprob, lse) by whole logits in `dtype`, softmax in at least float32, target by target."""
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if options.get("bias") is not None:
        logits = logits + options["bias"].to(dtype)
    logits = logits * options.get("scale", 1.0)
    if options.get("softcap") is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    table, pointer = torch.log_softmax(logits, -1), options["target_ptr"].tolist()
    logprob = [table[r, int(targets[p])] for r in range(len(table)) for p in range(pointer[r], pointer[r + 1])]
    return (torch.stack(logprob) if logprob else table.new_empty(0)), torch.logsumexp(logits, -1)


def ours(impl):
    def run(hidden, weight, targets, options):
        return sk.linear_logprob(hidden, weight, targets, impl=impl, **options)

    return run


def plain(dtype):
    return lambda *given: written_out(*given, dtype=dtype)


NAMES = ("hidden", "weight", "bias")
# What has a gradient.
HEADS = {"all": NAMES, "frozen head": ("hidden",), "head alone": ("weight", "bias"), "bias alone": ("bias",)}


def results(run, given, head, dtype=None, pull=(1.0, 1.0)):
    """Both outputs, and {name: gradient or None} of a weighted sum of them: `pull` weighs (logprob, lse)."""
    hidden, weight, targets, options = given
    tensors = {"hidden": hidden, "weight": weight, "bias": options.get("bias")}
    tensors = {
        name: None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_(name in HEADS[head])
        for name, t in tensors.items()
    }
    options = {name: value for name, value in options.items() if name != "bias"} | {"bias": tensors["bias"]}
    outputs = run(tensors["hidden"], tensors["weight"], targets, options)
    generator, loss = torch.Generator().manual_seed(1), 0
    for output, factor in zip(outputs, pull, strict=True):
        draw = torch.randn(output.shape, generator=generator).to(output)
        if factor:
            loss = loss + factor * (output * draw).sum()
    loss.backward()
    return outputs, {name: None if t is None else t.grad for name, t in tensors.items()}


def check(row, got, exact, same=None):
    """Of `results`: tolerances of values ("linear_logprob ...") and of gradients ("logprob gradient ...")."""
    for i in range(2):
        assert_close(f"linear_logprob {row}", got[0][i], exact[0][i], same and same[0][i])
    for name in NAMES:
        assert (got[1][name] is None) == (exact[1][name] is None), name
        if got[1][name] is not None:
            assert_close(f"logprob gradient {row}", got[1][name], exact[1][name], same and same[1][name])


FROZEN = ("one row", "127 rows", "one word", "softcap", "everything", "many targets a row", "rows without targets")


@pytest.mark.parametrize(("case", "precision", "head"), [
    *((case, "fp32", "all") for case in CASES), *((case, "fp32", "frozen head") for case in FROZEN),
    *((case, low, head) for case, low in (("few rows, many words", "bf16"), ("everything", "fp16"))
      for head in ("all", "frozen head")),
    ("width 200", "bf16", "all"), ("63 rows", "fp64", "frozen head"), ("everything", "fp64", "all"),
])  # fmt: skip
def test_values_and_gradients(case, precision, head, impl, device, poisoned_outputs):
    if impl == "triton" and precision == "fp64":
        pytest.skip("Triton's kernels compute in float32")
    dtype, low = DTYPES[precision], precision in LOW
    given = inputs(case, dtype, "cpu" if precision == "fp64" else device)
    before = [t.clone() for t in (*given[:3], given[3]["target_ptr"])]
    got = results(ours(impl), given, head)
    assert all(map(torch.equal, (*given[:3], given[3]["target_ptr"]), before)), "inputs are left alone"
    assert [t.dtype for t in got[0]] == [torch.promote_types(dtype, torch.float32)] * 2
    assert all(t is None or t.dtype == dtype for t in got[1].values())
    exact = results(plain(torch.float64), given, head, torch.float64)
    check("low" if low else precision, got, exact, results(plain(dtype), given, head) if low else None)


def test_one_target_a_row_needs_no_pointer(impl, device):
    hidden, weight, targets, options = inputs("17 rows", torch.float32, device)
    assert options["target_ptr"].tolist() == list(range(18))
    with_pointer = sk.linear_logprob(hidden, weight, targets, impl=impl, **options)
    without = sk.linear_logprob(hidden, weight, targets, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(with_pointer, without, strict=True))


def test_empty(impl, device):
    """No rows, no targets; a vocabulary of one word has probability one."""
    weight = torch.randn(11, 4, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for pointer, given in ((None, weight), (none.new_zeros(1), weight), (None, weight.bfloat16())):
        got = sk.linear_logprob(given[:0], given, none, impl=impl, target_ptr=pointer)
        assert [(list(t.shape), t.dtype) for t in got] == [([0], torch.float32)] * 2
    logprob, lse = sk.linear_logprob(weight, weight[:1], none.new_zeros(11), impl=impl)
    assert logprob.tolist() == [0.0] * 11
    assert_close("linear_logprob fp32", lse, weight.double() @ weight[0].double())


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits(sign, impl, device, poisoned_outputs):
    """Logits of 1e4 neither overflow nor vanish."""
    hidden, weight, targets, options = inputs((9, 16, 200, {"owned": (3,)}), torch.float32, device, spread=1e4 / 3)
    exact = written_out(sign * hidden, weight, targets, options)
    assert exact[1].max() > 1e4
    for got, value in zip(sk.linear_logprob(sign * hidden, weight, targets, impl=impl, **options), exact, strict=True):
        assert_close("linear_logprob extreme", got, value)
    # A bias that leaves one word alone: everything but it is at -1e4.
    bias = torch.full((200,), -1e4, device=device)
    bias[7] = 0.0
    got, _ = sk.linear_logprob(hidden * 1e-4, weight, targets * 0 + 7, bias=bias, impl=impl, **options)
    assert (got == 0).all()


# Not here: infinite logits under a softcap, which makes them finite, in the model too.
@pytest.mark.parametrize(("case", "bad", "head"), [
    ("everything", float("nan"), "all"), ("everything", float("nan"), "frozen head"),
    ("few rows, many words", float("inf"), "frozen head"),
])  # fmt: skip
def test_bad_rows_are_bad_and_no_others(case, bad, head, impl, device, poisoned_outputs):
    hidden, weight, targets, options = inputs(case, torch.float32, device)
    expected, before = results(ours(impl), (hidden, weight, targets, options), head)
    sick = torch.zeros(len(hidden), dtype=torch.bool, device=device)
    sick[:: max(1, len(hidden) // 3)] = True
    sick[-1] = False
    hidden[sick, 0] = bad
    if bad == float("inf"):
        hidden[sick, 1:] = 0.0  # logits of +inf and -inf, not NaN
    (logprob, lse), after = results(ours(impl), (hidden, weight, targets, options), head)
    owner = torch.arange(len(hidden), device=device).repeat_interleave(options["target_ptr"].diff())
    assert torch.equal(~lse.isfinite(), sick)
    assert torch.equal(~logprob.isfinite(), sick[owner])
    assert_close("linear_logprob fp32", lse[~sick], expected[1][~sick])
    assert_close("linear_logprob fp32", logprob[~sick[owner]], expected[0][~sick[owner]])
    assert after["hidden"][sick].isnan().all()
    assert_close("logprob gradient fp32", after["hidden"][~sick], before["hidden"][~sick])
    assert after["weight"] is None or after["weight"].isnan().any()


@pytest.mark.parametrize("head", ["all", "frozen head"])
def test_words_of_minus_infinity_have_no_probability(head, impl, device, poisoned_outputs):
    """A bias of -inf bans a word: its log-probability is -inf, its gradient 0; the others stay a distribution."""
    hidden, weight, targets, options = inputs("17 rows", torch.float32, device)
    bias = torch.zeros(len(weight), device=device)
    bias[:65] = float("-inf")  # a whole tile of a kernel, and one more
    pointer = torch.arange(18, device=device) * 128
    every = torch.arange(128, device=device).repeat(17)
    logprob, lse = sk.linear_logprob(hidden, weight, every, bias=bias, impl=impl, target_ptr=pointer)
    logprob = logprob.view(17, 128)
    assert (logprob[:, :65] == float("-inf")).all() and lse.isfinite().all()
    exact = torch.log_softmax(hidden.double() @ weight[65:].double().T, -1)
    assert_close("linear_logprob fp32", logprob[:, 65:], exact)
    kept = targets % 63
    _, got = results(ours(impl), (hidden, weight, 65 + kept, {**options, "bias": bias}), head)
    given = (hidden, weight[65:], kept, {**options, "bias": bias[65:]})
    _, exact = results(plain(torch.float64), given, head, torch.float64)
    assert_close("logprob gradient fp32", got["hidden"], exact["hidden"])
    if head == "all":
        assert_close("logprob gradient fp32", got["weight"][65:], exact["weight"])
        assert not got["weight"][:65].any()


def test_a_nan_word_spoils_every_row(impl, device):
    """NaN in one row of the weight is in every log-sum-exp, wherever the target is."""
    hidden, weight, targets, options = inputs("few rows, many words", torch.float32, device)
    for word in (0, 1300):
        sick = weight.clone()
        sick[word] = float("nan")
        logprob, lse = sk.linear_logprob(hidden, sick, targets, impl=impl, **options)
        assert not logprob.isfinite().any() and not lse.isfinite().any()


def test_strides_do_not_matter(impl, device, poisoned_outputs):
    """A transposed weight, every second hidden row, a strided bias, targets and pointer."""
    hidden, weight, targets, options = inputs("everything", torch.float32, device)
    expected = sk.linear_logprob(hidden, weight, targets, impl=impl, **options)

    def spread(t):
        wide = torch.full((2 * len(t), *t.shape[1:]), 1 if t.dtype == torch.int64 else float("nan"),
                          dtype=t.dtype, device=device)  # fmt: skip
        wide[::2] = t
        return wide[::2]

    options.update(bias=spread(options["bias"]), target_ptr=spread(options["target_ptr"]))
    transposed = weight.T.contiguous().T
    assert not transposed.is_contiguous() and not options["bias"].is_contiguous()
    got = sk.linear_logprob(spread(hidden), transposed, spread(targets), impl=impl, **options)
    for one, other in zip(got, expected, strict=True):
        assert_close("linear_logprob fp32", one, other)


def bad_arguments():
    """name: (error, message, what to change in a call that works)."""
    hidden, weight, targets, _ = inputs("17 rows", torch.float32, "cpu")
    pointer = torch.arange(18)
    value, kind = ValueError, TypeError
    return {
        "hidden 1-D": (value, r"hidden \[R, D\]", {"hidden": hidden[0], "targets": targets[:16]}),
        "hidden of integers": (kind, "hidden: .*got torch.int32", {"hidden": hidden.int()}),
        "weight of another dtype": (kind, "weight: .*got torch.float16", {"weight": weight.half()}),
        "weight of another width": (value, r"got \[17, 16\] and \[128, 8\]", {"weight": weight[:, :8]}),
        "no words": (value, r"weight \[V, D\].*\[0, 16\]", {"weight": weight[:0]}),
        "bias of another size": (value, r"bias: expected \[128\], got \[127\]", {"bias": weight[1:, 0]}),
        "bias of another dtype": (kind, "bias: .*float64", {"bias": weight[:, 0].double()}),
        "too few targets": (value, r"targets: expected \[17\].*got \[16\]", {"targets": targets[1:]}),
        "targets elsewhere": (value, "targets: expected hidden's device", {"targets": targets.to("meta")}),
        "targets int32": (value, "targets: expected int64.*int32", {"targets": targets.int()}),
        "target = V": (value, r"ids in \[0, 128\), got 128", {"targets": targets * 0 + 128}),
        "target -1": (value, "targets: expected ids .*got -1", {"targets": targets - 1}),
        "pointer too short": (value, r"target_ptr: expected int64 \[18\]", {"target_ptr": pointer[:-1]}),
        "pointer from 1": (value, "target_ptr: expected ascending offsets", {"target_ptr": pointer.clamp(min=1)}),
        "pointer back": (value, "expected ascending offsets", {"target_ptr": torch.tensor([0, 9, 8, *range(3, 18)])}),
        "scale nan": (value, "scale: expected a finite number, got nan", {"scale": float("nan")}),
        "softcap 0": (value, "softcap: expected a positive number or None, got 0.0", {"softcap": 0.0}),
    }


BAD = bad_arguments()


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    error, message, changes = BAD[name]
    hidden, weight, targets, _ = inputs("17 rows", torch.float32, "cpu")
    arguments = {"hidden": hidden, "weight": weight, "targets": targets}
    assert sk.linear_logprob(**arguments)[0].isfinite().all()
    with pytest.raises(error, match=f"linear_logprob.*{message}"):
        sk.linear_logprob(**{**arguments, **changes})
