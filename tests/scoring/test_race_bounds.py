"""The capital of the bets against plain loops, its coverage, its power, and what is left when the assumption fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sapo_kernels import PromptScores
from sapo_kernels.scoring.race import Contest, Race
from sapo_kernels.scoring.race_bounds import MOST, PRIOR_EXAMPLES, STEADY, WARM_UP, Evidence

SIZES = (16, 24, 36, 54, 81)


def pair(drawn, population, margin, reach, control=None) -> Evidence:
    return Evidence(drawn, population, margin, reach, control=control)


def growth_by_hand(drawn, population, theta, aim, reach, control=None):
    """[rules][n], the factors of the capital of each rule, one bet at a time, as the module's docstring has them."""
    values = list(drawn)
    before = [sum(drawn[:i]) for i in range(len(drawn))]
    if control is not None:
        centre = sum(control) / population
        z = [x - centre for x in control]
        spread = sum(x * x for x in z) / population
        values = []
        for i, d in enumerate(drawn):
            seen, earlier = z[:i], list(drawn[:i])
            mean_d = sum(earlier) / i if i else 0.0
            both = sum(a * (b - mean_d) for a, b in zip(seen, earlier, strict=True))
            top = both + PRIOR_EXAMPLES * spread
            slope = top / (sum(a * a for a in seen) + PRIOR_EXAMPLES * spread) if i else 1.0
            values.append(d - slope * (z[i] - sum(z[i:]) / (population - i)))
    factors = []
    for rule in range(2):
        factors.append([1.0] * WARM_UP)
        for i in range(WARM_UP, len(drawn)):
            seen = values[:i]
            mean = sum(seen) / i
            variance = sum((x - mean) ** 2 for x in seen) / i * (1 + 1 / i)
            floor = mean - reach * (1 + 2 / i) * max(mean - x for x in seen)

            def expected(level, i=i):
                return (population * level - before[i]) / (population - i)

            if rule == 0:
                gap = max(mean - expected(aim), 0.0)
                stake = gap / (variance + gap * gap)
            else:
                stake = STEADY * math.sqrt(variance) / ((1 + STEADY * STEADY) * variance)
            room = expected(theta) - floor
            if room > 0:
                stake = min(stake, MOST / room)
            factors[rule].append(1 + stake * (max(values[i], floor) - expected(theta)))
    return factors


@pytest.mark.parametrize("with_control", [False, True])
@pytest.mark.parametrize("theta", [-0.3, 0.0, 0.2])
def test_capital_is_that_of_the_plain_bets(with_control, theta):
    rng = np.random.default_rng(3)
    population, n = 40, 17
    drawn = rng.normal(0.3, 1.0, (5, n))
    drawn[1, 9] = -6.0  # below the floor
    control = rng.normal(0.1, 1.0, (5, population)) if with_control else None
    if with_control:
        control[:, :n] += drawn
    got = pair(drawn, population, 0.1, 1.5, control).log_capital(theta)
    for p in range(5):
        factors = growth_by_hand(drawn[p].tolist(), population, theta, -0.1, 1.5)
        if with_control:
            factors += growth_by_hand(drawn[p].tolist(), population, theta, -0.1, 1.5, control[p].tolist())
        capitals = [math.prod(rule) for rule in factors]
        assert got[p] == pytest.approx(math.log(sum(capitals) / len(capitals)), abs=1e-9)


def test_capital_of_openings_is_that_of_the_bets_after_them():
    drawn = np.random.default_rng(15).normal(0.3, 1.0, (2, 20))
    shares = ((WARM_UP, 0.25), (9, np.array([0.5, 0.0])), (20, 0.25))
    got = Evidence(drawn, 50, 0.1, 1.0, shares).log_capital(-0.1)
    for p, late in enumerate((0.5, 0.0)):
        factors = growth_by_hand(drawn[p].tolist(), 50, -0.1, -0.1, 1.0)
        whole, part = (sum(math.prod(rule[first:]) for rule in factors) / 2 for first in (WARM_UP, 9))
        assert got[p] == pytest.approx(math.log(0.25 * whole + late * part), abs=1e-9)


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_bets_against_whoever_leads(seed, remembered):
    """Each example is bet on against the prompt that led after those before, or the next if that is oneself."""
    rng = np.random.default_rng(seed)
    losses = np.abs(rng.normal(2.0, 0.6, (5, 60)))
    old = losses + 0.3 * rng.normal(size=losses.shape)
    names, ones = list("abcde"), np.ones((5, 60), dtype=np.int64)
    memory = PromptScores(torch.from_numpy(old), torch.from_numpy(ones), names) if remembered else None
    contest = Contest(Race(first=20, growth=1.5, relative=0.0, delta=1e-9, memory=memory), ones, names)
    for _ in range(2):
        cells = contest.wanted()
        contest.add(cells, losses.ravel()[cells])
    ordered, before = losses[:, contest.order[:30]], old[:, contest.order]
    got, rivals = contest._against_leaders(np.arange(5), 30), set()
    for k in range(5):
        made = []
        for i in range(30):
            rank = sorted(range(5), key=lambda j, i=i: (ordered[j, :i].sum(), j))
            rival = rank[0] if rank[0] != k else rank[1]
            rivals.add(rival)
            drawn = (ordered[k] - ordered[rival]).tolist()
            rules = growth_by_hand(drawn, 60, 0.0, 0.0, 1.0)
            if remembered:
                rules += growth_by_hand(drawn, 60, 0.0, 0.0, 1.0, (before[k] - before[rival]).tolist())
            made.append([rule[i] for rule in rules])
        capitals = np.prod(made, axis=0)
        share = 0.4 if remembered else 0.6
        assert got[k] == pytest.approx(math.log(share * capitals.mean()), abs=1e-9)
    assert len(rivals) > 2


@pytest.mark.parametrize("seed", range(4))
def test_bets_kept_from_earlier_rounds_are_those_worked_out_anew(seed):
    """Also after prompts that led have broken, others have waited, and some have come back."""
    rng = np.random.default_rng(seed)
    losses = 2.0 + 0.3 * rng.normal(size=(6, 90)) + 0.02 * np.arange(6)[:, None]
    race = Race(growth=1.3, relative=0.02, delta=0.3, seed=seed)
    if seed % 2:
        losses[:2, race.order(90)[20 + seed]] = np.nan
    contest, rounds, broken = Contest(race, np.ones((6, 90), dtype=np.int64), list("abcdef")), 0, False
    while (cells := contest.wanted()) is not None:
        contest.add(cells, losses.ravel()[cells])
        counts, rounds, broken = contest.scored.sum(1), rounds + 1, broken or contest.broken.any()
        for n in set(counts[~contest.broken].tolist()) - {90}:
            group = np.flatnonzero(~contest.broken & (counts == n))
            kept, growth = contest._against_leaders(group, n), contest._growth.copy()
            contest._growth[:] = np.nan
            assert np.allclose(kept, contest._against_leaders(group, n), atol=1e-12)
            contest._growth[:] = growth
    assert rounds > 3 and broken == bool(seed % 2)


def test_shares_of_one_truth_add_up_to_one():
    """Whatever could refute that k is the best, over all rivals and openings, starts with a capital of 1 at most."""
    losses = np.abs(np.random.default_rng(4).normal(2.0, 0.6, (6, 80)))
    old = PromptScores(torch.from_numpy(losses), torch.ones(6, 80, dtype=torch.int64), list("abcdef"))
    for memory in (None, old):
        contest = Contest(Race(first=40, memory=memory), np.ones((6, 80), dtype=np.int64), list("abcdef"))
        cells = contest.wanted()
        contest.add(cells, losses.ravel()[cells])
        for k in range(6):
            total = contest._plan.leader
            for other in range(6):
                if other != k:
                    total += sum(float(share[0]) for _, share in contest._shares(np.array([k]), other))
            # The old winner has no use for what is laid on the old winner.
            unused = 0.3 if memory is not None and k == old.best else 0.0
            assert total == pytest.approx(1.0 - unused, abs=1e-12)


def permuted(population: np.ndarray, times: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permuted(np.tile(population, (times, 1)), axis=1)


def crossings(orders: np.ndarray, theta: float, alpha: float, reach: float, control=None) -> float:
    """Share of the orders in which ``D <= theta`` is refuted after any of the rounds."""
    refuted = np.zeros(len(orders), dtype=bool)
    for n in SIZES:
        evidence = pair(orders[:, :n], orders.shape[1], 0.1, reach, control)
        refuted |= evidence.log_capital(theta) >= -math.log(alpha)
    return float(refuted.mean())


def shapes():
    rng = np.random.default_rng(11)
    yield "normal", rng.normal(size=120)
    yield "uniform", rng.uniform(size=120)
    yield "two values", np.repeat([-1.0, 1.0], 60)
    yield "skewed to the seen side", rng.exponential(size=120)
    yield "heavy on both sides", rng.standard_t(3, size=120)


SHAPES = dict(shapes())


@pytest.mark.parametrize("name", SHAPES)
def test_the_truth_is_seldom_refuted(name):
    """At most alpha over all rounds, for populations of the shapes that paired differences have."""
    times, population = 1500, SHAPES[name]
    orders = permuted(population, times, 1)
    for alpha in (0.2, 0.05):
        noise = 3 * math.sqrt(alpha * (1 - alpha) / times)
        assert crossings(orders, population.mean(), alpha, 2.0) <= alpha + noise


def test_a_difference_of_one_deviation_is_found_early():
    population = np.random.default_rng(5).normal(1.0, 1.0, 250)
    found = pair(permuted(population, 300, 2)[:, :36], 250, 0.1, 1.5).log_capital(0.0) >= math.log(400)
    assert found.mean() > 0.9


def test_capital_never_grows_with_theta():
    drawn = permuted(np.random.default_rng(6).standard_t(2, 200), 50, 3)[:, :40]
    evidence = pair(drawn, 200, 0.1, 1.0, permuted(np.random.default_rng(7).normal(size=200), 50, 4))
    steps = np.stack([evidence.log_capital(theta) for theta in np.linspace(-5, 5, 201)])
    assert (np.diff(steps, axis=0) <= 1e-9).all()


def test_lower_bound_is_where_the_capital_reaches_the_level():
    drawn = permuted(np.random.default_rng(8).normal(2.0, 1.0, 100), 20, 5)[:, :30]
    evidence, level = pair(drawn, 100, 0.1, 1.5), math.log(40)
    bound = evidence.lower_bound(level)
    assert np.isfinite(bound).all() and (bound < drawn.mean(1)).all()
    assert (evidence.log_capital(bound - 1e-6) >= level).all()
    assert (evidence.log_capital(bound + 1e-6) < level).all()


def test_bounds_cover_and_shrink():
    population = np.random.default_rng(9).normal(0.4, 1.0, 150)
    orders = permuted(population, 400, 6)
    widths = []
    for n in (16, 40, 100, 149):
        bound = pair(orders[:, :n], 150, 0.1, 2.0).lower_bound(math.log(20))
        assert (bound > population.mean()).mean() <= 0.05
        widths.append(np.median(population.mean() - bound))
    assert widths == sorted(widths, reverse=True) and widths[-1] < 0.1 * widths[0]


def test_all_examples_leave_no_doubt():
    drawn = np.random.default_rng(10).normal(size=(3, 25))
    evidence = pair(drawn, 25, 0.1, 1.5)
    assert evidence.log_capital(evidence.mean).tolist() == [-math.inf] * 3
    assert evidence.log_capital(evidence.mean - 1e-12).tolist() == [math.inf] * 3
    assert evidence.lower_bound(99.0).tolist() == evidence.mean.tolist()


def test_too_few_examples_say_nothing():
    evidence = pair(np.ones((2, WARM_UP)), 100, 0.1, 1.5)
    assert evidence.log_capital(0.0).tolist() == [-math.inf] * 2
    assert evidence.lower_bound(1.0).tolist() == [-math.inf] * 2


def test_equal_prompts_are_never_told_apart():
    evidence = pair(np.zeros((1, 60)), 250, 0.01, 1.5, np.zeros((1, 250)))
    assert abs(evidence.log_capital(0.0)[0]) < 1e-12
    assert evidence.log_capital(-0.01)[0] > math.log(400), "but they are shown to be within a tolerance"


@pytest.mark.parametrize("scale", [1e-290, 1e-12, 1e12, 1e150])
def test_any_unit_gives_the_same_capital(scale):
    drawn = np.random.default_rng(12).normal(0.5, 1.0, (4, 40))
    one = pair(drawn, 200, 0.1, 1.5).log_capital(0.0)
    other = pair(drawn * scale, 200, 0.1 * scale, 1.5).log_capital(0.0)
    if scale > 1e-100:
        assert np.allclose(one, other, atol=1e-6)
    assert np.isfinite(other).all()


def test_a_control_that_predicts_narrows_and_one_that_does_not_hardly_hurts():
    rng = np.random.default_rng(13)
    population = rng.normal(0.5, 1.0, 250)
    both = np.stack([population, population + rng.normal(0, 0.2, 250), rng.normal(0, 1.0, 250)])
    orders = np.stack([rng.permutation(250) for _ in range(200)])
    drawn, good, junk = (both[row][orders] for row in range(3))
    level = math.log(100)
    plain, helped, hurt = (
        np.median(population.mean() - pair(drawn[:, :36], 250, 0.1, 1.5, control).lower_bound(level))
        for control in (None, good, junk)
    )
    assert helped < 0.5 * plain and hurt < 1.3 * plain
    assert crossings(drawn, population.mean(), 0.05, 2.0, good) <= 0.05
    assert crossings(drawn, population.mean(), 0.05, 2.0, junk) <= 0.05


HIDDEN = {"one example carries it all": [1, 20.0], "five do": [5, 4.0], "a tenth does": [12, 1.0]}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_hides_beyond_the_reach_is_all_that_can_be_lost(name):
    """Few examples far below the others: without them the promise fails, and the tail says by how much at most."""
    count, depth = HIDDEN[name]
    population = np.random.default_rng(14).normal(0, 0.1, 120)
    population[:count] -= depth
    orders, n, alpha = permuted(population, 1000, 7), 24, 0.05
    evidence = pair(orders[:, :n], 120, 0.1, 1.5)
    bound = evidence.lower_bound(-math.log(alpha))
    floor = evidence._games[0].floor  # [orders, examples]
    tail = np.zeros(len(orders))
    for i in range(WARM_UP, n):
        missing = np.maximum(floor[:, i, None] - orders[:, i:], 0.0).sum(1) / 120
        tail = np.maximum(tail, missing)
    worst = (bound > population.mean()).mean()
    assert worst > 2 * alpha, "the case is one in which the promise fails"
    assert (bound > population.mean() + tail).mean() <= alpha
