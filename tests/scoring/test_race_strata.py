"""Strata of the examples: which there are, what they take out of the noise, and that the mean stays where it was."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sapo_kernels.scoring.race_bounds import Evidence
from sapo_kernels.scoring.race_strata import PRIOR_EXAMPLES, strata, without_strata


def test_common_responses_are_strata_and_the_rest_is_cut_by_length():
    responses = np.array([7] * 30 + [3] * 20 + list(range(100, 150)))
    lengths = np.array([1] * 30 + [2] * 20 + [2, 5, 9, 14, 30] * 10)
    found = strata(responses, lengths)
    assert len(set(found[:30])) == len(set(found[30:50])) == 1 and found[0] != found[30]
    rest = found[50:]
    assert not set(rest) & {found[0], found[30]} and len(set(rest)) == 3
    order = np.argsort(lengths[50:], kind="stable")
    assert (np.abs(np.diff(rest[order])) <= 1).all() and sorted(set(found)) == list(range(5))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_examples_that_are_all_alike_or_all_different_are_one_stratum(size):
    assert strata(np.zeros(size), np.ones(size)).tolist() == [0] * size
    assert strata(np.arange(size), np.full(size, 3)).tolist() == [0] * size


def test_values_without_strata_by_hand():
    rng = np.random.default_rng(0)
    stratum, values = rng.integers(0, 3, 30), rng.normal(size=(2, 12))
    got, ahead, variance, depth = without_strata(values, stratum)
    for p in range(2):
        for i in range(12):
            seen = values[p, :i]
            everyone = seen.mean() if i else 0.0
            expected = {}
            for g in range(3):
                own = [v for v, h in zip(seen, stratum[:i], strict=True) if h == g]
                expected[g] = (sum(own) + PRIOR_EXAMPLES * everyone) / (len(own) + PRIOR_EXAMPLES)
            left = np.mean([expected[g] for g in stratum[i:]])
            assert got[p, i] == pytest.approx(values[p, i] - expected[stratum[i]] + left, abs=1e-12)
            apart = [v - expected[g] for v, g in zip(seen, stratum[:i], strict=True)]
            assert depth[p, i] == pytest.approx((everyone - seen).max(initial=0.0), abs=1e-12)
            if i:
                assert ahead[p, i] == pytest.approx(left, abs=1e-12)
                more = 1 + len(set(stratum[:i].tolist())) / i
                assert variance[p, i] == pytest.approx(more * np.mean(np.square(apart)), abs=1e-12)


def test_values_that_are_not_there_spoil_none_before():
    values = np.random.default_rng(1).normal(size=(2, 9))
    short = values.copy()
    short[0, 5:] = np.nan
    stratum = np.arange(12) % 3
    got, whole = without_strata(short, stratum)[0], without_strata(values, stratum)[0]
    assert np.array_equal(got[1], whole[1])
    assert np.allclose(got[0, :5], whole[0, :5]) and np.isnan(got[0, 5:]).all()


def test_the_next_value_has_the_mean_of_those_left():
    """Whatever was seen: averaged over which example comes next, the value is the mean of the values left."""
    rng = np.random.default_rng(2)
    stratum, values = rng.integers(0, 4, 25), rng.normal(size=25)
    for seen in (1, 6, 20):
        got = []
        for following in range(seen, 25):
            order = [*range(seen), following, *(m for m in range(seen, 25) if m != following)]
            got.append(without_strata(values[None, order][:, : seen + 1], stratum[order])[0][0, -1])
        assert np.mean(got) == pytest.approx(values[seen:].mean(), abs=1e-12)


def by_label(times: int, seed: int, apart: float, noise: float, mean: float = 0.0):
    """([times, 200] differences in random orders, their strata, their mean): two labels that prompts disagree about."""
    rng = np.random.default_rng(seed)
    label = np.repeat([0, 1, 1], [80, 60, 60])
    population = np.where(label == 0, apart, -apart * 2 / 3) + noise * rng.normal(size=200)
    population += mean - population.mean()
    orders = np.stack([rng.permutation(200) for _ in range(times)])
    return population[orders], label[orders]


def refuted(drawn, label, sizes, theta: float, alpha: float, reach: float = 2.0) -> np.ndarray:
    """[times] whether ``D <= theta`` is refuted after any of the rounds."""
    found = np.zeros(len(drawn), dtype=bool)
    for t, (d, g) in enumerate(zip(drawn, label, strict=True)):
        for n in sizes:
            evidence = Evidence(d[None, :n], len(d), 0.05, reach, stratum=g)
            found[t] |= evidence.log_capital(theta)[0] >= -math.log(alpha)
    return found


def test_the_truth_is_seldom_refuted_without_the_strata():
    times, alpha = 600, 0.1
    for apart, noise in ((1.0, 0.3), (0.0, 1.0), (3.0, 0.01)):
        drawn, label = by_label(times, 3, apart, noise)
        rate = refuted(drawn, label, (16, 24, 40, 80), 0.0, alpha).mean()
        assert rate <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / times), (apart, noise)


def test_labels_that_divide_the_prompts_cost_few_examples():
    drawn, label = by_label(200, 4, 1.0, 0.3, mean=0.3)
    found = refuted(drawn, label, (40,), 0.0, 0.01, 1.0).mean()
    blind = refuted(drawn, np.zeros_like(label), (40,), 0.0, 0.01, 1.0).mean()
    assert found > 0.75 and blind < 0.4
