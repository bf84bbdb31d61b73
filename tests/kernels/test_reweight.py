"""reweight_, compiled and plain: against the Python oracle, bit against bit, and calls that are refused."""

from __future__ import annotations

import math
import shutil
import subprocess
from functools import cache

import numpy as np
import pytest
import torch

from sapo_kernels.reweight.reference import reweight_reference
from sapo_kernels.reweight.torch import _exp_nonpositive, reweight_torch
from tests.native_cases import (
    LARGEST,
    POOLS,
    ROOT,
    SIZES,
    SMALLEST,
    TEMPERATURES,
    WRITTEN,
    Implementation,
    assert_same_bits,
    everywhere,
    losses,
    needs_compiled,
    needs_cuda_kernels,
    new_state,
    numbers,
    played,
    rounds,
    same_bits,
    scenario,
)

op = torch.ops.sapo_kernels.reweight_
# What is promised against the oracle in absolute terms; below GAP two means may rank either way.
CLOSE, GAP = 1e-6, 1e-7
plain = Implementation("plain", "cpu")


@cache
def oracle(seed: int) -> list[list[torch.Tensor]]:
    """`played` by the oracle, on lists of Python numbers."""
    prompts, steps = scenario(seed)
    state, seen = [value.tolist() for value in new_state(POOLS, prompts)], []
    for live, nll, tokens, *rest in steps:
        reweight_reference(*state, live.tolist(), nll.tolist(), tokens.tolist(), *rest)
        seen.append([torch.tensor(value, dtype=old.dtype) for value, old in zip(state, new_state(1, 1), strict=True)])
    return seen


def largest(values: torch.Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


@everywhere
def test_ten_thousand_sequences_against_the_oracle(impl, record_property):
    """Prompts from 1 to 97, ragged live masks, every decay, temperature and floor, losses that are not finite."""
    worst, compared, unsure = dict.fromkeys(("mean", "probs", "effective"), 0.0), 0, 0
    for seed in range(rounds(10_000 // POOLS)):
        prompts, steps = scenario(seed)
        before = new_state(POOLS, prompts)
        for got, wanted, step in zip(played(impl.reweight_, seed, impl.device), oracle(seed), steps, strict=True):
            mean, weight, probs, best, effective = got
            assert same_bits(weight, wanted[1])
            finite = wanted[0].isfinite()
            assert same_bits(torch.where(finite, 0.0, mean), torch.where(finite, 0.0, wanted[0]))
            worst["mean"] = max(worst["mean"], largest((mean - wanted[0])[finite].abs()))
            least = torch.where(step[0] & finite, wanted[0], torch.inf).sort(1).values
            some = least[:, 0].isfinite()
            near = torch.zeros(POOLS, dtype=torch.bool)
            if least.shape[1] > 1:
                near = least[:, 1] - least[:, 0] <= GAP
            assert torch.equal(best[~near], wanted[3][~near])
            assert bool(((best == -1) == ~some).all())
            # Where the softmax is steeper than the rounding of a mean, two that are nearly equal share it either way.
            clear = ~near if step[4] < 1e-6 else torch.ones_like(near)
            worst["probs"] = max(worst["probs"], largest((probs - wanted[2])[clear].abs()))
            relative = (effective - wanted[4]).abs() / wanted[4].abs()
            worst["effective"] = max(worst["effective"], largest(relative[clear]))
            # The oracle's may differ by a rounding, so our own of the step before.
            assert same_bits(probs[~some], before[2][~some]) and same_bits(effective[~some], before[4][~some])
            before = got
            compared, unsure = compared + int(some.sum()), unsure + int(near.sum())
    for name, value in worst.items():
        record_property(f"worst {name}", value)
    print(f"{impl}: {compared} pools compared, {unsure} with two means within {GAP}, worst {worst}")
    assert all(value < CLOSE for value in worst.values()), worst
    assert compared > rounds(10_000) and unsure < compared / 500


@needs_compiled
def test_compiled_and_plain_have_the_same_bits():
    for seed in range(rounds(100)):
        for a, b in zip(played(op, seed), played(reweight_torch, seed), strict=True):
            assert_same_bits(a, b, f"seed {seed}:")


@needs_compiled
def test_the_same_bits_at_the_ends_of_the_range():
    """Numbers that overflow, underflow or are negative zeros, where the oracle itself rounds otherwise."""
    rng = np.random.default_rng(0)
    extremes = np.asarray([0.0, -0.0, 1.0, -1.0, SMALLEST, -SMALLEST, 1e-308, 1e308, -1e308, LARGEST, -LARGEST,
                           np.nan, np.inf, -np.inf])  # fmt: skip
    counts = np.asarray([0, 1, 2, -1, 2**53 + 1, 2**63 - 1, -(2**63)])
    for _ in range(rounds(400)):
        shape = (int(rng.integers(1, 6)), int(rng.choice(SIZES)))
        states = [[torch.from_numpy(rng.choice(extremes, shape)) for _ in range(3)] + new_state(*shape)[3:]] * 1
        states.append([value.clone() for value in states[0]])
        for _ in range(3):
            step = (
                torch.from_numpy(rng.random(shape) < 0.7),
                torch.from_numpy(np.where(rng.random(shape) < 0.5, rng.choice(extremes, shape), rng.random(shape))),
                torch.from_numpy(rng.choice(counts, shape)),
                *numbers(rng),
            )
            op(*states[0], *step)
            reweight_torch(*states[1], *step)
            assert_same_bits(*states, f"{step[3:]}")


@pytest.mark.gpu
@needs_cuda_kernels
def test_the_gpu_has_the_bits_of_the_cpu():
    for seed in range(100):
        for a, b in zip(played(op, seed, "cuda"), played(reweight_torch, seed), strict=True):
            assert_same_bits(a, b, f"seed {seed}:")


def scored(impl, means, temperature=0.0, floor=0.0, live=None, decay=1.0, tokens=1):
    """The state, on the CPU, of one pool scored once with these mean losses."""
    mean = torch.tensor([means], dtype=torch.float64, device=impl.device)
    live = torch.ones_like(mean, dtype=torch.bool) if live is None else torch.tensor([live], device=impl.device)
    state, count = new_state(*mean.shape, impl.device), torch.full_like(mean, tokens, dtype=torch.int64)
    impl.reweight_(*state, live, mean * tokens, count, decay, temperature, floor)
    return dict(zip(WRITTEN, (value.cpu() for value in state), strict=True))


@everywhere
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_ties_go_to_the_lowest_index(impl, temperature):
    """Within a register, across registers, lanes and chunks of 32; 0.0 and -0.0 are equal."""
    for first, second in [(0, 1), (1, 2), (3, 4), (2, 31), (1, 32), (31, 32), (5, 37), (33, 34), (1, 64), (63, 64),
                          (40, 72), (4, 16), (16, 20), (31, 33), (30, 65)]:  # fmt: skip
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
def test_temperature_0_puts_everything_on_the_best(impl, prompts):
    rng = np.random.default_rng(prompts)
    for chosen in range(prompts):
        means = (1 + rng.random(prompts)).tolist()
        means[chosen] = 0.5
        state = scored(impl, means)
        wanted = torch.zeros(1, prompts, dtype=torch.float64)
        wanted[0, chosen] = 1
        assert same_bits(state["probs"], wanted) and float(state["effective"]) == 1 and int(state["best"]) == chosen
        spread = scored(impl, means, floor=0.25)["probs"][0]
        assert spread[chosen] > 0.75 and same_bits(spread, 0.75 * wanted[0] + 0.25 / prompts)


@everywhere
@pytest.mark.parametrize("prompts", SIZES)
def test_probs_sum_to_1(impl, prompts):
    rng = np.random.default_rng(prompts)
    for temperature in TEMPERATURES:
        for floor in (0.0, 0.3, 1.0):
            live = (rng.random(prompts) < 0.8).tolist()
            live[rng.integers(prompts)] = True
            state = scored(impl, rng.random(prompts).tolist(), temperature, floor, live)
            probs = state["probs"][0].tolist()
            assert abs(math.fsum(probs) - 1) < 1e-12
            assert all(0 <= p <= 1 if alive else p == 0 for p, alive in zip(probs, live, strict=True))
            if floor == 1:
                assert abs(float(state["effective"]) - sum(live)) < 1e-12 * prompts
            assert all(p >= floor / sum(live) for p, alive in zip(probs, live, strict=True) if alive)


@everywhere
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_chosen(impl, bad):
    for at in (0, 1, 31, 32, 40):
        means = [1.0 + k for k in range(41)]
        means[at] = bad
        for temperature, floor in ((0.0, 0.0), (0.5, 0.2), (LARGEST, 1.0)):
            state = scored(impl, means, temperature, floor)
            assert int(state["best"]) == (1 if at == 0 else 0)
            assert float(state["probs"][0, at]) == 0 and float(state["weight"][0, at]) == 0
            assert same_bits(state["mean"][0, at], torch.tensor(bad).double())
            assert abs(math.fsum(state["probs"][0].tolist()) - 1) < 1e-12
            # The evenly spread part is shared by those that can be drawn.
            assert float(state["probs"][0].max()) >= floor / 40 and bool((state["probs"] > 0).sum() == 40) == (
                floor > 0
            )


@everywhere
def test_a_negative_count_is_no_evidence(impl):
    state = scored(impl, [1.0, 2.0], tokens=-4)
    assert state["mean"].isnan().all() and (state["weight"] == 0).all() and int(state["best"]) == -1


@everywhere
@pytest.mark.parametrize("prompts", SIZES)
def test_a_pool_with_nothing_finite_keeps_its_probs(impl, prompts):
    for means, live in (
        ([math.nan] * prompts, None),
        ([math.inf] * prompts, None),
        ([1.0] * prompts, [False] * prompts),
    ):
        for temperature in (0.0, 0.5):
            state, old = scored(impl, means, temperature, 0.5, live), new_state(1, prompts)
            assert int(state["best"]) == -1
            assert same_bits(state["probs"], old[2]) and same_bits(state["effective"], old[4])


@everywhere
def test_what_was_not_scored_only_ages(impl):
    """tokens = 0: the nll beside it is not looked at, whatever it is."""
    shape = (1, 40)
    for value in (math.nan, math.inf, -math.inf, 1e308, 5.0):
        state = [v.to(impl.device) for v in new_state(*shape)]
        live = torch.ones(shape, dtype=torch.bool, device=impl.device)
        nll = torch.arange(1.0, 41, dtype=torch.float64, device=impl.device).view(shape)
        impl.reweight_(*state, live, nll, torch.full_like(nll, 2).long(), 1.0, 0.0, 0.0)
        before = [v.clone() for v in state]
        impl.reweight_(*state, live, torch.full_like(nll, value), torch.zeros_like(nll).long(), 0.75, 0.0, 0.0)
        assert same_bits(state[0], before[0]) and same_bits(state[1], before[1] * 0.75)
        assert_same_bits(state[2:], before[2:])


@everywhere
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_recovery_after_a_loss_that_was_not_finite(impl, bad):
    """The next finite loss stands alone; until then the prompt stays out, also when others are scored."""
    state = [v.to(impl.device) for v in new_state(1, 2)]
    live = torch.ones(1, 2, dtype=torch.bool, device=impl.device)

    def step(nll, tokens, decay=1.0):
        values = torch.tensor([nll], dtype=torch.float64, device=impl.device)
        impl.reweight_(*state, live, values, torch.tensor([tokens], device=impl.device), decay, 1.0, 0.0)
        return [v.tolist() for v in state]

    step([4.0, 30.0], [4, 10])
    step([bad, 0.0], [4, 0])
    mean, weight, probs, best, effective = step([0.0, 30.0], [0, 10])
    assert best == [1] and probs == [[0.0, 1.0]] and weight == [[0.0, 20.0]] and effective == [1.0]
    mean, weight, probs, best, _ = step([6.0, 0.0], [3, 0])
    assert mean == [[2.0, 3.0]] and weight == [[3.0, 20.0]] and best == [0] and probs[0][0] > probs[0][1] > 0


@everywhere
def test_decay_0_keeps_the_newest_losses_only(impl):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        state, alone = (new_state(POOLS, 33, impl.device) for _ in range(2))
        for _ in range(3):
            live, nll, tokens = (v.to(impl.device) for v in losses(rng, POOLS, 33))
            tokens = tokens.abs() + 1
            impl.reweight_(*state, live, nll, tokens, 0.0, 0.1, 0.1)
            fresh = new_state(POOLS, 33, impl.device)
            impl.reweight_(*fresh[:2], *alone[2:], live, nll, tokens, 1.0, 0.1, 0.1)
            alone[:2] = fresh[:2]
            assert_same_bits(state, alone)


@everywhere
def test_decay_counts_once_a_call(impl):
    state = [v.to(impl.device) for v in new_state(1, 1)]
    live = torch.ones(1, 1, dtype=torch.bool, device=impl.device)
    for nll, tokens, mean, weight in ((8.0, 8, 1.0, 8.0), (12.0, 4, 2.0, 8.0), (0.0, 0, 2.0, 4.0), (8.0, 2, 3.0, 4.0)):
        impl.reweight_(*state, live, live.double() * nll, live.long() * tokens, 0.5, 0.0, 0.0)
        assert (float(state[0]), float(state[1])) == (mean, weight)


@everywhere
@pytest.mark.parametrize("pools, prompts", [(0, 0), (0, 5), (3, 0)])
def test_no_pools_and_no_prompts(impl, pools, prompts):
    state = [v.to(impl.device) for v in new_state(pools, prompts)]
    empty = state[0].clone()
    impl.reweight_(*state, empty.bool(), empty, empty.long(), 1.0, 0.5, 0.5)
    assert state[3].tolist() == [-1] * pools and state[4].tolist() == [-0.5] * pools


@everywhere
def test_pools_do_not_see_each_other(impl):
    """A pool alone, and among others in another order, has the same bits; also at odd addresses."""
    prompts, steps = scenario(3)
    together = played(impl.reweight_, 3, impl.device)
    order = torch.randperm(POOLS, generator=torch.Generator().manual_seed(0))[: rounds(60) + 1]
    for pools in (order, *order[:8].view(-1, 1)):
        buffer = torch.full((len(pools) * prompts + 1,), 0.123, dtype=torch.float64, device=impl.device)
        state = [v.to(impl.device) for v in new_state(len(pools), prompts)]
        state[2] = buffer[1:].view(len(pools), prompts)
        for (live, nll, tokens, *rest), wanted in zip(steps, together, strict=True):
            impl.reweight_(*state, *(v[pools].to(impl.device) for v in (live, nll, tokens)), *rest)
            assert_same_bits(state, [v[pools] for v in wanted])
        assert float(buffer[0]) == 0.123


def sweep(count: int) -> torch.Tensor:
    """Non-positive numbers of every magnitude, and those beside the multiples of ln 2 where the rounding turns."""
    rng = np.random.default_rng(0)
    turns = (np.arange(1024) + 0.5) * math.log(2)
    points = [
        rng.random(count) * 709,
        10.0 ** rng.uniform(-320, 2.86, count),
        np.arange(710.0),
        *(turns, np.nextafter(turns, 0), np.nextafter(turns, 999)),
        [0.0, SMALLEST, 708, np.nextafter(708, 0), 708.4],
    ]
    return torch.from_numpy(-np.concatenate(points)).clamp(min=-708)


def ulps(got: torch.Tensor, x: torch.Tensor) -> float:
    exact = np.asarray([math.exp(v) for v in x.tolist()])
    return float(np.max(np.abs(got.numpy() - exact) / np.spacing(exact)))


def test_exp_is_within_1_ulp():
    x = sweep(rounds(200_000))
    assert ulps(_exp_nonpositive(x), x) <= 1
    beyond = torch.tensor([-708.0000001, -709.0, -745.0, -746.0, -1e5, -1e308, -torch.inf], dtype=torch.float64)
    assert (_exp_nonpositive(beyond) == 0).all() and float(_exp_nonpositive(torch.zeros(1).double())) == 1


@everywhere
def test_exp_of_the_operator_is_the_same_one(impl, record_property):
    """Two prompts that far apart; where the larger one is 1 to the last bit, the smaller one is exp itself."""
    x = sweep(rounds(200_000))
    mean = torch.stack([torch.zeros_like(x), -x], 1)
    ours, wanted = new_state(len(x), 2, impl.device), new_state(len(x), 2)
    live, tokens = torch.ones_like(mean, dtype=torch.bool), torch.ones_like(mean, dtype=torch.int64)
    impl.reweight_(*ours, *(v.to(impl.device) for v in (live, mean, tokens)), 1.0, 1.0, 0.0)
    reweight_torch(*wanted, live, mean, tokens, 1.0, 1.0, 0.0)
    assert_same_bits(ours, wanted)
    probs = ours[2].cpu()
    alone = x < -38
    worst = ulps(probs[alone][:, 1], x[alone])
    record_property("worst ulp", worst)
    print(f"{impl}: exp within {worst} ulp of math.exp on {int(alone.sum())} numbers")
    assert int(alone.sum()) > len(x) / 4 and worst <= 1
    # Elsewhere a product and a quotient are between.
    assert ulps(probs[:, 1] / probs[:, 0], x) <= 3


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_every_vector_width_has_the_same_bits(tmp_path):
    """This machine runs one of the widths that csrc/reweight.cpp has; the others are run here as well."""
    (tmp_path / "widths.cpp").write_text(WIDTHS)
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    binary = tmp_path / "widths"
    subprocess.run(["g++", *flags, "-o", binary, tmp_path / "widths.cpp"], check=True, timeout=120)
    done = subprocess.run([binary], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("same bits"), done


WIDTHS = """
#include "reweight.cpp"
#include <cstdio>
#include <random>
#include <vector>
using namespace sapo;
typedef double Doubles8 __attribute__((vector_size(64)));
namespace sapo { template <> struct Bits<Doubles8> { typedef uint64_t type __attribute__((vector_size(64))); }; }
struct State {
  std::vector<double> mean, weight, probs, effective;
  std::vector<int64_t> best;
  bool operator==(const State& o) const {
    return same(mean, o.mean) && same(weight, o.weight) && same(probs, o.probs) && same(effective, o.effective) &&
           best == o.best;
  }
  static bool same(const std::vector<double>& a, const std::vector<double>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
  }
};
int main() {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform(0, 1);
  int64_t compared = 0;
  for (int round = 0; round < 3000; ++round) {
    const int64_t pools = 1 + round % 3, prompts = 1 + random() % 100, n = pools * prompts;
    State start;
    std::vector<uint8_t> live(n);
    std::vector<double> nll(n);
    std::vector<int64_t> tokens(n);
    for (int64_t i = 0; i < n; ++i) {
      start.mean.push_back(random() % 9 ? uniform(random) : std::numeric_limits<double>::quiet_NaN());
      start.weight.push_back(random() % 9 ? 100 * uniform(random) : 0);
      start.probs.push_back(0.5);
      live[i] = random() % 5 != 0;
      nll[i] = random() % 9 ? 50 * uniform(random) : kInfinity;
      tokens[i] = random() % 4 ? random() % 60 : 0;
    }
    start.effective.assign(pools, 3);
    start.best.assign(pools, 7);
    State states[4] = {start, start, start, start};
    const double temperature = round % 4 ? uniform(random) : 0;
    for (int w = 0; w < 4; ++w) {
      State& s = states[w];
      Reweight a = {s.mean.data(), s.weight.data(), s.probs.data(), s.best.data(), s.effective.data(), live.data(),
                    nll.data(), tokens.data(), pools, prompts, 0.9, temperature ? 1 / temperature : 0, 0.1};
      if (w == 0) reweight_pools<Doubles2>(a);
      if (w == 1) reweight_pools<Doubles4>(a);
      if (w == 2) reweight_pools<Doubles8>(a);
      if (w == 3) reweight_cpu(a);
      if (!(s == states[0])) return std::printf("width %d differs in round %d\\n", w, round), 1;
      compared += n;
    }
    if (states[0] == start) return std::printf("nothing was done in round %d\\n", round), 1;
  }
  std::printf("same bits of %lld prompts\\n", static_cast<long long>(compared));
}
"""
