"""What a sequence run does and leaves behind: policies, the folder, evaluation, options."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch

from sapo_kernels import score_prompts
from sapo_kernels.files import DataError, read_json
from sapo_peft.sequence import SequenceConfig, SequenceTask, run_sequence, sequence_metrics
from sapo_peft.sequence import training as training_module
from sapo_peft.sequence.config import derived_seed
from sapo_peft.sequence.evaluate import Evaluator
from sapo_peft.sequence.folder import read_run
from sapo_peft.sequence.methods import Adapters
from sapo_peft.sequence.metrics import exact_match
from sapo_peft.sequence.training import train_task
from tests.sequence.sequence_helpers import (
    model_and_tokenizer,
    rows_of,
    run_small,
    small_config,
    small_task,
    small_tasks,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three tasks with re-selection inside the tasks: (its folder, its result)."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    return folder, run_small(folder, count=3, every_steps=2, order="mine")


def test_the_folder_holds_what_the_readers_expect(finished):
    folder, result = finished
    names = [f"colours{i}" for i in (1, 2, 3)]
    run, results = read_json(folder / "run.json"), read_json(folder / "results.json")
    assert run["status"] == "done" and run["kind"] == "sequence" and run["tasks"] == names and run["finished"]
    assert (run["method"], run["policy"], run["seed"], run["version"]) == ("lora-inc", "sapo", 3, 2)
    assert SequenceConfig(**run["config"]) == small_config(every_steps=2)
    assert results["tasks"] == names and results["metrics"] == result.metrics and results["choices"] == result.choices
    before = read_json(folder / "before.json")
    for metric, entry in results["metrics"].items():
        matrix = entry["R"]
        assert entry == {"R": matrix, **sequence_metrics(matrix)} and len(matrix) == 4
        assert matrix[0] == before["row"][metric]
        for i, name in enumerate(names, 1):
            metrics = read_json(folder / "tasks" / f"{i:02d}-{name}" / "metrics.json")
            assert metrics["row"][metric] == matrix[i] and metrics["examples"] == [3, 3, 3]
    assert list(results["metrics"]) == ["rougeL", "exact_match", "normalised_match", "loss"]
    for i, (name, choice) in enumerate(zip(names, results["choices"], strict=True), 1):
        files = folder / "tasks" / f"{i:02d}-{name}"
        scores, train, data = (read_json(files / f"{part}.json") for part in ("scores", "train", "data"))
        assert [(s["step"], s["reason"]) for s in scores["scorings"]] == [(0, "start"), (2, "steps")]
        for scoring in scores["scorings"]:
            assert len(scoring["loss"]) == 3 and scoring["chosen"] == scoring["loss"].index(min(scoring["loss"]))
            assert scoring["weights"] == [float(k == scoring["chosen"]) for k in range(3)]
            assert scoring["dense_tokens"] > scoring["computed_tokens"] > 0 and min(scoring["tokens"]) > 0
        last = scores["scorings"][-1]
        assert choice["index"] == last["chosen"] and choice["prompt"] == scores["prompts"][choice["index"]]
        assert choice["loss"] == min(last["loss"]) and choice["original_loss"] == last["loss"][0]
        assert [step for step, _ in train["losses"]] == [2, 4] and train["examples"] == 8 and train["tokens"] > 100
        assert data["rows"] == {"train": 8, "test": 3}
        prompts = read_json(files / "adapter" / "sapo_prompts.json")
        assert prompts["tasks"][name]["prompt"] == choice["prompt"]
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (files / "adapter").iterdir()}
        # Whoever may read the scores may read the adapter.
        assert len({p.stat().st_mode for p in [files / "scores.json", *(files / "adapter").iterdir()]}) == 1
        assert prompts["tasks"][name]["loss"] == choice["loss"]
    run = read_run(folder)
    assert run.results == results and run.measures == list(results["metrics"])
    # A few answers before and after; what is read is what was written, byte for byte.
    for found in (run.before, *(task.metrics for task in run.tasks)):
        assert [[one.input for one in answers] for answers in found.answers] == [
            [row["input"] for row in task.test] for task in small_tasks(3)]  # fmt: skip
        for j, answers in enumerate(found.answers):
            matches = [exact_match(one.answer, one.target) for one in answers]
            assert sum(matches) / len(matches) == found.row["exact_match"][j]
    for place, document in {"run": run.record, "before": run.before, "tasks/02-colours2/scores": run.tasks[1].scores,
                            "tasks/02-colours2/train": run.tasks[1].train}.items():  # fmt: skip
        text = json.dumps(document.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n"
        assert text == (folder / f"{place}.json").read_text()
    cost = results["cost"]
    assert cost["overhead_fraction"] == cost["score_seconds"] / cost["train_seconds"] > 0
    assert cost["score_dense_tokens"] > cost["score_computed_tokens"] > 0 and cost["train_tokens"] > 300


def rendered(monkeypatch):
    """(step, instruction, input) of every row that any trainer of the test trains on, in order."""
    seen, plain = [], training_module._TaskTrainer.training_step

    def training_step(self, model, inputs, *args, **options):
        for ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
            context = self.processing_class.decode(ids[labels == -100])
            prompt, _, text = context.partition("user\n")[2].partition("\n\nText:\n")
            seen.append((self.state.global_step, prompt, text.partition("\n\nOne word.")[0]))
        return plain(self, model, inputs, *args, **options)

    monkeypatch.setattr(training_module._TaskTrainer, "training_step", training_step)
    return seen


@pytest.mark.parametrize("policy", ["original", "sapo", "random", "worst"])
def test_the_chosen_prompt_is_trained_on_and_evaluated_with(policy, monkeypatch):
    seen = rendered(monkeypatch)
    tasks = small_tasks(2, prompts=5)
    evaluated, plain = [], Evaluator.evaluate
    monkeypatch.setattr(
        Evaluator, "evaluate", lambda self, model, prompts, tick: evaluated.append(dict(prompts)) or plain(
            self, model, prompts, tick))  # fmt: skip
    result = run_small(None, tasks=tasks, policy=policy, score_always=True)
    chosen = [choice["index"] for choice in result.choices]
    if policy in ("sapo", "worst"):
        # Before any training the base model alone decides: an independent scoring of the first task says the same.
        model, tokenizer = model_and_tokenizer()
        pool, probe = tasks[0].pool, list(tasks[0].train[:3])
        losses = score_prompts(model, list(pool.prompts), probe, tokenizer=tokenizer, suffix=pool.suffix).loss.tolist()
        expected, first = {"sapo": min, "worst": max}[policy](losses), result.choices[0]
        assert first["index"] == losses.index(expected) and first["loss"] == pytest.approx(expected, abs=1e-6)
        assert first["original_loss"] == pytest.approx(losses[0], abs=1e-6)
    for place, task in enumerate(tasks):
        assert {prompt for _, prompt, _ in seen[8 * place : 8 * place + 8]} == {task.pool.prompts[chosen[place]]}
    assert len(seen) == 16
    # Tasks that have not been seen keep the original.
    assert evaluated == [{0: 0, 1: 0}, {0: chosen[0], 1: 0}, {0: chosen[0], 1: chosen[1]}]
    if policy == "original":
        assert chosen == [0, 0] and result.choices[0]["loss"] == result.choices[0]["original_loss"] is not None
    if policy == "random":
        assert 0 not in chosen
        configs = [small_config(policy="random", seed=seed) for seed in range(40)]
        draws = [training_module._Policy(None, tasks[0], 1, config)._prompt() for config in configs]
        assert set(draws) == {1, 2, 3, 4} and draws[3] == chosen[0]


def test_sample_draws_for_every_example_and_epoch(monkeypatch):
    seen = rendered(monkeypatch)
    result = run_small(None, tasks=[small_task(1, prompts=5, train=16)], policy="sample", epochs=4)
    assert len(seen) == 64
    counts = Counter(prompt for _, prompt, _ in seen)
    assert len(counts) == 5 and max(counts.values()) < 30
    # One example is not always rendered with the same prompt.
    inputs = {text: {prompt for _, prompt, other in seen if other == text} for _, _, text in seen}
    assert len(inputs) == 16 and sum(len(prompts) > 1 for prompts in inputs.values()) > 12
    assert result.choices[0]["index"] == 0


def test_seeds_differ_by_purpose_task_and_run():
    seeds = [derived_seed(run, task, purpose) for run in range(4) for task in range(4) for purpose in ("init", "train")]
    assert len(set(seeds)) == 32 and all(0 <= seed < 2**31 for seed in seeds)
    matrices = [run_small(None, count=1, seed=seed, max_steps=2, generate=False).matrix("loss") for seed in (3, 4)]
    assert matrices[0][0] == matrices[1][0] and matrices[0][1] != matrices[1][1]


@pytest.mark.parametrize(
    "evaluate, measured, there",
    [
        ("all", [[1, 1, 1]] * 4, {"AP", "BWT", "BWT_last", "FWT"}),
        ("seen", [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], {"AP", "BWT", "BWT_last"}),
        ("last", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1]], {"AP", "BWT_last"}),
    ],
)
def test_only_what_is_wanted_is_evaluated(evaluate, measured, there):
    result = run_small(None, count=3, evaluate=evaluate, generate=False, max_steps=1)
    assert set(result.metrics) == {"loss"}
    assert [[int(value is not None) for value in row] for row in result.matrix("loss")] == measured
    assert {name for name in ("AP", "BWT", "BWT_last", "FWT") if result.metrics["loss"][name] is not None} == there


def test_the_turn_of_the_instruction(tmp_path):
    """It is trained, scored and evaluated in the turn that is asked for, and said beside the adapter."""
    found = {
        role: run_small(tmp_path / role, count=1, instruction_role=role, max_steps=2) for role in ("user", "system")
    }
    assert found["user"].matrix("loss") != found["system"].matrix("loss")
    for role in found:
        record = read_json(tmp_path / role / "tasks" / "01-colours1" / "adapter" / "sapo_prompts.json")
        assert record["tasks"]["colours1"]["instruction_role"] == role
    with pytest.raises(DataError, match="instruction_role: expected 'system', as this run began with, got 'user'"):
        run_small(tmp_path / "system", count=1, max_steps=2)


def test_limits_on_rows_and_lengths_are_kept_and_reported(tmp_path):
    tasks = [
        SequenceTask.build("t", rows_of(1, 20), [{"input": "x" * 400, "target": "y" * 60}] * 4, small_task(1).pool)
    ]
    result = run_small(tmp_path, tasks=tasks, train_examples=6, test_examples=2, max_source=150, max_target=8)
    files = tmp_path / "tasks" / "01-t"
    assert read_json(files / "train.json")["examples"] == 6
    assert read_json(files / "metrics.json")["examples"] == [2]
    assert read_json(files / "data.json")["rows"] == {"train": 20, "test": 4}
    warnings = read_json(tmp_path / "run.json")["warnings"]
    assert "task t: 2 of 2 test inputs are cut to max_source" in warnings
    assert "task t: 2 of 2 test targets are cut to max_target" in warnings
    assert result.run["warnings"] == warnings
    with pytest.raises(DataError, match="task 't': prompt 0, example 0: expected a context of at most 20 tokens"):
        run_small(None, tasks=tasks, max_source=20)


def test_losses_that_are_not_finite_are_written_as_null(tmp_path, monkeypatch):
    """Of prompts and of targets; of training they are an error, so there is none here."""
    monkeypatch.setattr(training_module._TaskTrainer, "training_step", lambda self, *args: torch.zeros(()))
    model, tokenizer = model_and_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    result = run_small(tmp_path, model=(model, tokenizer), count=1, policy="worst", max_steps=2)
    assert any("no prompt has a finite loss" in warning for warning in result.run["warnings"])
    assert result.matrix("loss") == [[None], [None]]
    assert read_json(tmp_path / "tasks" / "01-colours1" / "scores.json")["scorings"][0]["loss"] == [None] * 3


@pytest.mark.parametrize("options, words", [
    ({"learning_rate": 1e30, "target_modules": "all-linear"}, "step 4: expected finite weights, got NaN or infinity"),
    # After the last step.
    ({"learning_rate": 1e38, "max_steps": 1, "warmup": 0.0}, "step 1: expected finite weights, got NaN or infinity"),
])  # fmt: skip
def test_training_that_went_to_nan_is_an_error_and_writes_no_adapter(tmp_path, options, words):
    with pytest.raises(FloatingPointError, match=words):
        run_small(tmp_path, generate=False, **options)
    assert not list((tmp_path / "tasks").iterdir())
    assert read_json(tmp_path / "run.json")["status"] == "running"


def test_drift_is_told_the_loss_without_the_penalty(monkeypatch):
    seen = []
    monkeypatch.setattr("sapo_peft.trainer.drift.Drift.seen", lambda self, excess: seen.append(excess))
    for weight in (0.0, 50.0):
        model, tokenizer = model_and_tokenizer()
        adapters = Adapters(model, small_config(method="o-lora", lambda_1=weight, drift=2.0, logging_steps=1))
        adapters.add(1, 1)
        adapters.add(2, 2)
        train_task(adapters, tokenizer, small_task(2, train=2), 2, adapters.config)
    # The first step of both starts from the same weights.
    assert len(seen) == 2 and seen[0] == seen[1]


def test_rows_of_later_tasks_are_checked_before_anything_is_done(tmp_path):
    good, bad = small_task(1), small_task(2)
    for split in ("train", "test"):
        rows = {"train": list(bad.train), "test": list(bad.test)}
        rows[split][1] = {"input": "\ud800", "target": "red"}
        task = SequenceTask.build("bad", rows["train"], rows["test"], bad.pool)
        with pytest.raises(DataError, match=f"task 'bad': {split}: example 1: 'input': expected text, got a lone surr"):
            run_small(tmp_path / split, tasks=[good, task], evaluate="last")
        assert [path.name for path in (tmp_path / split).iterdir()] == [".lock"]


@pytest.mark.parametrize("modules, method, word", [
    (("q_proj", "typo_proj"), "lora-inc", "expected names of modules of Qwen3ForCausalLM, got 'typo_proj'"),
    (("",), "lora-inc", "got ''"),
    (("q_proj", "embed_tokens"), "o-lora", "expected LoRA on linear layers only, got Embedding"),
    (("q_proj", "input_layernorm"), "lora-inc", "Target module Qwen3RMSNorm"),
])  # fmt: skip
def test_modules_that_cannot_be_adapted_are_refused_and_the_model_is_left_as_it_was(tmp_path, modules, method, word):
    pair = model_and_tokenizer()
    before = [name for name, _ in pair[0].named_modules()], [p.requires_grad for p in pair[0].parameters()]
    with pytest.raises(ValueError) as error:
        run_small(tmp_path, model=pair, count=1, target_modules=modules, method=method, evaluate="last", max_steps=1)
    assert word in str(error.value)
    if "names of modules" in word:  # found before a run is begun
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert ([name for name, _ in pair[0].named_modules()], [p.requires_grad for p in pair[0].parameters()]) == before
    assert not hasattr(pair[0], "peft_config")


@pytest.mark.parametrize("options, word", [
    ({"method": "lora"}, "'method': expected 'lora-inc', 'o-lora' or 'seq-lora', got 'lora'"),
    ({"epochs": 0}, "'epochs': expected greater than 0"),
    ({"warmup": 1.0}, "'warmup': expected less than 1"),
    ({"seed": -1}, "'seed'"),
    ({"target_modules": []}, "target_modules: expected 'all-linear' or a list"),
    ({"target_modules": "q_proj"}, "target_modules: expected 'all-linear' or a list"),
    ({"generate": False}, "at least one of them"),
    ({"policy": "worst", "each_epoch": True}, "policy sapo only"),
])  # fmt: skip
def test_options_of_another_kind_are_refused(options, word):
    with pytest.raises(ValueError) as error:
        SequenceConfig(**options)
    assert word in str(error.value)


def test_models_and_tasks_of_another_kind_are_refused():
    task = small_task(1)
    for wrong in (model_and_tokenizer()[0], (1, 2), lambda: 3, 5):
        with pytest.raises(TypeError, match="model: expected a name, a pair"):
            run_sequence(wrong, [task], None)
    with pytest.raises(TypeError, match="at least one SequenceTask"):
        run_sequence("tiny", [], None)
    with pytest.raises(DataError, match="order: expected a text of at most 300"):
        run_sequence("tiny", [task], None, order="x" * 301)
    for tasks in ([task] * 257, [task, task]):
        with pytest.raises(DataError, match="tasks: expected at most 256 with different names"):
            run_sequence("tiny", tasks, None)
