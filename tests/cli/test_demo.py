"""`sapo demo`, at a fraction of its size, and the single-task runs of the effect experiment."""

import math

import pytest
import torch

import sapo_kernels as sk
from benchmarks.effect import design
from benchmarks.effect.single import Damage, SingleConfig, run_task
from sapo_peft.cli import demo as demo_command
from sapo_peft.cli.main import main
from sapo_peft.tiny_base import load_tiny_base, sequence_tasks
from tools.tiny_base.corpus import TASTE_ROWS, bundled


def test_demo_prints_a_comparison_and_a_report(tmp_path, monkeypatch, capsys):
    small = {"max_steps": 2, "batch_size": 2, "train_examples": 4, "test_examples": 3, "probe_examples": 2}
    monkeypatch.setattr(demo_command, "OPTIONS", {**demo_command.OPTIONS, **small})
    monkeypatch.setattr(demo_command, "TASKS", demo_command.TASKS[1:])
    folder = tmp_path / "demo"
    assert main(["demo", "--output", str(folder), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert f"Report: {folder / 'report.html'}" in out and (folder / "report.html").stat().st_size > 10_000
    assert all(line in out for line in ("original", "sapo", "AP", "BWT", "FWT", *demo_command.TASKS))
    before = (folder / "sapo" / "results.json").read_bytes()
    # The second call finds both runs complete and says the same.
    assert main(["demo", "--output", str(folder), "--quiet"]) == 0
    assert capsys.readouterr().out == out and (folder / "sapo" / "results.json").read_bytes() == before


def test_tasks_of_a_sequence_have_no_row_that_the_base_knows():
    name = demo_command.TASKS[0]
    one, again, other = (sequence_tasks([name], seed, 5)[0] for seed in (1, 1, 2))
    tasted = {row["sentence"] for row in bundled(name).rows[-TASTE_ROWS:]}
    assert len(one.train) == 800 and not any(row["input"] in tasted for row in one.train)
    assert one.train == again.train != other.train and sorted(map(str, one.train)) == sorted(map(str, other.train))
    assert one.test == other.test and len(one.test) == 5 and one.pool.suffix == "" and len(one.pool.prompts) == 21


def test_a_single_task_run_measures_what_it_says():
    model, tokenizer = load_tiny_base()
    before = [parameter.clone() for parameter in model.parameters()]
    config = SingleConfig(2, 2, 1e-2, probe_examples=2, test_examples=2, skill_examples=1)
    damage = Damage(tokenizer, config)
    rows = run_task(model, tokenizer, design.ODD_ONE, 7, [0, 5], config, damage)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    (task,) = sequence_tasks([design.ODD_ONE], 7, 2)
    pre = sk.score_prompts(model, list(task.pool.prompts), list(task.train[:2]), tokenizer=tokenizer).loss
    assert [(row["prompt"], row["pre"]) for row in rows] == [(k, pytest.approx(float(pre[k]))) for k in (0, 5)]
    for row in rows:
        others = [row[f"rise_{task.partition('_')[0]}"] for task in damage.tasks if task != design.ODD_ONE]
        assert row["others"] == pytest.approx(math.fsum(others) / 3) and row["forgetting"] != 0.0
    assert run_task(model, tokenizer, design.ODD_ONE, 7, [5], config, damage)[0] == rows[1]
