"""reweight_, compiled and plain, against the Python oracle and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sapo_kernels.reweight.reference import reweight_reference
from sapo_kernels.reweight.torch import reweight_torch
from tests.native_cases import (
    LARGEST,
    POOLS,
    SIZES,
    SMALLEST,
    WRITTEN,
    everywhere,
    needs_compiled,
    new_state,
    numbers,
    rounds,
    same_bits,
    scenario,
)

op = torch.ops.sapo_kernels.reweight_
# (rtol, atol) of one update. A mean may err by its last bits, which a temperature of 1e-4 makes 1e-11 of a probability.
CLOSE = {"mean": (1e-13, 1e-15), "weight": (1e-15, 0.0), "probs": (0.0, 1e-9), "effective": (1e-8, 0.0)}


def assert_close(got, wanted, what="") -> None:
    """The written tensors of one update, in their order."""
    for name, a, b in zip(WRITTEN, got, wanted, strict=True):
        a = a.cpu()
        if name == "best":
            assert torch.equal(a, b), f"{what} best: got {a}, expected {b}"
        else:
            rtol, atol = CLOSE[name]
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what} {name}: {m}")  # noqa: B023


@everywhere
def test_ten_thousand_sequences_against_the_oracle(impl):
    """Prompts from 1 to 97, ragged live masks, every decay, temperature and floor, losses that are not finite.

    Every step of the oracle starts from our own state, so that errors do not grow and near ties stay what they are.
    """
    chosen = 0
    for seed in range(rounds(10_000 // POOLS)):
        prompts, steps = scenario(seed)
        state = new_state(POOLS, prompts, impl.device)
        for live, nll, tokens, *rest in steps:
            expected = [value.tolist() for value in state]
            reweight_reference(*expected, live.tolist(), nll.tolist(), tokens.tolist(), *rest)
            impl.reweight_(*state, *(v.to(impl.device) for v in (live, nll, tokens)), *rest)
            expected = [torch.tensor(e, dtype=v.dtype) for e, v in zip(expected, state, strict=True)]
            assert_close(state, expected, f"seed {seed}, {rest}:")
            chosen += int((state[3] >= 0).sum())
    assert chosen > rounds(10_000)


@needs_compiled
def test_compiled_and_plain_agree_at_the_ends_of_the_range():
    """Numbers that overflow, underflow or are negative zeros, where the oracle itself rounds otherwise."""
    rng = np.random.default_rng(0)
    extremes = np.asarray([0.0, -0.0, 1.0, -1.0, SMALLEST, -SMALLEST, 1e-308, 1e308, -1e308, LARGEST, -LARGEST,
                           np.nan, np.inf, -np.inf])  # fmt: skip
    counts = np.asarray([0, 1, 2, -1, 2**53 + 1, 2**63 - 1, -(2**63)])
    for _ in range(rounds(400)):
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


def scored(impl, means, temperature=0.0, floor=0.0, live=None):
    """The state, on the CPU, of one pool scored once with these mean losses."""
    mean = torch.tensor([means], dtype=torch.float64, device=impl.device)
    live = torch.ones_like(mean, dtype=torch.bool) if live is None else torch.tensor([live], device=impl.device)
    state, count = new_state(*mean.shape, impl.device), torch.ones_like(mean, dtype=torch.int64)
    impl.reweight_(*state, live, mean, count, 1.0, temperature, floor)
    return dict(zip(WRITTEN, (value.cpu() for value in state), strict=True))


@everywhere
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_ties_go_to_the_lowest_index(impl, temperature):
    """Beside each other, and across the lanes and rounds of a warp; 0.0 and -0.0 are equal."""
    for first, second in [(0, 1), (3, 4), (2, 31), (1, 32), (31, 32), (5, 37), (63, 64), (40, 72), (30, 65)]:
        for low in ((0.25, 0.25), (0.0, -0.0), (-0.0, 0.0), (-1.5, -1.5)):
            means = [2.0] * 80
            means[first], means[second] = low
            assert int(scored(impl, means, temperature)["best"]) == first, (first, second, low)
    for prompts in SIZES:
        assert int(scored(impl, [1.0] * prompts, temperature)["best"]) == 0
        live = [k == prompts - 1 for k in range(prompts)]
        assert int(scored(impl, [1.0] * prompts, temperature, live=live)["best"]) == prompts - 1


@everywhere
@pytest.mark.parametrize("prompts", SIZES)
def test_temperature_0_puts_exactly_everything_on_the_best(impl, prompts):
    """Also of prompts with the same loss, and where nothing is live."""
    wanted = torch.zeros(1, prompts, dtype=torch.float64)
    wanted[0, prompts // 2] = 1
    means = [1.0] * (prompts // 2) + [0.5] * (prompts - prompts // 2)
    state = scored(impl, means)
    assert same_bits(state["probs"], wanted) and float(state["effective"]) == 1
    spread = scored(impl, means, floor=0.25)["probs"]
    assert same_bits(spread, 0.75 * wanted + 0.25 / prompts)
    none, old = scored(impl, means, live=[False] * prompts), new_state(1, prompts)
    assert int(none["best"]) == -1 and same_bits(none["probs"], old[2]) and same_bits(none["effective"], old[4])


@everywhere
def test_the_softmax_by_hand(impl):
    """Losses log(2) apart at temperature 1 and 0.5, with a floor; temperatures at the ends of the range."""
    means = [1.0, 1.0 + math.log(2), 1.0 + 2 * math.log(2)]
    for temperature, weights in ((1.0, (4, 2, 1)), (0.5, (16, 4, 1))):
        state = scored(impl, means, temperature, 0.3)
        wanted = [0.7 * w / sum(weights) + 0.1 for w in weights]
        assert state["probs"][0].tolist() == pytest.approx(wanted, abs=1e-15)
        assert float(state["effective"]) == pytest.approx(1 / sum(p * p for p in wanted), rel=1e-14)
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


@everywhere
@pytest.mark.parametrize("pools, prompts", [(0, 0), (0, 5), (3, 0)])
def test_no_pools_and_no_prompts(impl, pools, prompts):
    state = [v.to(impl.device) for v in new_state(pools, prompts)]
    empty = state[0].clone()
    impl.reweight_(*state, empty.bool(), empty, empty.long(), 1.0, 0.5, 0.5)
    assert state[3].tolist() == [-1] * pools and state[4].tolist() == [-0.5] * pools
