"""A run that was killed and resumed ends as one that never was, and a checkpoint that was cut off is passed over."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime

import pytest
import torch

from sapo_peft import SapoConfig, attach_sapo, last_good_checkpoint
from sapo_peft.trainer.choice import Choice
from sapo_peft.trainer.collator import SapoCollator
from tests.oracles import CHATML, DATED, byte_tokenizer
from tests.trainer import training_child
from tests.trainer.training_helpers import (
    adapter_digest,
    choices,
    colours,
    curve,
    environment,
    plain_trainer,
    pool_of,
    record_batches,
    sapo_trainer,
    texts_of,
)

MODES = ("hard", "soft")
# Seconds until a child must have ended; it needs about five on a free core.
DEADLINE = 400


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What a run that is never killed ends with, by mode, and its checkpoints."""
    made = {}
    for mode in MODES:
        folder = tmp_path_factory.mktemp(mode)
        trainer, callback = training_child.make(folder, mode)
        trainer.train()
        made[mode] = (json.loads(json.dumps(training_child.result(trainer, callback, 0))), folder)
        reasons = {reason.split()[0] for _, reason, *_ in made[mode][0]["choices"]}
        assert {"start", "every", "epoch", "drift"} <= reasons, reasons
    assert made["hard"][0]["switches"] >= 2 and made["hard"][0]["adapter"] != made["soft"][0]["adapter"]
    return made


def start(folder, mode):
    command = [sys.executable, "-m", "tests.trainer.training_child", str(folder), mode]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def steps_saved(folder) -> int:
    found = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return max(found, default=0)


def kill_within(child, folder, rng, until: float, lines: int) -> bool:
    """Kill the child a random while after it began or wrote something new; False if it ended before.

    lines: of ``steps.log`` when it was started.
    """
    before = steps_saved(folder)
    aim = before + training_child.SAVE * rng.randint(0, 2)
    while child.poll() is None and time.monotonic() < until:
        if lines_logged(folder) > lines and steps_saved(folder) >= max(aim, 1):
            # A step takes about 40 ms, a checkpoint about as long.
            time.sleep(rng.uniform(0.0, 0.12))
            break
        time.sleep(0.002)
    if child.poll() is not None:
        return False
    os.kill(child.pid, signal.SIGKILL)
    child.wait(DEADLINE)
    return True


def lines_logged(folder) -> int:
    log = folder / "steps.log"
    return log.read_text().count("\n") if log.exists() else 0


def killed_and_resumed(folder, mode: str, kills: int, seed: int) -> tuple[dict, int]:
    """The result of a run that is killed that often, as often as it lives long enough, and how often it was."""
    rng, done = random.Random(seed), 0
    while True:
        lines = lines_logged(folder)
        child = start(folder, mode)
        try:
            killed = done < kills and kill_within(child, folder, rng, time.monotonic() + DEADLINE, lines)
            if killed:
                done += 1
                continue
            _, errors = child.communicate(timeout=DEADLINE)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait(DEADLINE)
        assert child.returncode == 0, errors.decode()[-3000:]
        return json.loads((folder / "result.json").read_text()), done


def redone(folder) -> list[int]:
    """For each time the run was taken up again, how many steps it made a second time."""
    found, reached = [], 0
    for line in (folder / "steps.log").read_text().splitlines():
        if line.startswith("begin "):
            found.append(max(0, reached - int(line.split()[1])))
        else:
            reached = int(line)
    return found[1:]


def assert_same_end(found: dict, wanted: dict) -> None:
    assert [row[:2] for row in found["choices"]] == [row[:2] for row in wanted["choices"]]
    for name in ("choices", "switches", "probs", "curve", "adapter"):
        assert found[name] == wanted[name], name


def test_killed_at_random_points(tmp_path, unbroken):
    """Two kills; the run has dropout, accumulation, drift, decay, draws and a second epoch."""
    mode = "soft"
    found, done = killed_and_resumed(tmp_path, mode, 2, seed=8)
    assert done >= 1, "it was killed while it ran"
    assert len(redone(tmp_path)) == done and max(redone(tmp_path)) <= training_child.SAVE
    assert_same_end(found, unbroken[mode][0])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_twenty_random_points(tmp_path, unbroken, mode):
    done = 0
    for seed in range(100):
        folder = tmp_path / str(seed)
        folder.mkdir()
        found, kills = killed_and_resumed(folder, mode, 4, seed)
        assert_same_end(found, unbroken[mode][0])
        assert len(redone(folder)) == kills and max(redone(folder), default=0) <= training_child.SAVE
        done += kills
        if done >= 20:
            return
    pytest.fail(f"only {done} kills hit a living run")


@pytest.mark.parametrize("mode", MODES)
def test_resumed_at_every_checkpoint(tmp_path, unbroken, mode):
    """Every save of the run, not only where a kill happens to fall; also with workers, in this process."""
    wanted, folder = unbroken[mode]
    saved = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert len(saved) == 3
    for path, workers in zip(saved, (0, 1, 0), strict=True):
        copy = tmp_path / "copies" / path.name
        shutil.copytree(path, copy)
        trainer, callback = training_child.make(tmp_path, mode, dataloader_num_workers=workers)
        trainer.train(resume_from_checkpoint=str(copy))
        assert_same_end(json.loads(json.dumps(training_child.result(trainer, callback, 0))), wanted)


def test_a_run_that_is_resumed_on_another_day_keeps_its_date(tmp_path, monkeypatch):
    """A template with the date: scored and trained, before and after, with the one that the run began with."""
    ends = []
    for folder, day, resumed in (("one", 1, None), ("two", 2, "one/checkpoint-2"), ("three", 2, None)):
        monkeypatch.setattr("sapo_peft.trainer.attach.STARTED", datetime(2026, 1, day))
        trainer = plain_trainer(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.processing_class = byte_tokenizer(chat_template=DATED)
        callback = attach_sapo(trainer, pool_of(), config=SapoConfig(every_steps=2, probe_examples=2))
        batches = record_batches(trainer)
        trainer.train(resume_from_checkpoint=resumed and str(tmp_path / resumed))
        shown = f"0{day if resumed is None else 1} Jan 2026 00:00:00"
        scored = [trainer.processing_class.decode(callback.rescorer.caches["colours"].contexts[0][0])]
        trained = [context for batch in batches for context, _ in texts_of(trainer, batch)]
        evaluated = texts_of(trainer, trainer.data_collator(colours(1)))[0]
        assert all(context.startswith(shown) for context in [*scored, *trained, *evaluated[:1]])
        ends.append((adapter_digest(trainer.model), [scoring.losses for scoring in callback.history]))
    assert ends[0] == ends[1] != ends[2]


def saved_run(folder, pools=None, config=None, **options):
    """A run of four steps with a checkpoint at each second; (trainer, callback, the newest)."""
    config = config or SapoConfig(every_steps=2, probe_examples=2)
    trainer, callback = sapo_trainer(folder, pools, config, max_steps=4, save_strategy="steps", save_steps=2, **options)
    trainer.train()
    return trainer, callback, last_good_checkpoint(folder)


A, B = pool_of(2, "a"), pool_of(3, "b")


@pytest.mark.parametrize(
    ("begun", "now", "change", "wanted"),
    [
        (None, pool_of(4), {}, "'colours': expected the prompts that the run began with, got others"),
        (None, pool_of(3, head="Now: "), {}, "'colours': expected the prompts that the run began with, got others"),
        # Rows of the state would stand for other tasks.
        ([A, B], [B, A], {}, r"order that the run began with, \['a', 'b'\], got \['b', 'a'\]"),
        (None, None, {"mode": "hard"}, "mode: expected 'soft' as before, got 'hard'"),
        (None, None, {"template": "{input} <- {prompt}"}, "template and tokenizer that the run began with"),
        (None, None, {"probe_examples": 3}, "probe that the run began with"),
        (None, None, {"max_target": 2}, "probe that the run began with"),
        (None, None, {"seed": 1}, "seed: expected 0 as before, got 1"),
    ],
)
def test_what_a_state_is_of_must_be_the_same(tmp_path, begun, now, change, wanted):
    options = {"every_steps": 2, "probe_examples": 2, "mode": "soft"}
    data = [*colours(4, "a"), *colours(4, "b")] if begun else colours()
    *_, newest = saved_run(tmp_path, begun, SapoConfig(**options), data=data)
    trainer, callback = sapo_trainer(tmp_path, now, SapoConfig(**{**options, **change}), data=data)
    with pytest.raises(ValueError, match=wanted):
        trainer.train(resume_from_checkpoint=newest)
    assert callback.history == []


def test_another_schedule_is_logged_and_the_run_resumes(tmp_path, caplog):
    *_, newest = saved_run(tmp_path)
    config = SapoConfig(every_steps=1, decay=0.5, probe_examples=2, seed=3)
    trainer, callback = sapo_trainer(tmp_path, config=config)
    with caplog.at_level("WARNING", logger="sapo_peft"):
        trainer.train(resume_from_checkpoint=newest)
    (line,) = [record.getMessage() for record in caplog.records if "options that have changed" in record.getMessage()]
    assert "every_steps 2 -> 1" in line and "decay 0.0 -> 0.5" in line and "seed 0 -> 3" in line
    assert [scoring.step for scoring in callback.history] == [0, 2, 5]


@pytest.mark.parametrize("name", ["float", "a\u2028b"])
def test_any_name_of_a_task_survives(tmp_path, name):
    """Values that JSON lacks are kept as {"float": "nan"}: a task of that name is none of them."""
    trainer, callback, newest = saved_run(tmp_path, {name: pool_of()})
    other, again = sapo_trainer(tmp_path, {name: pool_of()}, callback.config)
    other.train(resume_from_checkpoint=newest)
    assert choices(again)[:2] == choices(callback) and again.history[0].losses[name]


def test_a_state_of_another_version_is_refused(tmp_path):
    trainer, callback = sapo_trainer(tmp_path)
    with pytest.raises(ValueError, match="expected version 2, got 1"):
        callback.load_state({**callback.state(), "version": 1})


def test_a_checkpoint_without_sapo_can_be_resumed_with_it(tmp_path):
    pool = pool_of(3)
    collator = SapoCollator(byte_tokenizer(chat_template=CHATML), Choice({"colours": pool}, "hard", 0))
    plain_trainer(tmp_path, data_collator=collator, max_steps=4, save_strategy="steps", save_steps=4).train()
    newest = last_good_checkpoint(tmp_path)
    assert newest.endswith("checkpoint-4")
    config = SapoConfig(every_steps=3, probe_examples=2)
    trainer, callback = sapo_trainer(tmp_path, pool, config, max_steps=8, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=newest)
    assert [(s.step, s.reason) for s in callback.history] == [(4, "start"), (6, "every 3 steps")]
    assert [step for step, *_ in curve(trainer)] == list(range(1, 9))
    # And the other way round: whoever drops SAPO can go on.
    newest = last_good_checkpoint(tmp_path)
    assert newest.endswith("checkpoint-8")
    plain = plain_trainer(tmp_path, data_collator=collator, max_steps=9)
    plain.train(resume_from_checkpoint=newest)
    assert plain.state.global_step == 9


def test_everything_of_the_state_comes_back(tmp_path):
    """Also what a resumed run would show only when a loss falls on the edge; values that JSON has no word for."""
    mode = "soft"
    trainer, callback = training_child.make(tmp_path, mode)
    trainer.train()
    callback.drift.first, callback.drift.newest, callback.drift.squares = [1.5], [2.5], [1.0, 0.5]
    callback.trained.loss, callback.trained.steps = torch.tensor(1.25), 2
    callback.trained.expected, callback.trained.tokens = math.nan, 7
    callback._due = "drift of +9.0 standard errors"
    other = training_child.make(tmp_path / "other", mode)[1]
    other.load_state(json.loads(json.dumps(callback.state(), allow_nan=False)))
    for name, value in callback.choice.state.state_dict().items():
        assert torch.equal(other.choice.state.state_dict()[name], value), name
    assert torch.equal(other.choice.chosen, callback.choice.chosen)
    assert torch.equal(other.choice.clock, callback.choice.clock) and int(callback.choice.clock[0]) > 2
    assert other.drift == callback.drift and other.drift.squares == [1.0, 0.5]
    assert (other.trained.loss, other.trained.steps, other.trained.tokens) == (1.25, 2, 7)
    assert math.isnan(other.trained.expected)
    for name in ("_due", "_scored_epoch", "switches"):
        assert getattr(other, name) == getattr(callback, name), name
    assert json.dumps(other.state()) == json.dumps(callback.state())
    # Of a long run the newest scorings alone: each checkpoint has them again.
    callback.history *= 1000
    assert callback.state()["history"] == [scoring.record() for scoring in callback.history[-1000:]]
