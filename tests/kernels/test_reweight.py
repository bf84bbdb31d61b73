"""reweight_, compiled and plain, against the Python oracle and by hand; the public function; the GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.reweight.reference import reweight_reference
from sapo_kernels.reweight.torch import reweight_torch
from tests.native_cases import (
    LARGEST,
    POOLS,
    SIZES,
    SMALLEST,
    WRITTEN,
    assert_same_bits,
    everywhere,
    losses,
    needs_compiled,
    needs_cuda_kernels,
    new_state,
    numbers,
    played,
    scenario,
    storage_bytes,
    strided,
)

op = torch.ops.sapo_kernels.reweight_
# (rtol, atol) of one update. A mean may err by its last bits, which a temperature of 1e-4 makes 1e-11 of a probability.
CLOSE = {"mean": (1e-13, 1e-15), "weight": (1e-15, 0.0), "probs": (0.0, 1e-9), "effective": (1e-8, 0.0)}


def assert_close(got, expected, what="") -> None:
    """The written tensors of one update, in their order."""
    for name, a, b in zip(WRITTEN, got, expected, strict=True):
        a = a.cpu()
        if name == "best":
            assert torch.equal(a, b), f"{what} best: got {a}, expected {b}"
        else:
            rtol, atol = CLOSE[name]
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what} {name}: {m}")  # noqa: B023


@everywhere
def test_three_thousand_sequences_against_the_oracle(impl):
    """Prompts from 1 to 97, ragged live masks, every decay, temperature and floor, losses that are not finite.

    Every step of the oracle starts from our own state, so that errors do not grow and near ties stay what they are.
    """
    chosen = 0
    for seed in range(30):
        prompts, steps = scenario(seed)
        state = new_state(POOLS, prompts, impl.device)
        for live, nll, tokens, *rest in steps:
            expected = [value.tolist() for value in state]
            reweight_reference(*expected, live.tolist(), nll.tolist(), tokens.tolist(), *rest)
            impl.reweight_(*state, *(v.to(impl.device) for v in (live, nll, tokens)), *rest)
            expected = [torch.tensor(e, dtype=v.dtype) for e, v in zip(expected, state, strict=True)]
            assert_close(state, expected, f"seed {seed}, {rest}:")
            chosen += int((state[3] >= 0).sum())
    assert chosen > 3_000


@needs_compiled
def test_compiled_and_plain_agree_at_the_ends_of_the_range():
    """Numbers that overflow, underflow or are negative zeros, where the oracle itself rounds otherwise."""
    rng = np.random.default_rng(0)
    extremes = np.asarray([0.0, -0.0, 1.0, -1.0, SMALLEST, -SMALLEST, 1e-308, 1e308, -1e308, LARGEST, -LARGEST,
                           np.nan, np.inf, -np.inf])  # fmt: skip
    counts = np.asarray([0, 1, 2, -1, 2**53 + 1, 2**63 - 1, -(2**63)])
    for _ in range(100):
        shape = (int(rng.integers(1, 6)), int(rng.choice(SIZES)))
        ours = [torch.from_numpy(rng.choice(extremes, shape)) for _ in range(3)] + new_state(*shape)[3:]
        other = [value.clone() for value in ours]
        for _ in range(3):
            step = (
                torch.from_numpy(rng.random(shape) < 0.7),
                torch.from_numpy(np.where(rng.random(shape) < 0.5, rng.choice(extremes, shape), rng.random(shape))),
                torch.from_numpy(rng.choice(counts, shape)),
                *numbers(rng),
            )
            op(*ours, *step)
            reweight_torch(*other, *step)
            assert_close(ours, other, f"{step[3:]}")


def scored(impl, means, temperature=0.0, floor=0.0):
    """The state, on the CPU, of one pool scored once with these mean losses."""
    mean = torch.tensor([means], dtype=torch.float64, device=impl.device)
    state, count = new_state(*mean.shape, impl.device), torch.ones_like(mean, dtype=torch.int64)
    impl.reweight_(*state, count.bool(), mean, count, 1.0, temperature, floor)
    return dict(zip(WRITTEN, (value.cpu() for value in state), strict=True))


@everywhere
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_ties_go_to_the_lowest_index(impl, temperature):
    """Beside each other, and across the lanes and rounds of a warp; 0.0 and -0.0 are equal."""
    for first, second in [(0, 1), (31, 32), (5, 37), (30, 65)]:
        for low in ((-1.5, -1.5), (0.0, -0.0), (-0.0, 0.0)):
            means = [2.0] * 80
            means[first], means[second] = low
            state = scored(impl, means, temperature)
            assert int(state["best"]) == first, (first, second, low)
            assert temperature or float(state["probs"][0, first]) == 1.0


@everywhere
def test_the_softmax_by_hand(impl):
    """Losses log(2) apart at temperature 1 and 0.5, with a floor; temperatures at the ends of the range."""
    means = [1.0, 1.0 + math.log(2), 1.0 + 2 * math.log(2)]
    assert scored(impl, means)["probs"].tolist() == [[1.0, 0.0, 0.0]], "exactly, at temperature 0"
    for temperature, weights in ((1.0, (4, 2, 1)), (0.5, (16, 4, 1))):
        state = scored(impl, means, temperature, 0.3)
        expected = [0.7 * w / sum(weights) + 0.1 for w in weights]
        assert state["probs"][0].tolist() == pytest.approx(expected, abs=1e-15)
        assert float(state["effective"]) == pytest.approx(1 / sum(p * p for p in expected), rel=1e-14)
    assert scored(impl, means, SMALLEST)["probs"].tolist() == [[1.0, 0.0, 0.0]]
    assert scored(impl, means, LARGEST)["probs"][0].tolist() == pytest.approx([1 / 3] * 3, abs=1e-15)
    # 700 temperatures apart a probability is still there, 1e5 apart it is 0.
    far = scored(impl, [0.0, 700.0, 1e5], 1.0)["probs"][0].tolist()
    assert far[1] == pytest.approx(math.exp(-700), rel=1e-12) and far[2] == 0


@everywhere
def test_evidence_by_hand(impl):
    """decay counts once a call, a prompt that is not scored only ages, and what is not finite is forgotten."""
    state = [v.to(impl.device) for v in new_state(1, 2)]
    live = torch.ones(1, 2, dtype=torch.bool, device=impl.device)

    def step(nll, tokens, decay=0.5):
        values = torch.tensor([nll], dtype=torch.float64, device=impl.device)
        impl.reweight_(*state, live, values, torch.tensor([tokens], device=impl.device), decay, 1.0, 0.0)
        return [v.tolist() for v in state]

    assert step([8.0, 30.0], [8, 10])[:2] == [[[1.0, 3.0]], [[8.0, 10.0]]]
    assert step([12.0, math.nan], [4, 0])[:2] == [[[2.0, 3.0]], [[8.0, 5.0]]]
    for bad in (math.nan, math.inf, -math.inf):
        mean, weight, probs, best, effective = step([bad, 0.0], [4, 0], decay=1.0)
        assert (mean[0][0] == bad or math.isnan(bad)) and weight == [[0.0, 5.0]]
        assert best == [1] and probs == [[0.0, 1.0]] and effective == [1.0]
    # The next finite loss stands alone.
    mean, weight, probs, best, _ = step([6.0, 0.0], [3, 0], decay=1.0)
    assert mean == [[2.0, 3.0]] and weight == [[3.0, 5.0]] and best == [0] and probs[0][0] > probs[0][1] > 0
    assert step([6.0, 4.0], [-3, 4], decay=0.0)[1:4] == [[[0.0, 4.0]], [[0.0, 1.0]], [1]]


def step(seed=0, pools=2, prompts=33):
    _, nll, tokens = losses(np.random.default_rng(seed), pools, prompts)
    return nll, tokens


def tensors_of(state: sk.PromptState) -> list[torch.Tensor]:
    return [getattr(state, name) for name in (*WRITTEN, "live")]


# name: (error, what is changed of (nll, tokens, options), text)
PUBLIC = {
    "nll float32": (TypeError, lambda n, t: (n.float(), t, {}), "expected nll float64 and tokens int64, got .*float32"),
    "prompts": (ValueError, lambda n, t: (n[:, 1:], t[:, 1:], {}), r"\[pools, prompts\] \[2, 33\], got \[2, 32\]"),
    "tokens of one pool": (ValueError, lambda n, t: (n, t[:1], {}), r"got \[2, 33\] and \[1, 33\]"),
    "one dimension": (ValueError, lambda n, t: (n[0], t[0], {}), r"expected \[pools, prompts\] \[2, 33\], got \[33\]"),
    "tokens elsewhere": (ValueError, lambda n, t: (n, t.to("meta"), {}), "state's device cpu, got cpu and meta"),
    "decay": (ValueError, lambda n, t: (n, t, {"decay": math.nan}), "got decay=nan"),
    "floor": (ValueError, lambda n, t: (n, t, {"floor": -0.1}), "got .*floor=-0.1"),
    "temperature": (ValueError, lambda n, t: (n, t, {"temperature": math.inf}), "got .*temperature=inf"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_function_refuses(name):
    error, change, text = PUBLIC[name]
    state = sk.PromptState(2, 33)
    sk.reweight_(state, *step(), decay=0.9, temperature=0.1)
    nll, tokens, options = change(*step(1))
    before = storage_bytes([*tensors_of(state), nll, tokens])
    with pytest.raises(error, match=text):
        sk.reweight_(state, nll, tokens, **options)
    assert storage_bytes([*tensors_of(state), nll, tokens]) == before


@pytest.mark.parametrize("pools, prompts", [(1, 7), (4, 33), (0, 3), (2, 0)])
def test_the_public_function(pools, prompts):
    """Defaults, one pool in one dimension, strided losses, losses with a gradient: all the plain result."""
    for layout in ("dense", "strided", "gradient", "flat"):
        state, expected = sk.PromptState(pools, prompts), sk.PromptState(pools, prompts)
        for seed in range(3):
            nll, tokens = step(seed, pools, prompts)
            reweight_torch(*tensors_of(expected), nll, tokens, 1.0, 0.0, 0.0)
            if layout == "strided":
                nll, tokens = strided(nll), strided(tokens)
            if layout == "gradient":
                nll.requires_grad_()
            if layout == "flat" and pools == 1:
                nll, tokens = nll[0], tokens[0]
            assert sk.reweight_(state, nll, tokens) is None
            assert_close(tensors_of(state)[:5], tensors_of(expected)[:5])
            assert not state.mean.requires_grad


@pytest.mark.gpu
@needs_cuda_kernels
def test_a_thousand_runs_on_the_gpu_have_the_same_bits():
    expected = played(reweight_torch, 7)[0]
    live, nll, tokens, *rest = scenario(7)[1][0]
    inputs = [v.cuda() for v in (live, nll, tokens)]
    first = None
    for _ in range(1000):
        state = new_state(*live.shape, "cuda")
        op(*state, *inputs, *rest)
        first = first or state
        assert_same_bits(state, first)
    assert_close(first, expected)


@pytest.mark.gpu
@needs_cuda_kernels
def test_one_kernel_a_call_and_no_wait():
    from torch.profiler import ProfilerActivity, profile

    state = sk.PromptState(8, 40, "cuda")
    nll, tokens = (v.cuda() for v in step(0, 8, 40))
    sk.reweight_(state, nll, tokens)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            sk.reweight_(state, nll, tokens, 0.9, 0.1, 0.1)
        torch.cuda.synchronize()
    names = [event.name for event in trace.events()]
    on_gpu = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    on_gpu = [name for name in on_gpu if name != "Activity Buffer Request"]  # the profiler's own
    assert len(on_gpu) == 10 and all("reweight_kernel" in name for name in on_gpu), on_gpu
    # The wait at the end of the block goes by another name.
    assert not set(names) & {"cudaStreamSynchronize", "cudaMemcpy", "cudaMemcpyAsync"}, names
