"""Races over given losses and over a model: who is dropped, when, and what the scores say afterwards."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.files import DataError
from sapo_kernels.scoring.race import RaceState
from sapo_kernels.scoring.race_report import RaceReport
from tests.scoring.test_prompt_scores import scores as matrix
from tests.tolerances import TOLERANCES

NAN, INF = float("nan"), float("inf")


def hold(full: sk.PromptScores, race: sk.Race) -> sk.PromptScores:
    """The scores that a race over a matrix known in full leaves; every cell is asked for once at most."""
    state = RaceState(race, full.tokens.numpy())
    while (cells := state.next_cells()) is not None:
        assert len(cells) and not state.scored.flat[cells].any()
        state.add(cells, full.nll.numpy().ravel()[cells])
    scored = torch.from_numpy(state.scored)
    nll, tokens = torch.where(scored, full.nll, NAN), torch.where(scored, full.tokens, 0)
    return sk.PromptScores(nll, tokens, full.prompts, race=state.report())


def plausible(seed: int, gaps, examples=250, noise=0.3) -> sk.PromptScores:
    """Losses that differ by `gaps` in the mean, with a part that examples have in common; targets of 1 to 4 tokens."""
    rng = np.random.default_rng(seed)
    tokens = np.tile(rng.integers(1, 5, examples), (len(gaps), 1))
    per_token = rng.gamma(4.0, 0.5, examples) + np.asarray(gaps)[:, None]
    return matrix(np.maximum(per_token + noise * rng.normal(size=tokens.shape), 0.0) * tokens, tokens)


def test_clear_losers_are_dropped_after_the_first_round():
    full = plausible(0, [0.0, 3.0, 3.5, 4.0])
    scores = hold(full, sk.Race())
    report = scores.race
    first = sk.Race().first
    assert report.winner == scores.best == full.best == 0
    assert report.examples == [first] * 4 and report.left == [1] * 4 and report.rounds == [first]
    assert report.reason == ["winner", "worse", "worse", "worse"]
    assert hold(plausible(1, [0.0]), sk.Race()).race.reason == ["winner"]
    assert hold(plausible(1, [1.0, 0.0], examples=1, noise=0.0), sk.Race()).best == 1, "one example is a race"
    assert report.cells == 4 * first and report.total == 1000 and report.saved == pytest.approx(1 - first / 250)
    assert int(scores.scored.sum()) == 4 * first and (scores.nll[~scores.scored].isnan()).all()


def test_the_rule_by_hand():
    """Round by round: paired differences from the leader, their standard error, the finite number of examples."""
    full = plausible(3, np.linspace(0.0, 0.4, 12), noise=0.5)
    race = sk.Race(seed=4, first=10, growth=1.3, relative=0.01)
    order, live, n, rounds, examples = race.order(250), list(range(12)), 10, [], [0] * 12
    per_token = (full.nll * 250 / full.tokens.sum(1, keepdim=True))[:, order].numpy()
    while True:
        rounds.append(n)
        for k in live:
            examples[k] = n
        means = {k: per_token[k, :n].mean() for k in live}
        leader = min(live, key=means.get)
        apart = {k: (per_token[k, :n] - per_token[leader, :n]).var(ddof=1) for k in live}
        for k in live[:]:
            error = math.sqrt(max(apart[k], np.median(list(apart.values()))) / n * (1 - n / 250))
            if k != leader and means[k] - 0.99 * means[leader] > race.quantile * error:
                live.remove(k)
        if len(live) == 1:
            break
        n = math.ceil(1.3 * n)
    report = hold(full, race).race
    assert len(rounds) > 5 and (report.rounds, report.examples, report.winner) == (rounds, examples, live[0])
    assert sk.Race().quantile == pytest.approx(2.80703, abs=1e-5), "1 - 0.05 / 20 of the normal distribution"


@pytest.mark.parametrize("fill", [1, 700, 3000, 10**9])
def test_rounds_fill_what_takes_as_long_empty(fill):
    """To whole multiples of `fill` tokens, and no example more; never fewer examples than without."""
    full, race = plausible(3, np.linspace(0.0, 0.4, 12), noise=0.5), sk.Race(seed=4)
    cost, order = np.random.default_rng(0).integers(20, 150, full.nll.shape), race.order(250)
    state, least = RaceState(race, full.tokens.numpy(), cost, fill), race.first
    while (cells := state.next_cells()) is not None:
        live, before = state.active.copy(), state.scored.copy()
        taken, more = int(cost.flat[cells].sum()), int(cost[live][:, order[state.size : state.size + 1]].sum())
        least_cost = int((cost * ~before)[np.ix_(live, order[:least])].sum())
        room = -(-least_cost // fill) * fill
        assert state.size == 250 or (least_cost <= taken <= room < taken + more)
        state.add(cells, full.nll.numpy().ravel()[cells])
        least = min(250, math.ceil(state.rounds[-1] * race.growth))
    plain = hold(full, race).race
    assert len(state.rounds) <= len(plain.rounds) and state.report().winner == plain.winner
    assert (state.rounds == [250]) == (fill == 10**9) and (state.rounds == plain.rounds) == (fill == 1)


@pytest.mark.parametrize("seed", range(20))
def test_a_race_without_risk_chooses_what_scoring_everything_chooses(seed):
    """Nothing is dropped on evidence, so all cells are scored; ties go to the lowest index."""
    rng = np.random.default_rng(seed)
    prompts, examples = int(rng.integers(2, 7)), int(rng.integers(3, 40))
    nll = rng.integers(0, 3, (prompts, examples)) * 0.1 + (rng.normal(size=(prompts, examples)) if seed % 2 else 5)
    full = matrix(np.abs(nll), rng.integers(1, 4, nll.shape))
    if seed % 4 == 0:  # equal rows, and equal sums of different cells
        full.nll[1], full.tokens[1] = full.nll[0].flip(0), full.tokens[0].flip(0)
    scores = hold(full, sk.Race(delta=0, relative=0.0, seed=seed))
    assert scores.best == full.best and scores.race.examples == [examples] * prompts
    assert torch.equal(scores.nll, full.nll) and torch.equal(scores.loss, full.loss)
    assert scores.ranking() == full.ranking()


def test_near_ties_are_dropped_within_the_tolerance():
    full = plausible(3, [0.0, 0.001, 0.002, 0.5], noise=0.02)
    strict, lenient = hold(full, sk.Race(relative=0.0)), hold(full, sk.Race(relative=0.0, tolerance=0.02))
    assert lenient.race.cells < 0.5 * strict.race.cells
    assert "within tolerance" in lenient.race.reason and "within tolerance" not in strict.race.reason
    assert float(full.loss[lenient.best] - full.loss.min()) <= 0.02 and strict.best == full.best


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_leader_that_breaks_gives_back_those_it_had_beaten(bad):
    race = sk.Race(relative=0.0, first=12)
    full = plausible(17, [0.0, 0.001, 1.0, 1.2])
    full.nll[0, race.order(250)[13]] = full.nll[3, race.order(250)[3]] = bad
    state = RaceState(race, full.tokens.numpy())
    state.add(first := state.next_cells(), full.nll.numpy().ravel()[first])
    assert state.active.tolist() == [True, True, False, False]
    scores = hold(full, race)
    assert scores.race.reason == ["not finite", "winner", "worse", "not finite"] and scores.race.left[2:] == [3, 1]
    assert scores.best == 1 == full.best and scores.nonfinite == [0, 3] and scores.ranking()[:2] == [1, 2]
    assert scores.race.examples == [14, 14, 14, 12] and scores.race.rounds == [12, 14, 14]
    assert scores.reduce().isfinite().tolist() == [False, True, True, False]
    full.nll[:, 7] = bad
    scores = hold(full, sk.Race(first=250))
    assert scores.race.winner == -1 and scores.race.reason == ["not finite"] * 4 and "no winner" in repr(scores.race)
    with pytest.raises(ValueError, match="none of the 4 prompts has a finite loss"):
        _ = scores.best


def test_losses_after_a_race_are_paired():
    """The loser saw easy examples only; its own mean would beat the winner's."""
    race = sk.Race()
    full = plausible(7, [0.0, 2.0, 0.01], noise=0.1)
    full.nll[:, race.order(250)[race.first :]] *= 9
    scores = hold(full, race)
    assert scores.race.examples[0] > scores.race.examples[1] == race.first
    own = scores.nll.nansum(1) / scores.tokens.sum(1)
    assert own[1] < own[0] < scores.loss[1]
    for kind in ("token", "example", "batch"):
        both = matrix(scores.nll[[1, 0]], torch.where(scores.scored[1], scores.tokens[[1, 0]], 0))
        a, b = both.reduce(kind, 3)
        assert float(scores.reduce(kind, 3)[1]) == pytest.approx(float(scores.reduce(kind, 3)[0] + a - b))


def test_the_winner_stands_first_whatever_the_estimates_say():
    report = RaceReport(1, [2, 4, 4], [1, 2, 2], ["within tolerance", "winner", "worse"], [2, 4], 10, 12)
    nll, tokens = [[1.0, 1.0, NAN, NAN], [2.0] * 4, [3.0] * 4], [[1, 1, 0, 0], [1] * 4, [1] * 4]
    scores = sk.PromptScores(torch.tensor(nll).double(), torch.tensor(tokens), list("abc"), race=report)
    assert scores.loss.tolist() == [1.0, 2.0, 3.0] and scores.ranking() == [1, 0, 2] and scores.best == 1
    assert scores.ranking("example") == [0, 1, 2], "it was run for the loss by tokens"


BAD_OPTIONS = {
    "delta": [1, -0.1, NAN, True, "0.05", None],
    "tolerance": [-1e-9, NAN, INF, True],
    "relative": [-0.1, 1.0, NAN],
    "first": [0, 1, 16.0, True, None],
    "growth": [1, 0.5, NAN, INF, True],
    "seed": [1.0, None, True],
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_named(name):
    for value in BAD_OPTIONS[name]:
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
            sk.Race(**{name: value})


def test_the_order_is_everywhere_the_same():
    order = sk.Race(seed=3).order(10)
    assert order == [2, 4, 5, 8, 9, 3, 7, 0, 1, 6] and sk.Race(seed=3).order(10) == order
    places = np.array([sk.Race(seed=seed).order(8).index(0) for seed in range(800)])
    assert (np.abs(np.bincount(places, minlength=8) - 100) < 40).all(), "every place is as likely"


def test_scores_of_a_race_round_trip(tmp_path):
    full = plausible(13, [0.0, 0.1, 1.0, 2.0])
    full.nll[3, sk.Race(seed=1).order(250)[0]] = NAN
    scores = hold(full, sk.Race(seed=1))
    assert scores.race.reason[3] == "not finite" and scores.nonfinite == [3]
    scores.save(tmp_path / "scores.json")
    again = sk.PromptScores.load(tmp_path / "scores.json")
    assert again.race == scores.race and again.to_dict() == scores.to_dict() and again.ranking() == scores.ranking()
    assert torch.equal(again.scored, scores.scored) and torch.equal(again.loss.nan_to_num(), scores.loss.nan_to_num())
    text = (tmp_path / "scores.json").read_text()
    assert text.count("null") == 1000 - scores.race.cells, "cells not scored, and nothing else"
    data = scores.to_dict()
    # What version 0 wrote beside these.
    data["race"] |= {"against": [0] * 4, "lower": ["nan"] * 4, "upper": [0.0] * 4, "regret": 0.0, "delta": 0.05}
    assert sk.PromptScores.from_dict(data).race == scores.race
    hole = data["tokens"][1].index(0)
    data["tokens"][1][hole] = 3
    with pytest.raises(DataError, match=rf"nll\[1\]\[{hole}\]: expected a number, got"):
        sk.PromptScores.from_dict(data)


BAD_REPORTS = {
    "race: expected an object": [None, 3, [], "won"],
    "race: winner: expected": [{"winner": 2}, {"winner": -2}, {"winner": True}, {"winner": None}],
    "race: examples: expected a list of 2": [{"examples": [1]}, {"examples": 3}],
    r"race: examples\[1\]: expected": [{"examples": [1, -1]}, {"examples": [1, 1.5]}, {"examples": [1, 2**63]}],
    r"race: left\[0\]: expected": [{"left": [0, 1]}, {"left": [9, 1]}],
    "race: reason: expected": [{"reason": ["lost", "worse"]}, {"reason": [[], "worse"]}, {"reason": ["worse"]}],
    "race: total: expected": [{"total": 0}],
    "race: rounds: expected a list": [{"rounds": 3}],
}


@pytest.mark.parametrize("message", BAD_REPORTS)
def test_bad_reports_are_named(message):
    data = hold(plausible(14, [0.0, 2.0]), sk.Race()).to_dict()
    for change in BAD_REPORTS[message]:
        race = {**data["race"], **change} if isinstance(change, dict) else change
        with pytest.raises(DataError, match=message):
            sk.PromptScores.from_dict({**data, "race": race})


PROMPTS = [f"Say whether the text is{' really' * k} about fruit." for k in range(5)]
EXAMPLES = [{"input": f"{'an apple' if i % 2 else 'a stone'} {i}", "target": ("yes", "no")[i % 2]} for i in range(40)]


@pytest.mark.parametrize("impl", ["tree", "padded"])
def test_a_model_is_raced(tiny_model, chat_tokenizer, impl):
    tiny_model.train()
    cache = sk.ResponseCache.build(chat_tokenizer, PROMPTS, EXAMPLES)
    full, race = sk.score_prompts(tiny_model, cache, impl=impl), sk.Race(tolerance=0.05, first=8)
    scores = sk.score_prompts(tiny_model, cache, impl=impl, race=race)
    assert tiny_model.training, "left as it was"
    assert 0 < scores.race.cells < 200 and int(scores.scored.sum()) == scores.race.cells
    bound = TOLERANCES["token nll"].atol * scores.tokens[scores.scored]
    assert ((scores.nll - full.nll)[scores.scored].abs() <= bound).all()
    assert (scores.tokens[~scores.scored] == 0).all() and scores.nll[~scores.scored].isnan().all()
    assert torch.equal(scores.tokens[scores.scored], full.tokens[scores.scored])
    assert float(full.loss[scores.best] - full.loss.min()) <= 0.05
    assert 0 < scores.stats["trie_tokens"] < full.stats["trie_tokens"]
    assert scores.stats["dense_tokens"] == full.stats["dense_tokens"]
    again = sk.score_prompts(tiny_model, cache, impl=impl, race=race)
    assert again.race == scores.race and torch.equal(again.nll.nan_to_num(), scores.nll.nan_to_num())


def test_a_race_that_scores_everything_gives_the_same_matrix(tiny_model, chat_tokenizer, monkeypatch, caplog):
    """By another path too, which is announced once a race."""
    cache = sk.ResponseCache.build(chat_tokenizer, [*PROMPTS, PROMPTS[0]], EXAMPLES)
    full = sk.score_prompts(tiny_model, cache)
    for reason in (None, "its layers say so"):
        monkeypatch.setattr("sapo_kernels.scoring.model_support.adapter_by_row", lambda model, reason=reason: reason)
        scores = sk.score_prompts(tiny_model, cache, race=sk.Race(delta=0, relative=0.0))
        assert torch.equal(scores.tokens, full.tokens) and scores.best == full.best and len(scores.race.rounds) > 1
        assert ((scores.nll - full.nll).abs() <= TOLERANCES["token nll"].atol * full.tokens).all()
        assert torch.equal(scores.nll[0], scores.nll[5]), "equal prompts get equal bits"
    assert [message.split(": ")[1] for message in caplog.messages] == ["its layers say so"]
