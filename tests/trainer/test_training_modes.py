"""When it is scored and what is drawn: hard and soft mode, steps, epochs, drift; the metrics and the log lines."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter

import pytest
import torch
from transformers import TrainerCallback

from sapo_peft import SapoConfig
from sapo_peft.data.prompt_pool import PoolPrompt
from sapo_peft.trainer.choice import Choice, draw
from tests.trainer.training_helpers import colours, pool_of, prefer, record_batches, sapo_trainer, texts_of

METRICS = {"sapo/best_loss", "sapo/original_loss", "sapo/switches", "sapo/entropy", "sapo/score_seconds"}


def scored(callback) -> list[tuple[int, str]]:
    return [(scoring.step, scoring.reason) for scoring in callback.history]


# Draws.


def test_draws_follow_the_probabilities():
    """Chi-square with 4 degrees of freedom; the bound is passed by chance once in 1,000 seeds, and this is one seed."""
    probs = [0.4, 0.3, 0.15, 0.1, 0.05]
    n = 5000
    found = Counter(draw(probs, 3, 0, "t", {"input": f"text {i}", "target": "a"}) for i in range(n))
    chi_square = sum((found[k] - n * p) ** 2 / (n * p) for k, p in enumerate(probs))
    assert chi_square < 18.47, (chi_square, found)


def test_draws_depend_on_seed_epoch_task_and_text_and_on_nothing_else():
    probs, one = [0.25] * 4, {"input": "a", "target": "b"}
    rows = [{"input": f"{i}", "target": "b"} for i in range(64)]

    def draws(seed=0, epoch=0, task="t", rows=rows):
        return [draw(probs, seed, epoch, task, row) for row in rows]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert draws() == draws() and torch.equal(before, torch.get_rng_state())
    others = [draws(seed=1), draws(epoch=1), draws(task="u"), draws(rows=[{**r, "target": "c"} for r in rows])]
    # Where two are independent, a quarter is equal by chance.
    for other in others:
        assert sum(a == b for a, b in zip(draws(), other, strict=True)) < 32
    assert draw(probs, 0, 0, "t", {"input": "\ud800", "target": ""}) in range(4)
    assert draw(probs, 0, 0, "t", one) == draw(probs, 0, 0, "t", {**one, "task": "t"})


@pytest.mark.parametrize(
    ("probs", "possible"),
    [([0.0, 1.0, 0.0], {1}), ([0.0, 0.5, 0.5, 0.0], {1, 2}), ([0.0, 0.0], {0}), ([1e-300, 0.0], {0}),
     ([2.0, 2.0], {0, 1})],
)  # fmt: skip
def test_a_prompt_without_probability_is_never_drawn(probs, possible):
    assert {draw(probs, 0, 0, "t", {"input": str(i), "target": ""}) for i in range(500)} == possible


@pytest.mark.parametrize("workers", [0, 2])
def test_soft_mode_trains_on_the_draws_of_the_state(tmp_path, workers):
    config = SapoConfig(mode="soft", temperature=2.0, floor=0.3, every_steps=5, probe_examples=3, seed=4)
    trainer, callback = sapo_trainer(
        tmp_path, config=config, data=colours(12), max_steps=-1, num_train_epochs=2, dataloader_num_workers=workers,
    )  # fmt: skip
    probs = {}
    score = callback.rescorer.score

    def remembering(model, step, *rest):
        made = score(model, step, *rest)
        probs[step] = callback.choice.state.probs[0].tolist()
        return made

    callback.rescorer.score = remembering
    batches = record_batches(trainer)
    trainer.train()
    assert sorted(probs) == [0, 5, 10]
    pool, answers = callback.choice.pools["colours"], {row["input"]: row["target"] for row in colours(12)}
    drawn, by_epoch = [], [{}, {}]
    for batch in batches:
        now = probs[max(step for step in probs if step <= batch["step"])]
        for context, _ in texts_of(trainer, batch):
            source = context.split("Text:\n")[1].split("\n")[0]
            epoch = batch["step"] // 6
            k = draw(now, 4, epoch, "colours", {"input": source, "target": answers[source]})
            assert f"user\n{pool.prompts[k]}\n\n" in context
            drawn.append(k)
            by_epoch[epoch][source] = k
    assert len(set(drawn)) > 1, "a mixture"
    found = {row["step"]: row["sapo/entropy"] for row in trainer.state.log_history if "sapo/entropy" in row}
    assert found == {step: pytest.approx(-sum(p * math.log(p) for p in probs[step])) for step in probs}
    assert by_epoch[0] != by_epoch[1] and set(by_epoch[0]) == set(by_epoch[1])


def test_a_choice_is_kept_where_nothing_could_be_scored():
    choice = Choice({"a": pool_of(3, "a"), "b": pool_of(2, "b")}, "hard", 0)
    assert choice.take([2, 1]) == [("a", 0, 2), ("b", 0, 1)]
    assert choice.take([-1, 0]) == [("b", 1, 0)] and choice.chosen.tolist() == [2, 0]
    assert choice.round == (2, 0), "every choice is a new round"


# When.


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"at_start": False}, []),
        ({}, [0]),
        ({"every_steps": 1}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"every_steps": 4}, [0, 4, 8]),
        # After the last step nothing would be trained on it.
        ({"every_steps": 9, "at_start": False}, []),
        ({"each_epoch": True}, [0, 3, 6]),
        ({"each_epoch": True, "at_start": False}, [3, 6]),
        # Step 6 ends an epoch: the same model is not scored twice.
        ({"each_epoch": True, "every_steps": 2}, [0, 2, 3, 4, 6, 8]),
        ({"drift": 1e9, "drift_cooldown": 1}, [0]),
        ({"drift": 1e-9, "drift_cooldown": 1}, [0, 3, 6]),
    ],
)
def test_it_is_scored_exactly_when_asked(tmp_path, options, wanted):
    config = SapoConfig(probe_examples=1, **options)
    trainer, callback = sapo_trainer(tmp_path, config=config, data=colours(6), max_steps=9)
    trainer.train()
    assert [step for step, _ in scored(callback)] == wanted
    assert len(callback.history) == callback.scorings


# Metrics and lines.


def test_metrics_are_in_the_history_of_the_trainer(tmp_path):
    trainer, callback = sapo_trainer(tmp_path, config=SapoConfig(every_steps=2, probe_examples=2))
    prefer(callback, [1, 2, 2])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "sapo/best_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row, scoring in zip(rows, callback.history, strict=True):
        assert set(row) >= METRICS and all(type(row[name]) is float for name in METRICS)
        losses = scoring.losses["colours"]
        assert row["sapo/best_loss"] == losses[scoring.chosen["colours"]] == min(losses)
        assert row["sapo/original_loss"] == losses[0]
        assert row["sapo/entropy"] == 0.0
    assert [row["sapo/switches"] for row in rows] == [1.0, 2.0, 2.0]
    (end,) = [row for row in trainer.state.log_history if "sapo/overhead_fraction" in row]
    assert end["step"] == 6 and 0 < end["sapo/overhead_fraction"] < 1
    assert end["sapo/score_seconds"] == pytest.approx(sum(scoring.seconds for scoring in callback.history))
    assert end is not trainer.state.log_history[-1], "before the summary: some reporters end their run at its end"
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_reporters_get_everything_before_they_are_closed(tmp_path):
    """Those of the trainer are called before SAPO; some open a new run when something is logged after their end."""
    seen, closed = [], []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            assert not closed, f"logged after the end: {logs}"
            seen.append(set(logs))

        def on_train_end(self, args, state, control, **kwargs):
            closed.append(True)

    trainer, _ = sapo_trainer(tmp_path)
    trainer.callback_handler.callbacks.insert(0, Reporter())
    trainer.train()
    assert closed and any(names >= METRICS for names in seen)
    assert any("sapo/overhead_fraction" in names for names in seen)


@pytest.mark.parametrize("shown", ["printed", "logged", "silent"])
def test_every_switch_is_one_readable_line(tmp_path, caplog, capsys, shown):
    """On stdout unless the program shows the log at level INFO; with another level for this logger, nowhere."""
    # A pool refuses control characters but for line ends and tabs; a log must bear whatever it is given.
    pool = pool_of(1)
    texts = ("One.", "Two\nlines\tand a tab \u2028 \u202e \x85 \u200b end", "Three \x1b[31m red\r\n" + "x" * 500)
    pool = pool.model_copy(update={"entries": tuple(PoolPrompt(text, "given") for text in texts)})
    pool.__dict__.pop("prompts", None)
    trainer, callback = sapo_trainer(tmp_path, pool_of(3), SapoConfig(every_steps=1, probe_examples=2))
    callback.choice.pools = {"colours": pool}
    prefer(callback, [1, 2, 2, 0, 0, 1])
    level = {"printed": logging.NOTSET, "logged": logging.INFO, "silent": logging.ERROR}[shown]
    with caplog.at_level(level, logger="sapo_peft"):
        trainer.train()
    printed = [line for line in capsys.readouterr().out.split("\n") if line.startswith("SAPO")]
    logged = [record.getMessage() for record in caplog.records if record.name == "sapo_peft"]
    assert not (logged if shown == "printed" else printed)
    *lines, end = printed if shown == "printed" else logged if shown == "logged" else [None]
    if shown == "silent":
        assert not logged and callback.switches == 4
        return
    assert len(lines) == 4 == callback.switches
    for line in lines:
        assert line.isprintable() and line.isascii() and len(line) < 300, line
    assert "step 0 (start)" in lines[0] and "to prompt 1" in lines[0] and "Two\\nlines\\tand a tab \\u2028" in lines[0]
    assert "step 1 (every 1 steps)" in lines[1] and "from prompt 1" in lines[1] and "\\u001b[31m" in lines[1]
    assert end.startswith("SAPO: 6 scorings took") and "; 4 switches in all; trained on " in end


def test_every_rank_draws_by_the_numbers_of_rank_0(tmp_path):
    """Processors may differ in the last bits of an exponential, so what is drawn by is shared, not computed."""
    config = SapoConfig(mode="soft", temperature=0.5, probe_examples=2)
    trainer, callback = sapo_trainer(tmp_path, config=config, max_steps=1)
    callback.rescorer.agree = lambda value: value if value.ndim == 3 else torch.full_like(value, 2.0)
    trainer.train()
    state = callback.choice.state
    for value in (state.mean, state.weight, state.probs, state.best, state.effective, callback.choice.chosen):
        assert (value == 2).all()
