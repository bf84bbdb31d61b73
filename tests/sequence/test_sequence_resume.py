"""A sequence that was killed and started again ends as one that never was; a folder is of one run, for one process."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from sapo_kernels.files import DataError
from sapo_peft.sequence import runner as runner_module
from sapo_peft.sequence.folder import RunFolder
from tests.oracles import THINKING, byte_tokenizer, small_qwen3
from tests.sequence import sequence_child
from tests.sequence.sequence_helpers import everything, model_and_tokenizer, run_small, small_tasks
from tests.trainer.training_helpers import environment

# Seconds until a child must have ended; it needs about ten.
DEADLINE = 300


def start(folder, method):
    command = [sys.executable, "-m", "tests.sequence.sequence_child", str(folder), method]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(child) -> str:
    try:
        _, errors = child.communicate(timeout=DEADLINE)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait(DEADLINE)
    return errors.decode()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What runs that are never killed end with, by method, and how many seconds their work takes."""
    made = {}

    def of(method):
        if method not in made:
            folder, began = tmp_path_factory.mktemp(method), time.monotonic()
            sequence_child.run(folder, method)
            made[method] = everything(folder), time.monotonic() - began
        return made[method]

    return of


def kill_somewhere(child, folder, rng, seconds: float) -> bool:
    """Kill the child a random part of its work after it began; False if it ended before."""
    until = time.monotonic() + DEADLINE
    while not (folder / ".lock").exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    try:
        child.wait(rng.uniform(0.0, seconds))
        return False
    except subprocess.TimeoutExpired:
        os.kill(child.pid, signal.SIGKILL)
        child.wait(DEADLINE)
        return True
    finally:
        child.stderr.close()


def killed_and_continued(folder, method: str, kills: int, seed: int, seconds: float) -> None:
    rng, done, starts = random.Random(seed), 0, 0
    while done < kills:
        # A run that is not killed in time is complete, and begins anew; one may be killed before it has begun.
        file = folder / "run.json"
        if file.exists() and json.loads(file.read_text())["status"] == "done":
            shutil.rmtree(folder)
        starts += 1
        assert starts < 10 * kills
        # The later the work, the less of it is left.
        done += kill_somewhere(start(folder, method), folder, rng, seconds / 2)
    child = start(folder, method)
    errors = finish(child)
    assert child.returncode == 0, errors


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "method, kills", [("o-lora", 2), pytest.param("lora-inc", 10, marks=pytest.mark.slow),
                      pytest.param("seq-lora", 10, marks=pytest.mark.slow)],
)  # fmt: skip
def test_kill_9_at_random_points(tmp_path, unbroken, method, kills):
    wanted, seconds = unbroken(method)
    folder = tmp_path / "run"
    killed_and_continued(folder, method, kills, 7, seconds)
    assert everything(folder) == wanted
    assert len(wanted["adapters"]) == sequence_child.TASKS
    assert not [path for path in (folder / "tasks").iterdir() if path.name.startswith(".")]


class Stop(BaseException):
    """Not an `Exception`: nothing on the way may think that it has been dealt with."""


def counted_writes(monkeypatch) -> dict:
    """Counts the writes of a run under "n"; the one whose number is under "stop" raises `Stop` instead."""
    written = {"n": 0, "stop": None}

    def counted(plain):
        def write(*args, **kwargs):
            written["n"] += 1
            if written["n"] == written["stop"]:
                raise Stop
            return plain(*args, **kwargs)

        return write

    monkeypatch.setattr(runner_module, "write_json", counted(runner_module.write_json))
    monkeypatch.setattr(runner_module, "train_task", counted(runner_module.train_task))
    monkeypatch.setattr(RunFolder, "write", counted(RunFolder.write))
    monkeypatch.setattr(os, "rename", counted(os.rename))
    return written


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_before_a_write(tmp_path, monkeypatch, stride):
    written = counted_writes(monkeypatch)
    options = {"max_steps": 2, "generate": False, "tasks": small_tasks(2, train=2, test=1), "policy": "worst"}
    run_small(tmp_path / "whole", **options)
    wanted, total = everything(tmp_path / "whole"), written["n"]
    assert total > 15
    for place in range(1, total + 1, stride):
        folder = tmp_path / str(place)
        written.update(n=0, stop=place)
        with pytest.raises(Stop):
            run_small(folder, **options)
        written.update(n=0, stop=None)
        run_small(folder, **options)
        assert everything(folder) == wanted, f"write {place} of {total}"


def test_half_written_leftovers_are_redone(tmp_path):
    run_small(tmp_path / "whole", max_steps=2)
    folder = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", folder)
    last = sorted((folder / "tasks").iterdir())[-1]
    shutil.rmtree(last)
    # What a process leaves that is killed while it writes: a part of the staging folder, a temporary file.
    staging = last.with_name(f".{last.name}")
    staging.mkdir()
    (staging / "scores.json").write_text('{"version": 1, "ta')
    (folder / ".sapo-0123456789abcdef.tmp").write_text("{")
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "status": "running", "finished": None}))
    run_small(folder, max_steps=2)
    assert everything(folder) == everything(tmp_path / "whole")


def test_a_complete_run_is_returned_without_training(tmp_path, monkeypatch):
    first = run_small(tmp_path, max_steps=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(runner_module, "train_task", None)
    again = run_small(tmp_path, max_steps=2)
    assert (again.metrics, again.choices, again.cost) == (first.metrics, first.choices, first.cost)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "change, word",
    [
        ({"seed": 4}, "seed: expected 3, as this run began with, got 4"),
        ({"policy": "worst"}, "policy: expected 'sapo'"),
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"target_modules": ("q_proj",)}, "target_modules"),
        ({"tasks": small_tasks(2)[::-1]}, "tasks: expected"),
        ({"tasks": small_tasks(2, train=9)}, "data, task colours1: expected"),
        ({"tasks": small_tasks(2, prompts=2)}, "data, task colours1: expected"),
        ({"model": model_and_tokenizer(seed=1)}, "data, base: expected"),
        ({"model": (small_qwen3(), byte_tokenizer(chat_template=THINKING))}, "data, tokens: expected"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path, finished, change, word):
    before = everything(finished)
    with pytest.raises(DataError) as error:
        run_small(finished, **{"max_steps": 2, **change})
    assert word in str(error.value) and "another folder" in str(error.value)
    assert everything(finished) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run_small(folder, max_steps=2)
    return folder


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="expected an empty folder or one of a run, got 'thesis.txt'"):
        run_small(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "thesis.txt"]
    (tmp_path / "run.json").write_text('{"version": 1, "kind": "other"}')
    with pytest.raises(DataError, match="expected a sequence run of version 1"):
        run_small(tmp_path)


def test_a_hole_among_the_tasks_is_refused(tmp_path, finished):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(sorted((folder / "tasks").iterdir())[0])
    with pytest.raises(DataError, match="01-colours1: expected this task"):
        run_small(folder, max_steps=2)


def test_two_processes_on_one_folder(tmp_path):
    handle = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is at work"):
            run_small(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        os.close(handle)
    run_small(tmp_path, count=1, max_steps=1)


def test_other_versions_are_said(tmp_path, finished, caplog):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(sorted((folder / "tasks").iterdir())[-1])
    run = json.loads((folder / "run.json").read_text())
    old = {**run, "status": "running", "versions": {**run["versions"], "torch": "1.0"}}
    (folder / "run.json").write_text(json.dumps(old))
    result = run_small(folder, max_steps=2)
    assert any("continued with other versions: torch" in warning for warning in result.run["warnings"])
    assert "was 1.0" in caplog.text


@pytest.mark.parametrize(
    "file, content, word",
    [
        ("run.json", "{", "not valid JSON"),
        ("run.json", '{"version": 2, "kind": "sequence"}', "version 1"),
        ("run.json", '{"version": 1, "kind": "sequence"}', "expected the entry 'config'"),
        ("run.json", {"config": 3}, "'config': expected dict, got 3"),
        ("run.json", {"versions": []}, "'versions': expected dict"),
        ("run.json", {"warnings": "none"}, "'warnings': expected list, got 'none'"),
        ("run.json", {"warnings": [3]}, "'warnings': expected texts"),
        ("before.json", "[]", "before.json: expected an object of version 1"),
        ("before.json", {"notes": None}, "before.json: expected the scores before training, got TypeError"),
        ("before.json", {"row": {"loss": [0.5]}}, "loss: expected rows of 2 numbers or null, got [0.5]"),
        ("before.json", {"row": {"loss": ["a", 1]}}, "loss: expected rows of 2 numbers or null, got ['a', 1]"),
        ("before.json", None, "before.json: expected the scores before training, got no file"),
        ("tasks/01-colours1/scores.json", '{"version": 1}', "01-colours1: expected the files of a finished task"),
        ("tasks/01-colours1/scores.json", '{"version": 1, "chosen": 9, "prompts": [], "scorings": []}', "IndexError"),
        ("tasks/01-colours1/scores.json", '{"version": 1, "chosen": "a", "prompts": [], "scorings": 3}', "TypeError"),
        ("tasks/01-colours1/metrics.json", '{"version": 1, "row": [], "notes": []}', "finished task"),
        ("tasks/01-colours1/train.json", '{"version": 1, "notes": []}', "got KeyError"),
        ("tasks/01-colours1/train.json", None, "train.json"),
        ("tasks/01-colours1/adapter/adapter_model.safetensors", "", "expected the weights of an adapter"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path, finished, file, content, word):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "status": "running"}))
    if content is None:
        (folder / file).unlink()
    elif isinstance(content, dict):
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **content}))
    else:
        (folder / file).write_text(content)
    with pytest.raises((DataError, OSError)) as error:
        run_small(folder, max_steps=2)
    assert word in str(error.value)
