"""Replays over the committed loss matrices: what is saved, and how often the choice is wrong."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import racing
from benchmarks.racing import MATRICES, Matrix, read_matrices, replays
from sapo_kernels import Race
from tests.scoring.test_race import plausible


@pytest.fixture(scope="module")
def matrices():
    return read_matrices()


def test_matrices_are_those_of_real_tasks(matrices):
    assert sum(path.stat().st_size for path in MATRICES) < 4_000_000
    assert {one.set.split("/")[0] for one in matrices} >= {"smollm2", "tiny-base", "tiny-early"}
    for one in matrices:
        prompts, examples = one.scores.nll.shape
        assert prompts == 21 and 100 <= examples <= 250 and one.scores.nonfinite == []
        assert bool((one.scores.tokens > 0).all()) and float(one.scores.loss.max() / one.scores.loss.min()) > 1.005
    assert len({one.task for one in matrices if one.set.startswith("smollm2")}) == 10


@pytest.mark.parametrize("count", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_races_of_a_pretrained_model_save_and_seldom_err(matrices, count):
    """The goal on held-out matrices: 80 % saved, over half a percent of regret in 3 % of the races."""
    own = [one for one in matrices if one.set == "smollm2/held-out"]
    rows = [replays(one, "race", count) for one in own]
    assert np.median([row.saved_p50 for row in rows]) > 0.8
    assert np.mean([row.over_half_percent for row in rows]) <= 0.03
    assert max(row.over_half_percent for row in rows) <= (0.5 if count == 2 else 0.1)


def test_rows_say_what_happened():
    scores = plausible(1, [0.0, 0.002, 0.5], noise=0.01)
    rows = [replays(Matrix("a/tuning", "a task", "base", scores), rule, 5) for rule in ("race", "strict")]
    race, strict = rows
    assert (race.prompts, race.examples, race.near, race.replays) == (3, 250, 2, 5)
    assert strict.wrong == 0 and strict.saved_p50 < race.saved_p50, "a strict race decides near ties too"
    first = racing.replay(scores, Race()).report()
    assert race.saved_p10 <= first.saved <= race.saved_p90 and race.worst_regret < 0.5
    assert len(racing.summary(rows).splitlines()) == 3


def test_a_memory_of_the_same_losses_leaves_nothing_open():
    """Half a percent apart and noisy: undecided after a round without a memory, decided with one that predicts all."""
    scores = plausible(1, [0.0, 0.02, 0.03], noise=0.3)
    alone = racing.replay(scores, Race(relative=0.0)).report()
    known = racing.replay(scores, Race(relative=0.0), scores.nll.numpy()).report()
    assert known.winner == scores.best and len(known.rounds) == 1 < len(alone.rounds)


def test_a_wrong_choice_counts(monkeypatch):
    scores = plausible(1, [0.0, 0.002, 0.5], noise=0.01)
    worst = int(scores.loss.argmax())
    ended = SimpleNamespace(report=lambda: SimpleNamespace(winner=worst, saved=0.5, rounds=[1, 2]))
    monkeypatch.setattr(racing, "replay", lambda full, race, before: ended)
    row = replays(Matrix("a/tuning", "a task", "base", scores), "race", 2)
    assert row.wrong == row.over_half_percent == 1.0
    assert row.worst_regret == pytest.approx(100 * float(scores.loss.max() / scores.loss.min() - 1))
