"""Races over given losses and over a model: who leaves, when, what is promised, what the scores say afterwards."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.files import DataError
from sapo_kernels.scoring.race import Contest
from tests.tolerances import TOLERANCES, assert_close

NAN, INF = float("nan"), float("inf")


def matrix(nll, tokens=None) -> sk.PromptScores:
    nll = torch.as_tensor(np.asarray(nll), dtype=torch.float64)
    tokens = torch.ones(nll.shape, dtype=torch.int64) if tokens is None else torch.as_tensor(tokens)
    return sk.PromptScores(nll, tokens, [f"prompt {k}" for k in range(len(nll))])


def hold(full: sk.PromptScores, race: sk.Race) -> sk.PromptScores:
    """The scores that a race over a matrix known in full leaves; every cell is asked for once at most."""
    contest = Contest(race, full.tokens.numpy(), full.prompts)
    while (cells := contest.wanted()) is not None:
        assert len(cells) and not contest.scored.flat[cells].any()
        contest.add(cells, full.nll.numpy().ravel()[cells])
    scored = torch.from_numpy(contest.scored)
    nll, tokens = torch.where(scored, full.nll, NAN), torch.where(scored, full.tokens, 0)
    return sk.PromptScores(nll, tokens, full.prompts, race=contest.report())


def plausible(seed: int, gaps, examples=250, noise=0.3) -> sk.PromptScores:
    """Losses that differ by `gaps` in the mean, with a part that examples have in common; targets of 1 to 4 tokens."""
    rng = np.random.default_rng(seed)
    tokens = np.tile(rng.integers(1, 5, examples), (len(gaps), 1))
    per_token = rng.gamma(4.0, 0.5, examples) + np.asarray(gaps)[:, None]
    return matrix(np.maximum(per_token + noise * rng.normal(size=tokens.shape), 0.0) * tokens, tokens)


def test_clear_losers_leave_after_the_first_round():
    full = plausible(0, [0.0, 3.0, 3.5, 4.0])
    scores = hold(full, sk.Race())
    report = scores.race
    assert report.winner == scores.best == full.best == 0 and report.regret == 0.0
    assert report.examples == [8] * 4 and report.left == [1] * 4 and report.rounds == [8]
    assert report.reason == ["winner", "worse", "worse", "worse"] and report.against == [0] * 4
    assert report.cells == 32 and report.total == 1000 and report.saved == pytest.approx(0.968)
    assert report.lower[0] == report.upper[0] == 0.0
    for k in (1, 2, 3):
        assert 0 < report.lower[k] < float(full.loss[k] - full.loss[0]) < report.upper[k]
    assert scores.scored.sum() == 32 and (scores.nll[~scores.scored].isnan()).all()


@pytest.mark.parametrize("seed", range(40))
def test_a_race_without_risk_chooses_what_scoring_everything_chooses(seed):
    """Nothing is dropped on evidence, so all cells are scored; ties go to the lowest index."""
    rng = np.random.default_rng(seed)
    prompts, examples = int(rng.integers(1, 7)), int(rng.integers(1, 40))
    nll = rng.integers(0, 3, (prompts, examples)) * 0.1 + (rng.normal(size=(prompts, examples)) if seed % 2 else 5)
    full = matrix(np.abs(nll), rng.integers(1, 4, nll.shape))
    if seed % 4 == 0 and prompts > 1:  # equal rows, and equal sums of different cells
        full.nll[1], full.tokens[1] = full.nll[0].flip(0), full.tokens[0].flip(0)
    scores = hold(full, sk.Race(delta=1e-300, relative=0.0, seed=seed))
    assert scores.best == full.best and scores.race.regret == 0.0
    if prompts > 1:
        assert torch.equal(scores.nll, full.nll) and torch.equal(scores.tokens, full.tokens)
        assert torch.equal(scores.loss, full.loss) and scores.ranking() == full.ranking()
        assert scores.race.examples == [examples] * prompts
        differences = full.loss - full.loss[full.best]
        for bound in (scores.race.lower, scores.race.upper):
            assert_close("float64 sums", torch.tensor(bound, dtype=torch.float64), differences)


def test_one_prompt_needs_no_race():
    scores = hold(plausible(1, [0.0]), sk.Race())
    assert scores.best == 0 and scores.race.examples == [8] and scores.race.reason == ["winner"]


def test_the_promise_holds_over_orders():
    """Near ties without a tolerance, the hardest case: the wrong one wins at most delta of the races."""
    full, wrong, races = plausible(2, [0.02, 0.0, 0.05, 0.05, 0.4], examples=80), 0, 200
    for seed in range(races):
        wrong += hold(full, sk.Race(delta=0.2, relative=0.0, growth=1.5, seed=seed)).best != full.best
    assert wrong <= races * 0.2


def test_near_ties_wait_and_the_regret_is_within_the_tolerance():
    full = plausible(3, [0.0, 0.001, 0.002, 0.5], noise=0.02)
    strict, lenient = hold(full, sk.Race(relative=0.0)), hold(full, sk.Race(relative=0.0, tolerance=0.02))
    assert lenient.race.cells < 0.5 * strict.race.cells
    assert "within tolerance" in lenient.race.reason and "within tolerance" not in strict.race.reason
    assert 0.0 < lenient.race.regret <= 0.02 and lenient.race.tolerance == 0.02
    assert float(full.loss[lenient.best] - full.loss.min()) <= 0.02 and strict.best == full.best
    share = hold(full, sk.Race(relative=0.01))
    assert share.race.tolerance == pytest.approx(0.01 * float(share.loss[share.best]), rel=0.2)


def test_a_prompt_that_waits_comes_back_when_the_lead_changes():
    """1 waits behind 0 after 16 examples; then 0 falls back, and 1 is scored on all it has missed."""
    race = sk.Race(relative=0.0, tolerance=0.3, first=16, growth=2.0)
    late = np.asarray(race.order(64))[16:]
    rng = np.random.default_rng(4)
    nll = 2.0 + 0.1 * rng.normal(size=(3, 64))
    nll[1] += 0.05
    nll[2] = nll[2].mean() + 0.3 + rng.permuted(np.tile([-2.0, 2.0], 32))
    nll[0, late] += 9.0
    contest = Contest(race, np.ones((3, 64), dtype=np.int64), ["a", "b", "c"])
    contest.add(contest.wanted(), nll[:, np.sort(race.order(64)[:16])].ravel())
    assert contest.waiting.tolist() == [False, True, False] and contest.leader == 0
    second = contest.wanted()
    assert set(second // 64) == {0, 2}
    contest.add(second, nll.ravel()[second])
    third = contest.wanted()
    assert contest.leader == 2 and set(third[third // 64 == 1] % 64) >= set(race.order(64)[16:32])
    scores = hold(matrix(nll), race)
    assert scores.best == 1 or scores.best == 2
    assert scores.race.examples[1] > 16 and scores.race.left[1] > 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_leader_that_breaks_gives_back_those_it_had_beaten(bad):
    race = sk.Race(relative=0.0, first=12)
    full = plausible(17, [0.0, 0.001, 1.0, 1.2])
    full.nll[0, race.order(250)[18]] = bad
    full.nll[3, race.order(250)[3]] = bad
    contest = Contest(race, full.tokens.numpy(), full.prompts)
    first = contest.wanted()
    contest.add(first, full.nll.numpy().ravel()[first])
    assert contest.removed[2] and contest.against[2] == 0
    scores = hold(full, race)
    assert scores.race.reason[0] == scores.race.reason[3] == "not finite"
    assert scores.best == 1 == full.best and scores.nonfinite == [0, 3]
    assert scores.race.left[3] == 1 and scores.race.against[2] == 1
    assert math.isnan(scores.race.lower[0]) and scores.ranking()[:2] == [1, 2]
    assert scores.reduce().isfinite().tolist() == [False, True, True, False]


def test_bets_against_a_prompt_that_breaks_are_taken_back():
    """0 leaves after the first round: 2 leads in nearly all of it, and 1 at its end. Then 2 breaks."""
    race = sk.Race(relative=0.0, first=16, growth=1.5)
    order = race.order(250)
    full = matrix(3 + 0.3 * np.random.default_rng(0).normal(size=(3, 250)))
    full.nll += torch.tensor([[-0.5], [0.0], [-1.5]])
    full.nll[1, order[:16]] -= 0.6
    full.nll[2, order[14]] += 40.0
    full.nll[2, order[20]] = NAN
    contest = Contest(race, full.tokens.numpy(), full.prompts)
    contest.add(cells := contest.wanted(), full.nll.numpy().ravel()[cells])
    assert contest.removed.tolist() == [True, False, False] and contest.leader == 1
    report = hold(full, race).race
    assert report.winner == 0 and report.reason == ["winner", "worse", "not finite"]
    assert report.examples == [report.rounds[left - 1] for left in report.left]


def test_a_second_round_may_be_all_that_is_left():
    full = plausible(18, [0.0, 0.01])
    assert hold(full, sk.Race(relative=0.0, delta=1e-9, growth=1e308)).race.rounds == [8, 250]


def test_nobody_wins_if_all_break():
    full = plausible(6, [0.0, 1.0])
    full.nll[:, 7] = NAN
    scores = hold(full, sk.Race(first=250))
    assert scores.race.winner == -1 and scores.race.reason == ["not finite"] * 2
    assert math.isnan(scores.race.regret) and "no winner" in repr(scores.race)
    with pytest.raises(ValueError, match="none of the 2 prompts has a finite loss"):
        _ = scores.best


def test_losses_after_a_race_are_paired():
    """The loser saw easy examples only; its own mean would beat the winner's."""
    race = sk.Race()
    full = plausible(7, [0.0, 2.0, 0.01], noise=0.1)
    early = torch.tensor(race.order(250)[:8])
    rest = torch.ones(250, dtype=torch.bool).index_fill_(0, early, False)
    full.nll[:, rest] += 9 * full.tokens[:, rest]
    scores = hold(full, race)
    assert scores.race.examples[0] > scores.race.examples[1] == 8
    own = scores.nll.nansum(1) / scores.tokens.sum(1)
    assert own[1] < own[0] < scores.loss[1]
    for kind in ("token", "example", "batch"):
        rival = scores.race.against[1]
        both = matrix(scores.nll[[1, rival]], torch.where(scores.scored[1], scores.tokens[[1, rival]], 0))
        a, b = both.reduce(kind, 3)
        assert float(scores.reduce(kind, 3)[1]) == pytest.approx(float(scores.reduce(kind, 3)[rival] + a - b))


def test_memory_saves_and_one_that_predicts_nothing_does_no_harm():
    rng = np.random.default_rng(8)
    old = plausible(8, np.linspace(0, 0.3, 21) ** 1.5, noise=0.5)
    drift = 0.1 * rng.normal(size=old.nll.shape) * old.tokens.numpy()
    new = matrix(np.maximum(old.nll.numpy() * 0.8 + drift, 0.0), old.tokens)
    junk = plausible(9, rng.permutation(np.linspace(0, 0.3, 21)), noise=0.5)
    junk.tokens[:] = old.tokens
    cells, allowed = {}, 0.005 * float(new.loss.min()) * 1.05
    for name, memory in (("none", None), ("old", old), ("junk", junk)):
        races = [hold(new, sk.Race(seed=seed, memory=memory)) for seed in range(6)]
        cells[name] = np.mean([one.race.cells for one in races])
        assert all(float(new.loss[one.best] - new.loss.min()) <= allowed for one in races)
    assert cells["old"] < 0.6 * cells["none"] and cells["junk"] < 1.25 * cells["none"]


def test_memory_with_holes_is_used_where_it_is_whole():
    old, new = plausible(10, [0.0, 0.1, 0.2, 0.3]), plausible(11, [0.0, 0.1, 0.2, 0.3])
    new.tokens[:] = old.tokens
    raced = hold(old, sk.Race())
    for memory in (raced, [old, raced]):
        again = hold(new, sk.Race(memory=memory))
        assert 0.0 <= float(new.loss[again.best] - new.loss.min()) <= 0.01
    contest = Contest(sk.Race(memory=(old, raced)), new.tokens.numpy(), new.prompts)
    assert np.isfinite(contest._old).all() and contest._old_winner == raced.best
    broken = matrix(torch.where(torch.eye(4, 250, dtype=torch.bool), NAN, old.nll), old.tokens)
    assert hold(new, sk.Race(memory=broken)).race.winner >= 0, "no row of it is finite"


def test_memory_of_another_job_is_refused():
    full = plausible(12, [0.0, 1.0])
    others = {
        "of the same prompts": sk.PromptScores(full.nll, full.tokens, ["a", "b"]),
        r"wanted scores \[2, 250\], got \[2, 249\]": matrix(full.nll[:, 1:], full.tokens[:, 1:]),
        r"prompt 1, example 3: wanted \d response tokens as in this job, got 9": matrix(
            full.nll, full.tokens.clone().index_put_((torch.tensor(1), torch.tensor(3)), torch.tensor(9))
        ),
    }
    for message, memory in others.items():
        with pytest.raises(ValueError, match=f"memory: .*{message}"):
            hold(full, sk.Race(memory=memory))


BAD_OPTIONS = {
    "delta": [0, 1, 0.0, 1.5, -0.1, NAN, INF, True, "0.05", None],
    "tolerance": [-1e-9, NAN, INF, None, True, "0"],
    "relative": [-0.1, 1.0, NAN, None, True],
    "first": [0, 4, -1, 16.0, True, None],
    "growth": [1, 1.0, 0.5, NAN, INF, None, True],
    "reach": [0.99, 0, NAN, INF, None, True],
    "seed": [1.0, None, True, "1"],
    "memory": [0, "scores", {}, [0], (None,)],
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_named(name):
    for value in BAD_OPTIONS[name]:
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
            sk.Race(**{name: value})


def test_the_order_is_everywhere_the_same():
    order = sk.Race(seed=3).order(10)
    assert order == [2, 4, 5, 8, 9, 3, 7, 0, 1, 6] and sk.Race(seed=3).order(10) == order
    assert sorted(sk.Race(seed=-1).order(1000)) == list(range(1000))
    places = np.array([sk.Race(seed=seed).order(8).index(0) for seed in range(800)])
    assert (np.abs(np.bincount(places, minlength=8) - 100) < 40).all(), "every place is as likely"


def test_scores_of_a_race_round_trip(tmp_path):
    full = plausible(13, [0.0, 0.1, 1.0, 2.0])
    full.nll[3, 0] = NAN
    scores = hold(full, sk.Race(seed=1, first=250))
    assert scores.race.reason[3] == "not finite" and scores.nonfinite == [3]
    scores = hold(full, sk.Race(seed=1))
    scores.save(tmp_path / "scores.json")
    again = sk.PromptScores.load(tmp_path / "scores.json")
    assert again.race == scores.race or scores.race.reason.count("not finite")
    assert again.to_dict() == scores.to_dict() and again.best == scores.best and again.ranking() == scores.ranking()
    assert torch.equal(again.scored, scores.scored) and torch.equal(again.loss, scores.loss)
    text = (tmp_path / "scores.json").read_text()
    assert text.count("null") == 1000 - scores.race.cells, "cells not scored, and nothing else"


def test_null_stands_for_cells_not_scored_only():
    data = hold(plausible(14, [0.0, 2.0]), sk.Race()).to_dict()
    hole = data["tokens"][1].index(0)
    assert data["nll"][1][hole] is None
    data["tokens"][1][hole] = 3
    with pytest.raises(DataError, match=rf"nll\[1\]\[{hole}\]: wanted a number, got"):
        sk.PromptScores.from_dict(data)


BAD_REPORTS = {
    "race: wanted an object": [None, 3, [], "won"],
    "race: winner: expected": [{"winner": 2}, {"winner": -2}, {"winner": True}, {"winner": None}],
    "race: examples: wanted a list of 2": [{"examples": [1]}, {"examples": 3}],
    r"race: examples\[1\]: expected": [{"examples": [1, -1]}, {"examples": [1, 1.5]}, {"examples": [1, 2**63]}],
    r"race: left\[0\]: expected": [{"left": [0, 1]}, {"left": [9, 1]}],
    r"race: reason\[0\]: expected": [{"reason": ["lost", "worse"]}, {"reason": [[], "worse"]}],
    r"race: against\[1\]: expected": [{"against": [0, 2]}, {"against": [0, False]}],
    "race: against: prompt 0 is compared with itself": [{"against": [1, 0]}],
    r"race: lower\[1\]: expected": [{"lower": [0.0, "low"]}, {"lower": [0.0, 10**400]}],
    "race: regret: expected": [{"regret": "none"}, {"regret": None}],
    "race: total: expected": [{"total": 0}],
    "race: rounds: wanted a list": [{"rounds": 3}],
}


@pytest.mark.parametrize("message", BAD_REPORTS)
def test_bad_reports_are_named(message):
    data = hold(plausible(14, [0.0, 2.0]), sk.Race()).to_dict()
    for change in BAD_REPORTS[message]:
        race = {**data["race"], **change} if isinstance(change, dict) else change
        with pytest.raises(ValueError, match=message):
            _ = sk.PromptScores.from_dict({**data, "race": race}).loss


PROMPTS = [f"Say whether the text is{' really' * k} about fruit." for k in range(5)]
EXAMPLES = [{"input": f"{'an apple' if i % 2 else 'a stone'} {i}", "target": ("yes", "no")[i % 2]} for i in range(40)]


@pytest.mark.parametrize("impl", ["tree", "padded"])
def test_a_model_is_raced(tiny_model, chat_tokenizer, impl):
    tiny_model.train()
    cache = sk.ResponseCache.build(chat_tokenizer, PROMPTS, EXAMPLES)
    full = sk.score_prompts(tiny_model, cache, impl=impl)
    scores = sk.score_prompts(tiny_model, cache, impl=impl, race=sk.Race(tolerance=0.05))
    assert tiny_model.training, "left as it was"
    assert 0 < scores.race.cells < 200 and int(scores.scored.sum()) == scores.race.cells
    bound = TOLERANCES["token nll"].atol * scores.tokens[scores.scored]
    assert ((scores.nll - full.nll)[scores.scored].abs() <= bound).all()
    assert (scores.tokens[~scores.scored] == 0).all() and scores.nll[~scores.scored].isnan().all()
    assert torch.equal(scores.tokens[scores.scored], full.tokens[scores.scored])
    assert float(full.loss[scores.best] - full.loss.min()) <= 0.05
    assert 0 < scores.stats["trie_tokens"] < full.stats["trie_tokens"]
    assert scores.stats["dense_tokens"] == full.stats["dense_tokens"] and scores.stats["path"] == impl
    again = sk.score_prompts(tiny_model, cache, impl=impl, race=sk.Race(tolerance=0.05))
    assert again.race == scores.race and torch.equal(again.nll.nan_to_num(), scores.nll.nan_to_num())


def test_a_race_that_scores_everything_gives_the_same_matrix(tiny_model, chat_tokenizer):
    cache = sk.ResponseCache.build(chat_tokenizer, [*PROMPTS, PROMPTS[0]], EXAMPLES)
    full = sk.score_prompts(tiny_model, cache)
    scores = sk.score_prompts(tiny_model, cache, race=sk.Race(delta=1e-300, relative=0.0))
    assert torch.equal(scores.tokens, full.tokens) and scores.best == full.best
    assert ((scores.nll - full.nll).abs() <= TOLERANCES["token nll"].atol * full.tokens).all()
    assert torch.equal(scores.nll[0], scores.nll[5]), "equal prompts get equal bits"


def test_the_padded_road_is_announced_once_a_race(tiny_model, chat_tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("sapo_kernels.scoring.model_support.adapter_by_row", lambda model: "its layers say so")
    scores = sk.score_prompts(tiny_model, PROMPTS, EXAMPLES, tokenizer=chat_tokenizer, race=sk.Race(delta=1e-9))
    assert len(scores.race.rounds) > 1 and scores.stats["path"] == "padded"
    assert [r.getMessage() for r in caplog.records] == ["scoring by the padded road: its layers say so"]
    assert scores.stats["reason"] == "its layers say so"


def test_races_are_given_as_races(tiny_model, chat_tokenizer):
    with pytest.raises(TypeError, match="race: wanted a Race or None, got float"):
        sk.score_prompts(tiny_model, PROMPTS, EXAMPLES, tokenizer=chat_tokenizer, race=0.05)


def test_a_selection_names_its_cells_and_is_no_grid(chat_tokenizer):
    cache = sk.ResponseCache.build(chat_tokenizer, PROMPTS, EXAMPLES)
    cells = np.asarray([3, 41, 199])
    part = cache.select(cells)
    assert part.cell_name(1) == "(prompt 1, example 1)" and part.cell_name(2) == "(prompt 4, example 39)"
    for place, cell in enumerate(cells.tolist()):
        own, whole = part.offsets[place : place + 2], cache.offsets[cell : cell + 2]
        assert part.ids[slice(*own)].tolist() == cache.ids[slice(*whole)].tolist()
        assert part.context_lengths[place] == cache.context_lengths[cell]
    with pytest.raises(ValueError, match="cache: wanted one of all cells, got a selection"):
        _ = part.contexts
