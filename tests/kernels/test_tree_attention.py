"""tree_attention on every backend against causal attention on each sequence alone in float64, gradients too."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sapo_kernels as sk
from sapo_kernels.ops import BACKENDS
from tests.oracles import PrefixOracle, causal_attention, flatten, random_cells, skip_unless_runnable
from tests.tolerances import assert_close

# The interpreter computes with numpy, which warns of the NaN and infinities that tests put in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, **LOW}


def lengths_job(*lengths: int):
    """One prompt, and for each n one cell whose forward has n tokens behind a common beginning of n // 2."""
    cells = []
    for n in lengths:
        rng = random.Random(n)
        whole = [1] * (n // 2) + [rng.randrange(2, 9) for _ in range(n + 1 - n // 2)]
        cells.append((whole[: max(1, n - 2)], whole[max(1, n - 2) :]))
    return cells


JOBS = {
    "one token": lengths_job(1),
    "lengths": lengths_job(1, 15, 16, 17, 63, 127),
    "one prompt": random_cells(1, prompts=1, examples=6),
    "one example": random_cells(2, prompts=6, examples=1),
    "short siblings": [([1, 2, 3], [c, c]) for c in range(40)],
    "duplicates": random_cells(3, prompts=2, examples=3) * 3,
    "deep": [([1] * 70 + [2 + c] * 20, [3, 4]) for c in range(4)],
    "random": random_cells(4, prompts=3, examples=4, longest=12),
    "short": random_cells(6, prompts=2, examples=2, longest=4),
    "large": random_cells(5, prompts=5, examples=6, longest=20),
}
SLOW_INTERPRETED = "the interpreter takes too long; smaller cases go the same way"
# name: (job, q heads, kv heads, Dk, Dv, options). Left out: the cross product of head sizes with options,
# which no backend handles together.
CASES = {
    **{f"job {name}": (name, 4, 2, 16, 16, {}) for name in JOBS},
    "one head": ("random", 1, 1, 16, 16, {}),
    "one kv head, 7 groups": ("random", 7, 1, 16, 16, {}),
    "no groups": ("short siblings", 3, 3, 16, 16, {}),
    "head 64": ("random", 2, 1, 64, 64, {}),
    "head 80": ("random", 2, 1, 80, 80, {}),
    "head 128": ("random", 4, 1, 128, 128, {}),
    "head 256": ("short siblings", 2, 1, 256, 256, {}),
    "head 192/128": ("random", 2, 2, 192, 128, {}),
    "head 16/48": ("random", 4, 2, 16, 48, {}),
    "window 1": ("random", 4, 2, 16, 16, {"window": 1}),
    "window 5": ("lengths", 4, 2, 16, 16, {"window": 5}),
    "window 64": ("deep", 4, 2, 16, 16, {"window": 64}),
    "softcap": ("random", 4, 2, 16, 16, {"softcap": 1.5}),
    "sinks": ("lengths", 4, 2, 16, 16, {"sinks": True}),
    "scale": ("random", 4, 2, 16, 16, {"scale": 1.25}),
    "everything": ("deep", 6, 2, 24, 32, {"window": 30, "softcap": 2.0, "sinks": True, "scale": 0.7}),
}
TREES = {name: (sk.plan_trie(*flatten(cells)), PrefixOracle(cells)) for name, cells in JOBS.items()}


@pytest.fixture(params=BACKENDS["tree_attention"])
def impl(request, device):
    skip_unless_runnable("tree_attention", request.param, device)
    return request.param


def inputs(case, dtype, device, seed=0):
    """(q, k, v, options) of a case, N(0, 1), the same for every backend and device."""
    job, q_heads, kv_heads, width, value_width, options = CASES[case] if isinstance(case, str) else case
    generator = torch.Generator().manual_seed(seed)
    shapes = ((q_heads, width), (kv_heads, width), (kv_heads, value_width))
    q, k, v = (torch.randn(len(TREES[job][0]), *s, generator=generator).to(device, dtype) for s in shapes)
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.randn(q_heads, generator=generator).to(device)
    return q, k, v, options


def each_alone(job, q, k, v, options, dtype, attend=causal_attention):
    """[T, Hq, Dv]: `attend` in `dtype` on every root-to-leaf path; shared rows must come out alike."""
    options = {"scale": q.shape[-1] ** -0.5, **options}
    out = torch.full((*q.shape[:2], v.shape[-1]), float("nan"), dtype=dtype, device=q.device)
    oracle = TREES[job][1]
    for leaf in sorted(set(oracle.leaf)):
        path = torch.tensor(oracle.path(leaf), device=q.device)
        out[path] = attend(q[path].to(dtype), k[path].to(dtype), v[path].to(dtype), **options).to(dtype)
    return out


def torch_attention(q, k, v, scale, window=None, softcap=None, sinks=None):
    """What the same dtype costs in PyTorch: its fused kernel, or products in that dtype where it has none."""
    if window is not None or softcap is not None or sinks is not None:
        return causal_attention(q, k, v, scale, window, softcap, sinks)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def results(attend, tensors, options, up=None):
    """(output, gradients of q, k, v and of the sinks where there are any), without `up` no gradients."""
    leaves = {name: t.detach().clone().requires_grad_(up is not None) for name, t in tensors.items()}
    options = dict(options)
    if options.get("sinks") is not None:
        leaves["sinks"] = options["sinks"] = options["sinks"].detach().clone().requires_grad_(up is not None)
    out = attend(leaves["q"], leaves["k"], leaves["v"], options)
    if up is None:
        return out, {}
    return out, dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), up.to(out.dtype)), strict=True))


def widened(values: dict) -> dict:
    return {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in values.items()}


def pull(q, v) -> torch.Tensor:
    """What the gradient of the output is."""
    return torch.randn(*q.shape[:2], v.shape[2], generator=torch.Generator().manual_seed(1)).to(q.device)


# Shapes and options that go another way through the backward pass than through the forward one.
GRADIENTS = ["job one token", "job lengths", "job short siblings", "job deep", "one kv head, 7 groups", "head 80",
             "head 16/48", "window 1", "window 5", "softcap", "sinks", "scale", "everything"]  # fmt: skip


@pytest.mark.parametrize(("case", "precision", "backward"), [
    *((case, "fp32", case in GRADIENTS) for case in CASES), ("head 192/128", "bf16", True), ("sinks", "fp16", True),
    ("job lengths", "bf16", False), ("everything", "bf16", False), ("job lengths", "fp64", False),
    ("everything", "fp64", False),
])  # fmt: skip
def test_every_sequence_is_what_it_is_alone(case, precision, backward, impl, device, poisoned_outputs):
    if impl == "triton" and device == "cpu" and case == "job large":
        pytest.skip(SLOW_INTERPRETED)
    if impl == "triton" and precision == "fp64":
        pytest.skip("Triton's kernels compute in float32")
    dtype, job, low = DTYPES[precision], CASES[case][0], precision in LOW
    q, k, v, options = inputs(case, dtype, "cpu" if precision == "fp64" else device)
    given = {"q": q, "k": k, "v": v}
    up = pull(q, v) if backward else None

    def ours(q, k, v, options):
        return sk.tree_attention(q, k, v, TREES[job][0], impl=impl, **options)

    def alone(dtype, attend):
        return lambda q, k, v, options: each_alone(job, q, k, v, options, dtype, attend)

    got, gradients = results(ours, given, options, up)
    exact, exact_gradients = results(alone(torch.float64, causal_attention), widened(given), widened(options), up)
    plain, plain_gradients = results(alone(dtype, torch_attention), given, options, up) if low else (None, {})
    row = "low" if low else precision
    assert got.dtype == dtype
    assert_close(f"tree_attention {row}", got, exact, plain)
    for name, expected in exact_gradients.items():
        assert name == "sinks" or gradients[name].dtype == dtype
        assert_close(f"tree_attention gradient {row}", gradients[name], expected, plain_gradients.get(name))


def in_passes(trie, q, k, v, impl, options, apart=False, budget=7, block_tokens=4):
    """[outputs of each pass]: keys and values go from pass to pass by `next_past` alone, as the decoder does it."""
    past, parts = (k[:0], v[:0]), []
    for step in trie.passes(budget, block_tokens):
        step = step.to(q.device)
        own = slice(step.start, step.stop)
        joined = [torch.cat(pair) for pair in zip(past, (k[own], v[own]), strict=True)]
        given = {"k": k[own], "v": v[own], "past": past} if apart else dict(zip("kv", joined, strict=True))
        parts.append(sk.tree_attention(q[own], trie=step, impl=impl, **given, **options))
        past = tuple(t[step.next_past] for t in joined)
    return parts


@pytest.mark.parametrize("budget, block_tokens", [(1, 64), (7, 4), (64, 1)])
@pytest.mark.parametrize("case", ["job random", "everything"])
def test_passes_one_after_the_other_are_the_whole(case, budget, block_tokens, impl, device, poisoned_outputs):
    if impl == "triton" and device == "cpu" and (budget < 7 or block_tokens == 1):
        pytest.skip(SLOW_INTERPRETED)
    q, k, v, options = inputs(case, torch.float32, device)
    trie = TREES[CASES[case][0]][0]
    joined, apart = (in_passes(trie, q, k, v, impl, options, apart, budget, block_tokens) for apart in (False, True))
    assert all(map(torch.equal, apart, joined)), "the same bits from two buffers"
    exact = each_alone(CASES[case][0], q, k, v, options, torch.float64)
    assert_close("tree_attention fp32", torch.cat(joined), exact)


def test_strides_do_not_matter(impl, device, poisoned_outputs):
    """Heads first in memory, a slice of a fused projection, one kv head expanded, last dim strided."""
    case = ("random", 4, 2, 16, 16, {"sinks": True})
    q, k, v, options = inputs(case, torch.float32, device)
    trie = TREES["random"][0]
    expected = sk.tree_attention(q, k, v, trie, impl=impl, **options)
    fused = torch.cat([q, k, v], 1)
    spread = torch.full((*v.shape[:2], 2 * v.shape[2]), float("nan"), device=device)
    spread[..., ::2] = v
    sinks = torch.stack([options["sinks"], options["sinks"] + 1], 1)[:, 0]
    layouts = {
        "heads first": [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)],
        "fused": fused.split([4, 2, 2], 1),
        "last dim": [q, k, spread[..., ::2]],
    }
    for name, tensors in layouts.items():
        assert any(not t.is_contiguous() for t in tensors)
        got = sk.tree_attention(*tensors, trie, impl=impl, sinks=sinks)
        assert torch.equal(got, expected), name
    k, v = k[:, :1], v[:, :1]
    expected = sk.tree_attention(q, k.expand(-1, 2, -1).contiguous(), v.repeat(1, 2, 1), trie, impl=impl)
    assert torch.equal(sk.tree_attention(q, k.expand(-1, 2, -1), v.expand(-1, 2, -1), trie, impl=impl), expected)


def test_large_logits(impl, device):
    """Logits of 1e5 leave one key per query; nothing overflows."""
    scale = 1e4
    q, k, v, _ = inputs("job random", torch.float32, device)
    q, k = (t.round() for t in (q, k))  # products of small integers are exact, so the largest logit is never in doubt
    got = sk.tree_attention(q, k, v, TREES["random"][0], scale=scale, impl=impl)
    assert_close("tree_attention fp32", got, each_alone("random", q, k, v, {"scale": scale}, torch.float64))


@pytest.mark.parametrize(
    "what, bad, options",
    [("k", float("nan"), {}), ("v", float("inf"), {"window": 3}), ("v", float("nan"), {"softcap": 2.0})],
    ids=str,
)
def test_what_a_query_does_not_see_cannot_hurt_it(what, bad, options, impl, device, poisoned_outputs):
    """NaN in one sibling stays in its own subtree, though siblings share a block."""
    q, k, v, _ = inputs("job short siblings", torch.float32, device)
    trie, oracle = TREES["short siblings"]
    expected = sk.tree_attention(q, k, v, trie, impl=impl, **options)
    sick = oracle.leaf[17]
    (k if what == "k" else v)[sick] = bad
    got = sk.tree_attention(q, k, v, trie, impl=impl, **options)
    sees = [i for i in range(len(trie)) if sick in oracle.path(i)]
    healthy = torch.tensor([i not in sees for i in range(len(trie))])
    assert len(sees) == 1 and healthy.sum() == len(trie) - 1
    assert_close("tree_attention fp32", got[healthy], expected[healthy])
    assert not got[sick].isfinite().all(), "what it does see is not hidden either"


def test_past_keys_behind_the_window_cannot_hurt(impl, device, poisoned_outputs):
    q, k, v, _ = inputs("job deep", torch.float32, device)
    trie = TREES["deep"][0]
    step = trie.make_pass(60, 70).to(device)
    args = q[60:70], k[:70].clone(), v[:70].clone()
    expected = sk.tree_attention(*args, step, window=8, impl=impl)
    args[1][:53], args[2][:53] = float("nan"), float("nan")
    assert_close("tree_attention fp32", sk.tree_attention(*args, step, window=8, impl=impl), expected)
    args[1][53] = float("nan")
    touched = ~sk.tree_attention(*args, step, window=8, impl=impl).isfinite().all(-1).all(-1)
    assert touched.tolist() == [True] + [False] * 9, "key 53 is the oldest that query 60 sees"


def passes_of(job, budget=30, share=0.4):
    """(mask of tokens that are keys in front and no queries, [(pass, its queries, trie tokens of its keys)])."""
    trie, oracle = TREES[job]
    cached = np.random.default_rng(7).random(len(trie)) < share
    cached[trie.row_token] = False
    steps = []
    for step in trie.passes(budget, 8, cached if share else None):
        inside = np.arange(step.start, step.stop)
        new = inside[~cached[inside]]
        keys = torch.from_numpy(np.concatenate([oracle.path(step.start)[:-1], inside[cached[inside]], new])).long()
        steps.append((step, new, keys))
    assert sum(step.num_cached for step, *_ in steps) == cached.sum()
    return cached, steps


@pytest.mark.parametrize(
    ("case", "backward"), [("job deep", False), ("everything", False), ("job random", True), ("window 5", True)]
)
def test_keys_that_the_caller_holds(case, backward, impl, device, poisoned_outputs):
    """What the others see is as in a trie of which nothing is cached: values, and gradients of the keys held, too."""
    q, k, v, options = inputs(case, torch.float32, device)
    cached, steps = passes_of(CASES[case][0])
    assert cached.sum() > 5

    def of_the_others(q, k, v, options):
        calls = [(q[new], k[keys], v[keys], step.to(device)) for step, new, keys in steps]
        return torch.cat([sk.tree_attention(*call, impl=impl, **options) for call in calls])

    def alone(q, k, v, options):
        return each_alone(CASES[case][0], q, k, v, options, torch.float64)[~cached]

    given, up = {"q": q, "k": k, "v": v}, pull(q, v)[~cached] if backward else None
    if impl == "reference":
        with pytest.raises(ValueError, match="trie: expected a pass without cached tokens"):
            results(of_the_others, given, options)
        return
    got, gradients = results(of_the_others, given, options, up)
    exact, exact_gradients = results(alone, widened(given), widened(options), up)
    assert_close("tree_attention fp32", got, exact)
    for name, expected in exact_gradients.items():
        assert_close("tree_attention gradient fp32", gradients[name], expected)


def good_call():
    """Arguments of a call that works; each case of `BAD` spoils one."""
    q, k, v, _ = inputs("job random", torch.float32, "cpu")
    return {"q": q, "k": k, "v": v, "trie": TREES["random"][0], "impl": "auto"}


BAD = {
    "q of integers": (lambda a: {"q": a["q"].int()}, TypeError, "q: expected one of .*float32.*got torch.int32"),
    "k of another dtype": (lambda a: {"k": a["k"].double()}, TypeError, "k: .*same as q, got torch.float64"),
    "v elsewhere": (lambda a: {"v": a["v"].to("meta")}, ValueError, "v: expected q's device cpu, got meta"),
    "q without heads": (lambda a: {"q": a["q"][:, 0]}, ValueError, r"q: expected \[\d+, heads, head_dim\].*got \["),
    "q a token short": (lambda a: {"q": a["q"][1:]}, ValueError, "q: expected .* for this pass, got"),
    "v a token short": (lambda a: {"v": a["v"][:-1]}, ValueError, "v: expected .* for this pass, got"),
    "3 q heads, 2 kv": (lambda a: {"q": a["q"][:, :3]}, ValueError, "heads: expected .*got 3, 2 and 2"),
    "no kv heads": (lambda a: {n: a[n][:, :0] for n in "kv"}, ValueError, "heads: .*got 4, 0 and 0"),
    "no q heads": (lambda a: {"q": a["q"][:, :0]}, ValueError, "heads: .*got 0, 2 and 2"),
    "q and k width": (lambda a: {"k": a["k"][..., :8]}, ValueError, "head_dim: .*got 16 and 8"),
    "no v width": (lambda a: {"v": a["v"][..., :0]}, ValueError, "head_dim"),
    "window 0": (lambda a: {"window": 0}, ValueError, "window: expected at least 1 or None, got 0"),
    "softcap 0": (lambda a: {"softcap": 0.0}, ValueError, "softcap: expected a positive number or None, got 0.0"),
    "scale nan": (lambda a: {"scale": float("nan")}, ValueError, "scale: .*got nan"),
    "sinks of kv heads": (lambda a: {"sinks": torch.zeros(2)}, ValueError, r"sinks: expected a float tensor \[4\]"),
    "sinks of integers": (lambda a: {"sinks": torch.zeros(4).int()}, ValueError, "sinks: .*got torch.int32"),
    "sinks elsewhere": (lambda a: {"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks: .*on meta"),
    "past of another width": (lambda a: {"past": (a["k"][:0], a["v"][:0, :, :4])}, ValueError, "past: expected heads"),
    "past a token long": (lambda a: {"past": (a["k"][:1], a["v"][:1])}, ValueError, r"past k: expected \[0, heads"),
    "an empty trie": (lambda a: {"trie": sk.plan_trie([], [0], [])}, ValueError, "trie: expected at least one token"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    spoil, error, message = BAD[name]
    arguments = good_call()
    assert sk.tree_attention(**arguments).isfinite().all()
    with pytest.raises(error, match=message):
        sk.tree_attention(**{**arguments, **spoil(arguments)})
