"""Races inside a run: who is chosen, what is remembered and comes back, what is saved, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import sapo_kernels as sk
import sapo_peft.trainer.rescoring
from sapo_peft import SapoConfig
from sapo_peft.trainer.racing import FULL_PAYS, Races
from tests.cli.test_cli_train import options
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


@pytest.mark.parametrize(("steps", "full_first"), [(6, False), (10, True)])
def test_the_winner_is_chosen_and_the_memory_is_what_was_seen(tmp_path, made, steps, full_first):
    """Where the schedule holds enough more, the first scoring is one of all cells and the control of the others."""
    assert (-(-steps // 2) - 1 >= FULL_PAYS) == full_first
    trainer, callback = raced(tmp_path, max_steps=steps)
    trainer.train()
    assert len(made) == steps // 2 == len(callback.history)
    first, last = made[0][1], None
    assert (made[0][0] is None) == full_first and (full_first or made[0][0].memory == ())
    for (race, scores), scoring in zip(made, callback.history, strict=True):
        assert scoring.chosen == {"colours": scores.best}
        assert scoring.losses["colours"] == pytest.approx(scores.loss.tolist(), rel=1e-14)
        assert scoring.tokens["colours"] == scores.tokens.sum(1).tolist()
        assert scoring.cells_saved == pytest.approx(scores.race.saved if scores.race else 0.0)
        if last is not None:
            assert scores.race.winner == scoring.chosen["colours"]
            wanted = (first, last) if full_first and last is not first else (last,)
            assert len(race.memory) == len(wanted) and all(a is b for a, b in zip(race.memory, wanted, strict=True))
        last = scores
    seeds = [race.seed for race, _ in made if race]
    assert len(set(seeds)) == len(seeds), "an order of its own for each: a memory must not know what comes first"
    rows = [row for row in trainer.state.log_history if "sapo/best_loss" in row]
    assert [row["sapo/cells_saved"] for row in rows] == [s.cells_saved for s in callback.history]
    if full_first:
        assert [row["sapo/cells_saved"] > 0.3 for row in rows] == [False] + [True] * (len(rows) - 1)


def test_the_mean_of_a_few_examples_does_not_overturn_the_winner(tmp_path):
    """The winner is known with the memory's help; the estimates that enter the state are without."""
    trainer, callback = raced(tmp_path, max_steps=1)
    rescorer, state = callback.rescorer, callback.choice.state
    scores = sk.score_prompts(trainer.model, rescorer.caches["colours"], race=RACE, progress=False)
    wrong = int(scores.loss.argmax())
    assert wrong != scores.race.winner
    scores.race = replace(scores.race, winner=wrong, against=[wrong] * 5)
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


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_is_the_one_that_was_not_interrupted(tmp_path, made, every):
    """With a first scoring of all cells, which no later one could make up for, and with a first race."""
    whole = raced(tmp_path, every=every, save_strategy="steps", save_steps=3)
    whole[0].train()
    wanted, cells = end(*whole), [int(scores.scored.sum()) for _, scores in made]
    assert (made[0][0] is None) == (every == 1)
    checkpoint = tmp_path / "copies" / "checkpoint-3"
    shutil.copytree(tmp_path / "checkpoint-3", checkpoint)
    made.clear()
    again = raced(tmp_path, every=every)
    again[0].train(resume_from_checkpoint=str(checkpoint))
    assert end(*again) == wanted
    left = cells[3 // every + 1 :]
    assert [int(scores.scored.sum()) for _, scores in made] == left
    # Without its memory it would have been another.
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["sapo"]["memory"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    made.clear()
    raced(tmp_path, every=every)[0].train(resume_from_checkpoint=str(checkpoint))
    assert [int(scores.scored.sum()) for _, scores in made] != left


def test_a_memory_survives_bit_for_bit(tmp_path):
    trainer, callback = raced(tmp_path, max_steps=1)
    races, cache = callback.rescorer.races, callback.rescorer.caches["colours"]
    full = sk.score_prompts(trainer.model, cache, progress=False)
    full.nll[0, 0], full.nll[1, 2] = float("nan"), float("inf")
    last = sk.score_prompts(trainer.model, cache, race=RACE, progress=False)
    races.seen("colours", full)
    races.seen("colours", last)
    kept = json.loads(json.dumps(callback.state(), allow_nan=False))
    other = raced(tmp_path, max_steps=1)[1]
    other.load_state(kept)
    for a, b in zip(other.rescorer.races.memory["colours"], (full, last), strict=True):
        assert torch.equal(a.nll.view(torch.int64), b.nll.view(torch.int64)) and torch.equal(a.tokens, b.tokens)
        assert a.race == b.race and a.prompts == b.prompts
    assert other.state() == callback.state()
    # A second run of the same trainer knows nothing of the first.
    other._begin_anew()
    assert other.rescorer.races.memory == {} and "memory" not in other.state()
    # Who drops the race drops the memory.
    plain = raced(tmp_path, SapoConfig(every_steps=2, probe_examples=PROBE))[1]
    plain.load_state(kept)
    assert "memory" not in plain.state()
    for broken in ({"colours": [{}]}, {"colours": [None]}, {"colours": {}}, {"others": []},
                   {"colours": [{**kept["memory"]["colours"][0], "nll": "AAAA"}]},
                   {"colours": [{**kept["memory"]["colours"][0], "scored": "?"}]},
                   {"colours": [{**kept["memory"]["colours"][1], "race": 3}]}):  # fmt: skip
        with pytest.raises(ValueError, match="memory|race"):
            raced(tmp_path, max_steps=1)[1].load_state({**kept, "memory": broken})


def test_a_race_over_all_cells_is_a_scoring_of_all_cells(tmp_path):
    """Then it takes the place of the older one."""
    trainer, callback = raced(tmp_path, max_steps=1)
    cache = callback.rescorer.caches["colours"]
    races = Races(RACE, {"colours": cache})
    for race, count in ((None, 1), (RACE, 2), (sk.Race(first=PROBE), 1), (RACE, 2)):
        races.seen("colours", sk.score_prompts(trainer.model, cache, race=race, progress=False))
        assert len(races.memory["colours"]) == count


def test_without_a_race_nothing_of_it_is_seen(tmp_path):
    """Neither in the logs nor in what is kept."""
    trainer, callback = sapo_trainer(tmp_path, config=SapoConfig(every_steps=2, probe_examples=2))
    trainer.train()
    assert SapoConfig().race is None and not any("sapo/cells_saved" in row for row in trainer.state.log_history)
    state = json.loads(json.dumps(callback.state()))
    assert "memory" not in state and all("cells_saved" not in row for row in state["history"])
    assert callback.rescorer.races.memory == {}


def test_ranks_that_cannot_share_a_scoring_out_score_every_cell(tmp_path, made, monkeypatch, caplog):
    """Each rank's own rounding might end a race in another round than the others', which would wait for ever."""
    monkeypatch.setattr(sapo_peft.trainer.rescoring, "several", lambda: True)
    monkeypatch.setattr(
        sapo_peft.trainer.rescoring, "unshareable", lambda model: "'lm_head.weight' is spread over ranks"
    )
    trainer, callback = raced(tmp_path, max_steps=1)
    with caplog.at_level("WARNING", logger="sapo_peft"):
        for _ in range(2):
            assert callback.rescorer.score(trainer.model, 0, "start").cells_saved == 0.0
    assert [race for race, _ in made] == [None, None] and caplog.text.count("no race, every cell is scored") == 1


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"race": True}, "race: wanted a sapo_kernels.Race or None, got True"),
        ({"mode": "soft"}, "race: wanted mode 'hard', got 'soft'"),
        ({"decay": 0.5}, "race: wanted decay 0, got 0.5"),
        ({"race": sk.Race(memory=sk.PromptScores(torch.ones(1, 1).double(), torch.ones(1, 1).long(), ["a"]))},
         "race: wanted one without a memory, as a run keeps its own, got 1"),
    ],
)  # fmt: skip
def test_what_a_race_cannot_be_combined_with(change, wanted):
    with pytest.raises(ValueError, match=wanted):
        SapoConfig(**{"race": sk.Race(), **change})


def test_the_command_line_and_its_file(tmp_path):
    (tmp_path / "run.yaml").write_text("race: true\n")
    assert options("--config", str(tmp_path / "run.yaml"))["race"] and options("--race")["race"]
    assert not options()["race"]
