"""The effect experiment on pretrained models: its runs at a fraction of their size, its policies and tables by hand."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.effect import pretrained, rows, table
from benchmarks.effect import pretrained_design as design
from benchmarks.effect.__main__ import main
from benchmarks.effect.policies import CANDIDATES
from benchmarks.racing import Matrix
from sapo_kernels import PromptScores, score_prompts
from sapo_peft.assets import BUNDLED_DIR
from sapo_peft.gguf import MODELS
from sapo_peft.sequence import read_tasks
from sapo_peft.tiny_base import load_tiny_base


@pytest.fixture
def small(monkeypatch):
    """The design on the bundled tasks and the tiny base: three prompts, two steps."""
    names = [folder.name for folder in sorted((BUNDLED_DIR / "SUPERNI").iterdir()) if folder.is_dir()]
    monkeypatch.setattr(design, "EARLIER", tuple(names[:2]))
    monkeypatch.setattr(design, "TRAINED", tuple(names[2:4]))
    monkeypatch.setattr(design, "ORDER", tuple(names[:2]))
    monkeypatch.setattr(design, "SINGLE", replace(design.SINGLE, max_steps=2, batch_size=2, test_examples=2))
    monkeypatch.setattr(design, "WARM_STEPS", 2)
    monkeypatch.setattr(design, "PARAPHRASES", 2)
    monkeypatch.setattr(design, "SEEDS", (5,))
    monkeypatch.setattr(pretrained.Setting, "load", lambda self: load_tiny_base())
    return pretrained.Setting("smollm2", BUNDLED_DIR, "cpu", (0, 1))


def test_single_runs_go_on_where_they_were(small, tmp_path):
    assert pretrained.run_singles(small, tmp_path, 0.0) == 6, "no time: nothing is run"
    assert pretrained.run_singles(small, tmp_path, time.time() + 600) == 0
    mark, files = small.made_by(), sorted((tmp_path / "single_smollm2").iterdir())
    assert len(files) == 6
    whole = [path.read_bytes() for path in files]
    files[4].unlink()
    assert pretrained.run_singles(small, tmp_path, time.time() + 600) == 0
    assert rows.collect(tmp_path, "single_smollm2", mark, tmp_path) == 6
    again = [path.read_bytes() for path in files]
    assert again[:4] + again[5:] == whole[:4] + whole[5:]
    found = rows.load("single_smollm2", tmp_path)["rows"]
    parts = table.complete(found)
    assert [key[0] for key in parts] == list(design.TRAINED)
    for group in parts.values():
        for row in group:
            rises = [row[f"rise_{name.partition('_')[0]}"] for name in design.EARLIER]
            assert row["forgetting"] == pytest.approx(math.fsum(rises) / 2, abs=2e-5) and row["pre_error_16"] >= 0.0
        assert group[0]["pre_error_16"] == 0.0 and group[0]["near"] == 1.0
    assert len({row["own"] for row in found}) == 6


def test_scores_over_tries_are_those_of_score_prompts(small, monkeypatch):
    model, tokenizer = load_tiny_base()
    (task,) = read_tasks(BUNDLED_DIR, design.TRAINED[:1])
    cache = pretrained.cache_of(tokenizer, task, list(task.pool.prompts[:3]), task.train[:4])
    ours, theirs = pretrained.score(model, cache), score_prompts(model, cache, progress=False)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.allclose(ours.nll, theirs.nll, atol=1e-3)
    seen = pretrained.before_learning(model, cache)
    assert seen[1]["pre_example_8"] == pytest.approx(float(theirs.reduce("example")[1]), abs=1e-4)
    # The deviation of four differences, of their sum.
    far = (theirs.nll[1] - theirs.nll[0]).std() * 2.0 / theirs.tokens[0].sum()
    monkeypatch.setattr(design, "PROBES", (4,))
    assert pretrained.before_learning(model, cache)[1]["pre_error_4"] == pytest.approx(float(far), rel=1e-3)


def test_a_sequence_is_a_row(small, tmp_path, monkeypatch):
    few = {**design.SEQUENCE_OPTIONS, "max_steps": 1, "train_examples": 2, "test_examples": 2, "probe_examples": 2}
    monkeypatch.setattr(design, "SEQUENCE_OPTIONS", few)
    monkeypatch.setattr(design, "sequence_runs", lambda: [design.SequenceRun("lora-inc", "sapo", 5)])
    assert pretrained.run_sequences(small, tmp_path, time.time() + 600) == 0
    assert rows.collect(tmp_path, "sequences_smollm2", small.made_by(), tmp_path) == 1
    (row,) = rows.load("sequences_smollm2", tmp_path)["rows"]
    assert (row["policy"], row["seed"], len(row["prompts"])) == ("sapo", 5, 2) and row["loss"]["AP"] > 0


def test_the_plan():
    runs = list(design.sequence_runs())
    assert len(runs) == len(set(runs)) == 24 and [run.policy for run in runs[:3]] == ["original", "sapo", "random"]
    assert set(design.CHOOSING) < set(design.TRAINED) and not set(design.EARLIER) & set(design.TRAINED)
    assert all(len(design.prompts_of(task)) == 8 and design.prompts_of(task)[0] == 0 for task in design.TRAINED)


@pytest.mark.parametrize("kind", table.SINGLE)
def test_every_planned_single_run_is_there_once_and_of_this_design(kind):
    found = rows.load(kind)
    groups = table.complete(found["rows"])
    assert sorted(groups) == sorted(design.single_runs()) and len(found["rows"]) == 8 * len(groups)
    _, base, *rate = kind.split("_")
    setting = pretrained.Setting(base, BUNDLED_DIR, "cpu", (0, 1), *map(float, rate))
    assert setting.kind("single") == kind and found["made_by"]["base"] == MODELS[base].sha256
    given = {**asdict(setting.single), "warm_steps": design.WARM_STEPS, "input_tokens": design.INPUT_TOKENS}
    assert given.items() <= found["made_by"]["single"].items()


def row(prompt, pre, forgetting=0.0, error=0.1, near=0.5, cold=1.0, task=design.TRAINED[0]):
    losses = {f"pre_{kind}_{count}": pre for kind in pretrained.REDUCTIONS for count in design.PROBES}
    return {"task": task, "seed": 1, "prompt": prompt, "pre": pre, **losses, "pre_error_16": error, "near": near,
            "pre_cold_8": cold, "forgetting": forgetting, "others": forgetting, "own": pre}  # fmt: skip


def test_policies_by_hand():
    group = [row(0, 1.0, near=1.0, error=0.0), row(1, 0.85, near=0.2, cold=3.0), row(2, 0.9, near=0.7, cold=0.5)]
    chosen = {name: rule(group)["prompt"] for name, rule in CANDIDATES.items()}
    assert chosen["lowest loss (SAPO)"] == chosen["lowest example mean"] == 1
    assert chosen["lowest if clear of the original"] == 0, "0.15 is less than two standard errors"
    assert chosen["nearest to the original among ties"] == 2, "0.05 above the lowest is within one"
    assert chosen["lowest before the earlier tasks"] == chosen["lowest mean of both states"] == 2
    assert CANDIDATES["lowest if clear of the original"]([group[0], row(1, 0.7)])["prompt"] == 1


def test_tables_by_hand(monkeypatch):
    monkeypatch.setattr(design, "prompts_of", lambda task: [0, 1, 2])
    found = [row(k, pre, forgetting, task=task) for task in design.TRAINED[:2]
             for k, (pre, forgetting) in enumerate([(3.0, 0.5), (1.0, 0.2), (2.0, 0.3)])]  # fmt: skip
    groups = table.complete([*found, row(0, 1.0, task=design.TRAINED[2])])
    assert len(groups) == 2, "a task whose prompts are not all there does not count"
    assert table.correlation_table(groups)[-1].split(" | ")[2] == "**+1.00 [+1.00, +1.00]**"
    # The lowest loss forgets 0.2: the original 0.5, a random paraphrase 0.25.
    original, paraphrase = (line.split(" | ")[2] for line in table.choice_table(groups)[2:4])
    assert original == "**-0.300 [-0.300, -0.300]**" and paraphrase == "**-0.050 [-0.050, -0.050]**"
    one = Matrix(
        "a", "t", "base", PromptScores(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.ones(2, 2).long(), list("ab"))
    )
    assert {line.split(" | ")[2] for line in table.rests_table([one])[2:]} == {"100 %"}


def test_options(capsys):
    with pytest.raises(SystemExit):
        main(["run", "single", "--base", "smollm2", "--data", "x", "--work", "x", "--part", "2/2"])
    assert "expected I/N" in capsys.readouterr().err
