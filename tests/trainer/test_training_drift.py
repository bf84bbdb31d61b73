"""Drift: a run that goes nowhere is not scored again, one that jumps is; the same in a resumed run."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from sapo_peft import SapoConfig
from sapo_peft.trainer.drift import Drift, Trained
from tests.trainer.training_helpers import AtSteps, choices, lora_model, pool_of, sapo_trainer


def fired(losses, threshold=4.0, window=5) -> list[int]:
    """Where drift is seen; it is scored there, and no loss depends on it."""
    drift, found = Drift(threshold, window), []
    for i, loss in enumerate(losses):
        if drift.seen(loss):
            found.append(i)
            drift.restart()
    return found


def noisy(seed: int, n: int, jump: float = 0.0, at: int = 0, level: float = 2.0) -> list[float]:
    draw = random.Random(seed)
    return [level + draw.gauss(0, 0.1) + jump * (i >= at) for i in range(n)]


def test_losses_without_a_course_seldom_fire():
    """100 runs of 300 losses at the threshold that the documentation names: one run in a hundred, it says."""
    runs = [fired(noisy(seed, 300)) for seed in range(100)]
    assert sum(map(bool, runs)) <= 4, runs
    # Also where a tenth of the batches is three times as noisy, and with the smallest windows.
    draw = random.Random(1)
    loud = [[loss + (draw.gauss(0, 0.3) if draw.random() < 0.1 else 0) for loss in noisy(s, 300)] for s in range(100)]
    assert sum(map(bool, map(fired, loud))) <= 8
    assert sum(bool(fired(noisy(seed, 300), window=3)) for seed in range(100)) <= 4


@pytest.mark.parametrize("jump", [0.6, -0.6])
def test_a_jump_is_seen_soon_and_once(jump):
    runs = [fired(noisy(seed, 120, jump, 60)) for seed in range(50)]
    assert sum(len(run) == 1 and 60 < run[0] < 70 for run in runs) >= 45, runs


def test_a_slow_course_is_followed_but_not_at_every_turn():
    """A loss that falls as the model learns: asked again, each time after as far as the noise can be told from it."""
    found = [fired([loss - 0.01 * i for i, loss in enumerate(noisy(seed, 300))]) for seed in range(20)]
    assert all(5 <= len(run) <= 20 for run in found), found
    assert all(b - a >= 10 for run in found for a, b in zip(run, run[1:], strict=False))


def test_the_first_losses_say_where_the_course_lies():
    """Training and scoring may disagree by any constant (dropout, soft targets): it is no drift."""
    assert [len(fired(noisy(3, 100, level=level))) for level in (-50.0, 0.0, 2.0, 1e4)] == [0] * 4
    drift = Drift(4.0, 3)
    assert not any(map(drift.seen, (math.nan, math.inf, -math.inf))) and drift == Drift(4.0, 3)
    assert not Drift(None, 1).seen(1e9)
    # No noise at all: the least departure is one.
    assert fired([1.0] * 20) == [] and fired([1.0] * 8 + [1.001] * 8) != []


def test_the_limit_is_that_of_students_distribution():
    """Quantiles with the tail that 3 standard errors leave of a normal one, from a table: the expansion is near."""
    for freedom, quantile in ((10, 3.957), (20, 3.422), (60, 3.130), (400, 3.019)):
        drift = Drift(3.0, 5, squares=[1.0] * round(freedom * 1.5))
        assert drift.limit() == pytest.approx(quantile, rel=0.02), freedom


def test_what_was_to_be_expected_is_that_of_the_same_tasks_and_prompts(monkeypatch):
    trained = Trained()
    losses = {"a": [1.0, 3.0], "b": [9.0]}
    trained.batch({("a", 0): 3, ("b", 0): 1}, losses)
    trained.batch({("a", 1): 4}, losses)
    trained.loss, trained.steps = torch.tensor(8.0), 2
    # 8 / 2 nats per token were seen; (3 * 1 + 9 + 4 * 3) / 8 were expected.
    assert trained.excess() == 4.0 - 24 / 8
    assert trained == Trained() and trained.excess() is None
    # Two ranks: their losses are a mean, their tokens a sum.
    trained.batch({("a", 0): 3}, losses)
    trained.loss, trained.steps = 5.0, 1
    other = {"loss": 7.0, "expected": 9.0, "tokens": 1}
    monkeypatch.setattr("sapo_peft.trainer.drift.gathered", lambda own: [own, other])
    assert trained.excess() == 6.0 - 12 / 4
    trained.batch({("a", 0): 3}, {})
    assert (trained.expected, trained.tokens) == (0.0, 3), "nothing has been scored yet"


# In a run.


def mixture():
    """Two tasks whose losses lie far apart for a model that has learnt one of them; the data is sorted by task."""
    easy = [{"input": f"{i}", "target": "red", "task": "a"} for i in range(20)]
    hard = [{"input": f"{i}", "target": f"{i * 7919 % 9973} {i * 31 % 97}", "task": "b"} for i in range(20)]
    return {"a": pool_of(3, "a", "a. "), "b": pool_of(2, "b", "b. ")}, [*easy, *hard]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Weights that know the first task of the mixture."""
    pools, data = mixture()
    trainer, _ = sapo_trainer(
        tmp_path_factory.mktemp("learnt"), pools["a"], SapoConfig(at_start=False), data=data[:20], max_steps=60,
        learning_rate=2e-2, logging_steps=60,
    )  # fmt: skip
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def mixed_run(folder, learnt, at_jump=None, steps=120, only=None, at_start=True, **options):
    """No learning at all (the rate is 0), dropout, draws, and tasks in turn; `at_jump`: weights change at that step."""
    pools, data = mixture()
    if only:
        pools, data = {only: pools[only]}, [row for row in data if row["task"] == only]
    model = lora_model(dropout=0.3)
    model.load_state_dict(learnt)
    config = SapoConfig(
        mode="soft", temperature=1.0, floor=0.3, drift=4.0, drift_cooldown=4, probe_examples=8, at_start=at_start
    )
    trainer, callback = sapo_trainer(
        folder, pools, config, data=data, model=model, max_steps=steps, learning_rate=0.0, max_grad_norm=0.0,
        per_device_train_batch_size=4, train_sampling_strategy="sequential", **options,
    )  # fmt: skip

    def jump(step):
        if step == at_jump:
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    if "lora_B" in name:
                        parameter.add_(torch.randn_like(parameter), alpha=0.5)

    trainer.add_callback(AtSteps(jump))
    return trainer, callback


def test_a_run_that_goes_nowhere_is_scored_once(tmp_path, learnt):
    """Tasks in turn, whose losses differ by nats, drawn prompts and dropout make the loss go up and down."""
    trainer, callback = mixed_run(tmp_path, learnt)
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert max(logged) - min(logged) > 1, "the logged loss itself is no guide here"
    assert fired(logged, window=4), "and would have led to a scoring"
    assert choices(callback) == choices(callback)[:1], [scoring.reason for scoring in callback.history]


def test_a_jump_is_followed_by_a_scoring(tmp_path, learnt):
    trainer, callback = mixed_run(tmp_path, learnt, at_jump=50, steps=80)
    trainer.train()
    (first, second, *rest) = callback.history
    assert first.step == 0 and 52 <= second.step <= 58 and second.reason.startswith("drift of +"), second
    assert not rest, "the new course is not left again"
    assert second.losses != first.losses


def test_a_resumed_run_sees_the_same_drift(tmp_path, learnt):
    """Saved between two logs, so that half of what the next log looks at was trained before."""
    options = dict(logging_steps=2, save_strategy="steps", save_steps=25, at_jump=40, steps=60, only="a")
    trainer, callback = mixed_run(tmp_path, learnt, **options)
    trainer.train()
    assert len(callback.history) == 2
    state = json.loads((tmp_path / "checkpoint-25" / "trainer_state.json").read_text())["stateful_callbacks"]["sapo"]
    assert state["trained"]["steps"] == 1 and state["trained"]["loss"] > 0
    again, resumed = mixed_run(tmp_path / "again", learnt, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-25"))
    assert [(s.step, s.reason, s.losses) for s in resumed.history] == [
        (s.step, s.reason, s.losses) for s in callback.history
    ]
    assert resumed.drift == callback.drift and resumed.drift.squares
