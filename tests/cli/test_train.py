"""`sapo train`: options, YAML, refusals, and what a run leaves behind."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest
from transformers import Trainer, TrainingArguments

from sapo_peft import last_good_checkpoint
from sapo_peft.assets import BUNDLED_DIR
from sapo_peft.cli import outputs, train
from sapo_peft.locks import alone
from tests.cli.cli_helpers import one_line_error, put

TASK = "task01_product_note_polarity"
DATA = str(BUNDLED_DIR / "SUPERNI" / TASK)
SMALL = """
max_steps: 4
lr: 1e-3          # text in YAML 1.1
examples: 16
every-steps: 2
probe-examples: 2
batch-size: 2
logging-steps: 1
save-steps: 2
lora-r: 2
"""


pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def words(tmp_path) -> list[str]:
    """A small run in the folder `out`."""
    config = put(tmp_path / "run.yaml", SMALL)
    prompts = put(tmp_path / "prompts.json", ["Is it positive, negative or mixed?", "Say: positive, negative, mixed."])
    found = {"data": DATA, "prompts": prompts, "output": tmp_path / "out", "config": config, "device": "cpu"}
    return ["train", *(str(word) for name, value in found.items() for word in (f"--{name}", value))]


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path, words):
    more = "weight_decay: 0.1\nlr_scheduler_kwargs: {num_cycles: 2}\ninclude_for_metrics: [loss, inputs]\nbf16: false\n"
    put(tmp_path / "run.yaml", SMALL + more)
    assert {entry.name for entry in fields(TrainingArguments) if entry.init} <= set(train._options(words[1:]))
    found = train._options([*words[1:], "--max-steps", "7", "--adam_beta2", "0.98", "--each-epoch"])
    assert (found["max_steps"], found["learning_rate"], found["every_steps"]) == (7, 1e-3, 2)
    assert (found["mode"], found["num_train_epochs"]) == ("hard", 1.0) and found["each_epoch"] and not found["resume"]
    arguments = train._arguments(found, evaluated=False)
    assert (arguments.weight_decay, arguments.adam_beta2, arguments.bf16) == (0.1, 0.98, False)
    assert arguments.lr_scheduler_kwargs == {"num_cycles": 2} and arguments.include_for_metrics == ["loss", "inputs"]
    assert arguments.use_cpu and arguments.report_to == [] and arguments.lr_scheduler_type == "cosine"
    assert (arguments.per_device_train_batch_size, arguments.save_steps, arguments.seed) == (2, 2, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 3", "one of the options of sapo train --help, got 'steps'"),
        ("max-steps: three", "invalid int value: 'three'"),
        ("mode: loud", "--mode: invalid choice: 'loud'"),
        ("lr: [1, 2]", "lr: expected one value, got [1, 2]"),
        ("race: perhaps", "--race: Truthy value expected"),
        ("a: b: c", "expected YAML"),
        ("x: !!python/object/apply:os.system ['echo hi']", "expected YAML"),
        ("", "expected options by name, got None"),
        ("max-steps: 1\nlr: 0.1\n'max-steps': 2", "line 3 column 1: expected each key once, got 'max-steps' again"),
        ("lr_scheduler_kwargs: {a: 1, b: 2, a: 3}", "line 1 column 35: expected each key once, got 'a' again"),
        ("lr: 0.1\nlearning_rate: 0.2", "expected each option once, got 'learning_rate' beside another name of it"),
        ("max-steps: null", "max-steps: expected a value, got none"),
        ("[" * 5000, "expected YAML"),
        (bytes(range(256)), ""),
        ("# " + "x" * 2**21, ""),
        (None, "No such file"),
        (".", ""),
    ],
    ids=range(17),
)
def test_a_faulty_file_is_one_line(tmp_path, sapo, text, expected):
    path = tmp_path if text == "." else tmp_path / "bad.yaml"
    if text not in (None, "."):
        put(path, text)
    one_line_error(sapo("train", "--config", path), str(path), expected)


REFUSED = [
    ("--output", None, "--output: expected a folder, got none"),
    ("--data", None, "--data: expected one, got none"),
    ("--prompts", None, "--prompts: expected a file"),
    ("--prompts", "{out}/none.json", "none.json"),
    ("--data", "{out}/none", "none"),
    ("--task", "task02_odd_one_out", "task: expected none"),
    ("--every-steps", "0", "'every_steps': "),
    ("--early-stopping-patience", "2", "--early-stopping-patience: expected --eval-data too"),
    ("--model", "{out}/none", "--model"),
    ("--output", "{out}/prompts.json", "prompts.json: expected a folder, got a file"),
    ("--output", "/proc/none", "/proc/none"),
    ("--nonsense", "1", "unrecognized arguments: --nonsense 1"),
]


@pytest.mark.parametrize(("option", "value", "expected"), REFUSED, ids=range(len(REFUSED)))
def test_bad_values_are_refused_before_the_model_is_loaded(tmp_path, sapo, words, option, value, expected, monkeypatch):
    monkeypatch.setattr("sapo_peft.tiny_random.tiny_model", lambda: pytest.fail("the model was loaded"))
    if value is None:
        place = words.index(option)
        words[place : place + 2] = []
    else:
        words += [option, value.replace("{out}", str(tmp_path))]
    one_line_error(sapo(*words), expected)
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_a_run_and_its_resumption(tmp_path, words, sapo):
    code, out, err = sapo(*words, "--resume")
    assert code == 0 and "No checkpoint to resume from: a new run." in out, err
    assert "trained with prompt" in out and "SAPO: 2 scorings took" in out
    folder = tmp_path / "out"
    (entry,) = json.loads((folder / "sapo_prompts.json").read_text())["tasks"].values()
    assert entry["prompt"] in out and entry["loss"] <= entry["original_loss"]
    before = (folder / "adapter_model.safetensors").read_bytes()
    # A new run does not mix with another's.
    one_line_error(sapo(*words), "expected a folder without checkpoints, got one with checkpoint-4; continue")

    # The newest checkpoint was cut off: the run goes on from the one before and ends with the same bytes.
    broken = folder / "checkpoint-4" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:-100])
    code, out, _ = sapo(*words, "--resume")
    assert code == 0 and "checkpoint-2" in out.split("Resuming from ")[1].splitlines()[0]
    weights = folder / "adapter_model.safetensors"
    assert weights.read_bytes() == before
    # What is learnt must be the same.
    code, _, err = sapo(*words, "--resume", "--max-steps", "6", "--lora-alpha", "64")
    assert code != 0 and "adapter 'default': lora_alpha: expected 32 as before, got 64" in err
    code, _, err = sapo(*words, "--resume", "--max-steps", "6", "--lr", "3e-4")
    assert code == 0 and "learning_rate 0.001 -> 0.0003" in err and "max_steps 4 -> 6" in err

    # Later changes of the adapter are seen.
    score = ("score", "--prompts", tmp_path / "prompts.json", "--data", DATA, "--examples", 2, "--adapter", folder)
    assert sapo(*score)[0] == 0
    weights.write_bytes(before)
    one_line_error(sapo(*score), "adapter_model.safetensors: expected sha256")


def test_evaluation_and_early_stopping(tmp_path, words, sapo):
    """Without a better loss the run stops, with the best adapter."""
    file = put(tmp_path / "eval.json", [{"sentence": "a", "label": "positive"}, {"sentence": "b", "label": "negative"}])
    stop = ("--eval-data", file, "--early-stopping-patience", 1, "--save-steps", 1, "--lr", 0, "--max-steps", 9)
    code, out, _ = sapo(*words, *stop)
    assert code == 0 and out.count("'eval_loss'") == 2, out
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["best_global_step"] == 1
    other = ("--eval-data", file, "--output", tmp_path / "other", "--eval_strategy", "epoch", "--max-steps", 8)
    assert "'eval_loss'" in sapo(*words, *other)[1]


def test_a_write_that_fails_names_the_folder_and_the_cause(tmp_path, words, sapo, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr("torch.save", full)
    monkeypatch.setattr(outputs, "_cause", lambda path: OSError(28, "No space left on device"))
    code, _, err = sapo(*words)
    assert code == 2 and f"sapo: error: {tmp_path}/out: No space left on device" in err


def test_ctrl_c_says_how_to_go_on(tmp_path, words, sapo, monkeypatch):
    """130, one line with the step, no traceback; then --resume continues."""
    left, real = [None] * 3, Trainer.training_step

    def step(*args, **options):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return real(*args, **options)

    monkeypatch.setattr(Trainer, "training_step", step)
    code, _, err = sapo(*words)
    assert code == 130 and err.endswith("sapo: interrupted\n") and "Traceback" not in err
    assert "sapo: stopped after step 3; --resume continues from the last checkpoint" in err
    monkeypatch.setattr(Trainer, "training_step", real)
    assert "Resuming from" in sapo(*words, "--resume")[1]


def test_lines_of_progress_and_no_bars_off_a_terminal(words, sapo, monkeypatch):
    monkeypatch.setattr("sapo_kernels.scoring.progress.LINE_SECONDS", 0.0)
    code, out, err = sapo(*words, "--max-steps", 4, "--probe-examples", 32)
    assert code == 0 and "%|" not in out + err and "Warning" not in err
    for line in (r"scoring prompts: \d+ of \d+ cells", "training: 2 of 4 steps"):
        assert re.search(rf"^sapo: {line}, about 1 min left$", err, re.MULTILINE), (line, err)


def test_training_that_diverges_ends_with_an_error_and_without_an_adapter(tmp_path, words, sapo):
    code, out, err = sapo(*words, "--lr", "1e30", "--save-steps", "1000")
    assert code == 2 and "expected finite weights, got NaN or infinity" in err and "trained with prompt" not in out
    assert not list((tmp_path / "out").rglob("adapter_model.safetensors"))


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, words, sapo):
    (tmp_path / "out").mkdir()
    with alone(tmp_path / "out" / ".lock", tmp_path):
        code, _, err = sapo(*words)
    assert code != 0 and "another process is writing here" in err


def test_a_run_killed_while_it_wrote_its_first_checkpoint_starts_over(tmp_path, words, sapo):
    cut = tmp_path / "out" / "checkpoint-2"
    cut.mkdir(parents=True)
    (cut / "optimizer.pt").write_bytes(b"PK")
    code, out, err = sapo(*words, "--resume")
    assert code == 0 and "No checkpoint to resume from: a new run." in out and "is incomplete" in err
    assert last_good_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-4")
