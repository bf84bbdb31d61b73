"""Races inside a run: who is chosen, what is saved, what a resumed run does, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import sapo_kernels as sk
import sapo_peft.trainer.rescoring
from sapo_peft import SapoConfig
from sapo_peft.trainer.checkpoints import seal
from tests.trainer.training_helpers import adapter_digest, colours, curve, pool_of, sapo_trainer

# Prompts that a random model tells apart early: the others are near ties, which cost examples.
RACE = sk.Race(relative=0.02, first=6)
PROBE = 40


@pytest.fixture
def made(monkeypatch):
    """Every call of `score_prompts` inside a run: (race, scores)."""
    calls, plain = [], sk.score_prompts

    def score_prompts(*args, race=None, **kwargs):
        scores = plain(*args, race=race, **kwargs)
        calls.append((race, scores))
        return scores

    monkeypatch.setattr(sk, "score_prompts", score_prompts)
    return calls


def raced(folder, config=None, every: int = 2, **options):
    config = config or SapoConfig(race=RACE, every_steps=every, probe_examples=PROBE)
    return sapo_trainer(folder, pool_of(5), config, data=colours(PROBE), **options)


def end(trainer, callback) -> dict:
    rows = [[s.step, s.losses, s.tokens, s.chosen, s.cells_saved] for s in callback.history]
    return {"rows": rows, "curve": curve(trainer), "adapter": adapter_digest(trainer.model)}


def test_the_winner_of_every_race_is_chosen(tmp_path, made):
    trainer, callback = raced(tmp_path, max_steps=6)
    trainer.train()
    assert len(made) == 3 == len(callback.history)
    for (race, scores), scoring in zip(made, callback.history, strict=True):
        assert scoring.chosen == {"colours": scores.race.winner}
        assert scoring.losses["colours"] == pytest.approx(scores.loss.tolist(), rel=1e-14)
        assert scoring.tokens["colours"] == scores.tokens.sum(1).tolist()
        assert scoring.cells_saved == pytest.approx(scores.race.saved) and scoring.cells_saved > 0.3
        assert race == replace(RACE, seed=race.seed)
    assert len({race.seed for race, _ in made}) == 3, "an order of its own for each"
    rows = [row for row in trainer.state.log_history if "sapo/best_loss" in row]
    assert [row["sapo/cells_saved"] for row in rows] == [s.cells_saved for s in callback.history]


def test_the_mean_of_a_few_examples_does_not_overturn_the_winner(tmp_path):
    """The winner is settled by the race; the estimates that enter the state may say otherwise."""
    trainer, callback = raced(tmp_path, max_steps=1)
    rescorer, state = callback.rescorer, callback.choice.state
    scores = sk.score_prompts(trainer.model, rescorer.caches["colours"], race=RACE, progress=False)
    wrong = int(scores.loss.argmax())
    assert wrong != scores.race.winner
    scores.race = replace(scores.race, winner=wrong)
    rescorer._scores = lambda *args: scores
    live = state.live.clone()
    scoring = rescorer.score(trainer.model, 0, "start")
    assert scoring.chosen == {"colours": wrong} and state.best.tolist() == [wrong] == scores.ranking()[:1]
    assert state.probs[0, wrong] == 1.0 and torch.equal(state.live, live)
    assert torch.equal(state.weight[0], scores.tokens.sum(1).double())
    assert torch.allclose(state.mean[0], scores.loss, rtol=1e-14, atol=0.0)
    assert int(state.mean[0].argmin()) != wrong, "else this proves nothing"


def test_nobody_is_chosen_where_no_loss_is_finite(tmp_path):
    trainer, callback = raced(tmp_path, max_steps=1)
    for parameter in trainer.model.parameters():
        parameter.data.fill_(float("nan"))
    scoring = callback.rescorer.score(trainer.model, 0, "start")
    assert scoring.chosen == {"colours": 0} and callback.choice.state.best.tolist() == [-1]
    assert scoring.cells_saved > 0.5 and callback.choice.state.live.all()


def test_a_resumed_run_is_the_one_that_was_not_interrupted(tmp_path, made):
    whole = raced(tmp_path, save_strategy="steps", save_steps=3)
    whole[0].train()
    expected, cells = end(*whole), [int(scores.scored.sum()) for _, scores in made]
    checkpoint = tmp_path / "copies" / "checkpoint-3"
    shutil.copytree(tmp_path / "checkpoint-3", checkpoint)
    # What earlier versions kept of their races is read over.
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"]["sapo"]["memory"] = {"colours": [{"nll": "AAAA"}]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    seal(checkpoint)
    made.clear()
    again = raced(tmp_path)
    again[0].train(resume_from_checkpoint=str(checkpoint))
    assert end(*again) == expected and [int(scores.scored.sum()) for _, scores in made] == cells[2:]


def test_ranks_that_cannot_share_a_scoring_out_score_every_cell(tmp_path, made, monkeypatch, caplog):
    """Each rank's own rounding might end a race in another round than the others', which would wait for ever."""
    trainer, callback = raced(tmp_path, max_steps=1)
    monkeypatch.setattr(sapo_peft.trainer.ranks, "several", lambda: True)
    monkeypatch.setattr(
        sapo_peft.trainer.rescoring, "unshareable", lambda model: "'lm_head.weight' is spread over ranks"
    )
    callback.rescorer.agree = lambda value: value
    with caplog.at_level("WARNING", logger="sapo_kernels"):
        for _ in range(2):
            assert callback.rescorer.score(trainer.model, 0, "start").cells_saved == 0.0
    assert [race for race, _ in made] == [None, None] and caplog.text.count("no race, every cell is scored") == 1


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"race": True}, "'race': expected an instance of Race, got True"),
        ({"mode": "soft"}, "race: expected mode 'hard', got 'soft'"),
        ({"decay": 0.5}, "race: expected decay 0, got 0.5"),
    ],
)  # fmt: skip
def test_what_a_race_cannot_be_combined_with(change, wanted):
    with pytest.raises(ValueError, match=wanted):
        SapoConfig(**{"race": sk.Race(), **change})
