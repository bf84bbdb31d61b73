"""A sequence that was killed and started again ends as one that never was; a folder is of one run, for one process."""

from __future__ import annotations

import contextlib
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

from sapo_kernels.files import DataError, write_json
from sapo_peft.sequence import load_adapters
from sapo_peft.sequence import runner as runner_module
from tests.oracles import DATED, THINKING, byte_tokenizer, small_qwen3
from tests.sequence import sequence_child
from tests.sequence.sequence_helpers import Stop, everything, model_and_tokenizer, run_small, small_tasks, stop_at
from tests.trainer.training_helpers import environment

# Seconds until a child must have ended; it needs about ten.
DEADLINE = 300


def start(folder, method):
    command = [sys.executable, "-m", "tests.sequence.sequence_child", str(folder), method]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


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


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "method, kills", [("o-lora", 1), pytest.param("lora-inc", 10, marks=pytest.mark.slow),
                      pytest.param("seq-lora", 10, marks=pytest.mark.slow)],
)  # fmt: skip
def test_kill_9_at_random_points(tmp_path, unbroken, method, kills):
    expected, seconds = unbroken(method)
    folder, rng, done, starts = tmp_path / "run", random.Random(7), 0, 0
    while done < kills:
        # A run that is not killed in time is complete, and starts over; one may be killed before it has begun.
        file = folder / "run.json"
        if file.exists() and json.loads(file.read_text())["status"] == "done":
            shutil.rmtree(folder)
        starts += 1
        assert starts < 10 * kills
        # The later the work, the less of it is left.
        done += kill_somewhere(start(folder, method), folder, rng, seconds / 2)
    child = start(folder, method)
    _, errors = child.communicate(timeout=DEADLINE)
    assert child.returncode == 0, errors
    assert everything(folder) == expected
    assert len(expected["adapters"]) == sequence_child.TASKS
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("stride", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_before_a_write(tmp_path, monkeypatch, stride):
    options = {"max_steps": 2, "tasks": small_tasks(2, train=2, test=1), "policy": "worst"}
    counted = stop_at(monkeypatch, None)
    run_small(tmp_path / "whole", **options)
    expected, total = everything(tmp_path / "whole"), counted["n"]
    assert total > 40
    for place in range(1, total + 1, stride):
        folder = tmp_path / str(place)
        counted.update(n=0, stop=place)
        with pytest.raises(Stop):
            run_small(folder, **options)
        counted.update(n=0, stop=None)
        if (folder / "run.json").exists():
            # What a process leaves that is killed, where an exception tidies up.
            (folder / ".sapo-0123456789abcdef.tmp").write_text("{")
            (folder / "tasks" / ".02-colours2").mkdir(parents=True, exist_ok=True)
            (folder / "tasks" / ".02-colours2" / "scores.json").write_text('{"version": 1, "ta')
        run_small(folder, **options)
        assert everything(folder) == expected, f"write {place} of {total}"


def test_a_run_that_is_resumed_on_another_day_keeps_its_date(tmp_path, monkeypatch):
    """A template with the date, which is in the tokens of every prompt."""
    counted, found = stop_at(monkeypatch, None), []
    for folder, stops in (("whole", [None]), ("stopped", [25, None])):
        for day, counted["stop"] in enumerate(stops, 1):
            counted["n"] = 0
            monkeypatch.setattr(runner_module, "_now", lambda day=day: f"2026-01-0{day}T00:00:00+00:00")
            pair = small_qwen3(), byte_tokenizer(chat_template=DATED)
            with contextlib.suppress(Stop):
                run_small(tmp_path / folder, max_steps=2, model=pair)
        assert counted["stop"] is None
        found.append(everything(tmp_path / folder))
    assert found[0] == found[1]


def test_a_task_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Every file of it, its folders and the announcement in the run's manifest; then the name itself."""
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda *names: (events.append(("rename", *map(str, names))), rename(*names))[1])
    run_small(tmp_path, count=1, max_steps=1, generate=False)
    place = next(i for i, event in enumerate(events) if event[0] == "rename" and "01-colours1" in event[1])
    staging = events[place][1]
    written = {str(path).replace("/01-colours1", "/.01-colours1") for path in (tmp_path / "tasks").rglob("*")}
    # A file that is replaced at once is flushed under its temporary name; manifests are written so.
    flushed = {path.removesuffix(" (deleted)") for path in events[:place] if isinstance(path, str)}
    assert {path for path in written if not path.endswith("manifest.json")} <= flushed and staging in flushed
    assert sum("/.01-colours1/" in path and path.endswith(".tmp") for path in flushed) >= 2
    assert str(tmp_path) in events[:place] and str(tmp_path / "tasks") in events[place:]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_small(folder, max_steps=2)


def test_a_complete_run_is_returned_without_training(finished, monkeypatch):
    folder, first = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(runner_module, "train_task", None)
    again = run_small(folder, max_steps=2)
    assert (again.run, again.metrics, again.choices, again.cost) == (
        first.run, first.metrics, first.choices, first.cost)  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("change, word", [
    ({"seed": 4}, "seed: expected 3, as this run began with, got 4"),
    ({"target_modules": ("q_proj",)}, "target_modules"),
    ({"tasks": small_tasks(2)[::-1]}, "tasks: expected"),
    ({"tasks": small_tasks(2, prompts=2)}, "data, task colours1: expected"),
    ({"model": model_and_tokenizer(seed=1)}, "data, base: expected"),
    ({"model": (small_qwen3(), byte_tokenizer(chat_template=THINKING))}, "data, tokens: expected"),
])  # fmt: skip
def test_another_run_in_the_same_folder_is_refused(finished, change, word):
    before = everything(finished[0])
    with pytest.raises(DataError) as error:
        run_small(finished[0], **{"max_steps": 2, **change})
    assert word in str(error.value) and "another folder" in str(error.value)
    assert everything(finished[0]) == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="expected an empty folder or one of a run, got 'thesis.txt'"):
        run_small(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "thesis.txt"]
    (tmp_path / "run.json").write_text('{"version": 2, "kind": "other"}')
    with pytest.raises(DataError, match="run.json: .*'kind'"):
        run_small(tmp_path)


def test_two_processes_on_one_folder(tmp_path):
    with open(tmp_path / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is writing"):
            run_small(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    run_small(tmp_path, count=1, max_steps=1)


def test_other_versions_are_reported(tmp_path, monkeypatch, caplog):
    plain, torchs = runner_module.metadata.version, iter(["1.0", "1.1"])
    with monkeypatch.context() as patch:
        patch.setattr(runner_module.metadata, "version", lambda name: next(torchs) if name == "torch" else plain(name))
        patch.setattr(runner_module, "train_task", None)
        with pytest.raises(TypeError):
            run_small(tmp_path, count=1, max_steps=1)
        patch.undo()
        result = run_small(tmp_path, count=1, max_steps=1)
    assert any("resumed with other versions: torch" in warning for warning in result.run["warnings"])
    assert "was 1.0" in caplog.text


def test_a_run_of_version_1_is_refused(tmp_path, finished):
    """It had no manifests."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    for manifest in folder.rglob("sapo_manifest.json"):
        manifest.unlink()
    with pytest.raises(DataError, match="expected the manifest of this folder, got none"):
        load_adapters(model_and_tokenizer()[0], folder)
    write_json(folder / "run.json", {**json.loads((folder / "run.json").read_text()), "version": 1})
    with pytest.raises(DataError, match="run.json: 'version': expected 2, got 1"):
        run_small(folder, max_steps=2)
