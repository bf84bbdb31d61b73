"""`sapo train` and `sapo doctor`: options, YAML, refusals, and what a run leaves behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sapo_peft.assets import BUNDLED_DIR
from sapo_peft.cli.main import build_parser, main
from sapo_peft.cli.train import _OPTIONS, _options
from sapo_peft.data.prompt_pool import PoolPrompt
from tests.trainer.training_helpers import environment

# Seconds until a child process must have ended.
DEADLINE = 300
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


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"prompts": ["Is it positive, negative or mixed?", "Say: positive, negative, mixed."]}))
    return str(path)


def options(*words: str) -> dict:
    return _options(build_parser().parse_args(["train", *words]))


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(config):
    found = options("--config", config, "--max-steps", "7")
    assert (found["max-steps"], found["lr"], found["every-steps"]) == (7, 1e-3, 2)
    assert (found["mode"], found["epochs"]) == ("hard", 1.0) and not found["resume"]
    assert set(found) == {name for name, *_ in _OPTIONS}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("steps: 3", "one of the options of sapo train --help, got 'steps'"),
        ("max-steps: three", "max-steps: wanted a whole number, got 'three'"),
        ("max-steps: true", "max-steps: wanted a whole number, got True"),
        ("mode: loud", "mode: wanted one of hard, soft, got 'loud'"),
        ("lr: [1]", "lr: wanted a number, got [1]"),
        ("- 1", "wanted options by name"),
        ("a: b: c", "wanted YAML"),
        ("x: !!python/object/apply:os.system ['echo hi']", "wanted YAML"),
        ("", "wanted options by name, got None"),
        ("lr: 1e-3\nlr: 1e-2", "wanted each option once, got 'lr' again"),
        ("max-steps: 1\nmax_steps: 2", "wanted each option once, got 'max-steps' again"),
        ("? [1]\n: 2", "wanted"),
        ("max-steps: null", "max-steps: wanted a whole number, got None"),
        ("a: &a [*a]", "one of the options of sapo train --help, got 'a'"),
        ("[" * 5000, "wanted YAML"),
        ("\t\x01\x02", "bad.yaml"),
    ],
    ids=range(16),
)
def test_a_faulty_file_is_one_line(tmp_path, capsys, text, wanted):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert wanted in error and str(path) in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "--data: wanted one, got none"),
        (["--data", DATA], "--output: wanted one, got none"),
        (["--data", DATA, "--output", "{out}"], "--prompts: wanted a file"),
        (["--data", DATA, "--output", "{out}", "--prompts", "{out}/none.json"], "none.json"),
        (["--data", DATA, "--output", "{out}", "--prompts", "{prompts}", "--paraphrase-with", "http://x/v1"],
         "--paraphrase-model"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, capsys, prompts, words, wanted):
    words = [word.replace("{out}", str(tmp_path / "out")).replace("{prompts}", prompts) for word in words]
    assert main(["train", *words]) == 2
    assert wanted in capsys.readouterr().err


def test_no_file_and_no_text_is_one_line(tmp_path, capsys):
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "large.yaml").write_text("# " + "x" * 2**21)
    for name in ("none.yaml", "bytes.yaml", "large.yaml", "."):
        assert main(["train", "--config", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sapo: error: ") and error.count("\n") == 1 and error.strip().isprintable(), error
        assert name in error or str(tmp_path) in error


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--max-steps", "0"], "--max-steps: wanted a whole number of at least 1, got 0"),
        (["--max-steps", "-1"], "--max-steps: wanted a whole number of at least 1, got -1"),
        (["--epochs", "0"], "--epochs: wanted a number above 0, got 0.0"),
        (["--epochs", "nan"], "--epochs: wanted a number above 0, got nan"),
        (["--batch-size", "0"], "--batch-size: wanted"),
        (["--lr", "inf"], "--lr: wanted a number of at least 0, got inf"),
        (["--lora-dropout", "1"], "--lora-dropout: wanted a number of at least 0 and below 1, got 1.0"),
        (["--seed", "-1"], "--seed: wanted a whole number from 0 to 2**32 - 1, got -1"),
        (["--workers", "-1"], "--workers: wanted"),
        (["--examples", "0"], "--examples: wanted"),
        (["--every-steps", "0"], "every_steps: wanted a whole number of at least 1, got 0"),
        (["--temperature", "-1"], "temperature: wanted"),
        (["--train-max-target", "0"], "train_max_target: wanted"),
        (["--data", "{out}/none"], "none"),
        (["--paraphrase-with", "http://127.0.0.1:1/v1"], "--paraphrase-model: wanted"),
        (["--model", "{out}/none"], "--model"),
        (["--output", "{out}/prompts.json"], "prompts.json: wanted a folder, got a file"),
    ],
)
def test_bad_values_are_refused_before_anything_is_made(tmp_path, capsys, prompts, words, wanted, monkeypatch):
    monkeypatch.setattr("sapo_peft.tiny_random.tiny_model", lambda: pytest.fail("the model was loaded"))
    out = tmp_path / "out"
    given = ["train", "--data", DATA, "--prompts", prompts, "--output", str(out)]
    assert main([*given, *(word.replace("{out}", str(tmp_path)) for word in words)]) == 2
    error = capsys.readouterr().err
    assert wanted in error and error.strip().splitlines()[-1].startswith("sapo: error: ")
    assert not list(out.glob("*"))
    # The same from a file.
    if "_" not in wanted and words[0] in ("--max-steps", "--epochs"):
        (tmp_path / "c.yaml").write_text(f"{words[0][2:]}: {words[1].replace('nan', '.nan')}")
        assert main([*given, "--config", str(tmp_path / "c.yaml")]) == 2
        assert wanted.split(", got")[0] in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(tmp_path, prompts):
    """130, one line with the step, no traceback; then --resume continues."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "sapo_peft.cli", "train", "--data", DATA, "--prompts", prompts, "--output", str(out),
             "--max-steps", "100000", "--save-steps", "2", "--batch-size", "1", "--examples", "8", "--device", "cpu",
             "--probe-examples", "1"]  # fmt: skip
    child = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + DEADLINE
        while not list(out.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < until:
            assert child.poll() is None, child.communicate()[1]
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=DEADLINE)
    finally:
        child.kill()
    assert child.returncode == 130, errors[-2000:]
    assert "--resume continues from the last checkpoint" in errors and "sapo: interrupted" in errors
    assert int(errors.split("stopped after step ")[1].split(";")[0]) >= 2
    assert "Traceback" not in errors, errors[-2000:]


def test_checkpoints_in_the_folder(tmp_path, capsys, config, prompts):
    """A new run does not mix with another's, and a resumed one does not begin anew where that was not asked for."""
    out = tmp_path / "out"
    words = ["train", "--data", DATA, "--prompts", prompts, "--output", str(out), "--config", config]
    assert main([*words, "--resume"]) == 0
    assert "No checkpoint to resume from: a new run." in capsys.readouterr().out
    assert main(words) == 2
    assert "wanted a folder without checkpoints, got one with checkpoint-4; continue" in capsys.readouterr().err
    before = (out / "adapter_model.safetensors").read_bytes()
    for folder in out.glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    assert main([*words, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "--resume: wanted a whole checkpoint" in error and "got 2 that are not (checkpoint-4, ...)" in error
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_a_run_and_its_resumption(tmp_path, capsys, config, prompts):
    words = ["train", "--data", DATA, "--prompts", prompts, "--output", str(tmp_path / "out"), "--config", config]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "trained with prompt" in printed and "SAPO: 2 scorings took" in printed
    out = tmp_path / "out"
    record = json.loads((out / "sapo_prompts.json").read_text())
    (entry,) = record["tasks"].values()
    assert entry["prompt"] in printed and entry["loss"] <= entry["original_loss"]
    assert (out / "adapter_model.safetensors").stat().st_size > 1000
    before = (out / "adapter_model.safetensors").read_bytes()

    # The newest checkpoint was cut off: the run goes on from the one before and ends with the same bytes.
    broken = out / "checkpoint-4" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:-100])
    assert main([*words, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "checkpoint-2" in printed.split("Resuming from ")[1].splitlines()[0]
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_paraphrases_from_a_local_model_are_kept(tmp_path, capsys, prompts, monkeypatch):
    """A random model says nothing that passes: the run goes on with the prompts that are there, and says so."""
    from sapo_peft import tiny_model, tiny_tokenizer
    from sapo_peft.paraphrase import LocalModelSource

    # It never ends by itself; a shorter answer is as bad.
    defaults = {**LocalModelSource.__init__.__kwdefaults__, "max_new_tokens": 24}
    monkeypatch.setattr(LocalModelSource.__init__, "__kwdefaults__", defaults)
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    out = tmp_path / "out"
    words = ["--data", DATA, "--prompts", prompts, "--output", str(out), "--max-steps", "1", "--examples", "4"]
    words += ["--probe-examples", "2", "--batch-size", "2", "--paraphrase-with", str(folder), "--paraphrases", "1"]
    assert main(["train", *words]) == 0
    assert capsys.readouterr().err.count("0 of the 1 paraphrases asked for are there") == 1
    assert (out / "sapo_pool.json").is_file() and (out / "sapo_prompts.json").is_file()


def test_a_resumed_run_keeps_the_paraphrases_it_began_with(tmp_path, capsys, config, prompts, monkeypatch):
    """Fewer had come than were asked for: asking for the rest would make another pool, which cannot be resumed."""
    pytest.importorskip("openai", reason="openai is not installed")
    monkeypatch.setenv("OPENAI_API_KEY", "k")

    def gather(pool, source, wanted, store):
        assert wanted == 5 and not store.exists(), "asked once"
        pool = pool.extended([PoolPrompt("Which is it: positive, negative or mixed?", "asked")])
        pool.save(store)
        return pool

    monkeypatch.setattr("sapo_peft.paraphrase.gather", gather)
    words = ["train", "--data", DATA, "--prompts", prompts, "--output", str(tmp_path / "out"), "--config", config]
    words += ["--paraphrase-with", "http://127.0.0.1:1/v1", "--paraphrase-model", "m", "--paraphrases", "5"]
    assert main(words) == 0
    assert main([*words, "--max-steps", "6", "--resume"]) == 0
    assert capsys.readouterr().out.count("trained with prompt") == 2
    (entry,) = json.loads((tmp_path / "out" / "sapo_prompts.json").read_text())["tasks"].values()
    assert entry["prompts"] == 3 and (tmp_path / "out" / "checkpoint-6").is_dir()


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "native modules" in printed and printed.count("\n  ok ") == 4 and "FAILED" not in printed


def test_doctor_says_what_fails(capsys, monkeypatch):
    def broken() -> str:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr("sapo_peft.cli.doctor.CHECKS", (("one", broken), ("two", lambda: "fine")))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED one" in printed and "RuntimeError: out of\\nluck" in printed and "ok     two" in printed


def test_every_option_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["train", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name, *_ in _OPTIONS)
    assert Path(DATA).is_dir()


def test_a_saved_pool_can_be_scored_and_trained_on(tmp_path, capsys, prompts):
    from sapo_peft import PromptPool

    pool = PromptPool.build(TASK, "Is it positive, negative or mixed?", ["Say which: positive, negative, mixed."])
    pool.save(tmp_path / "pool.json")
    words = ["--prompts", str(tmp_path / "pool.json"), "--data", DATA, "--examples", "2"]
    assert main(["score", *words]) == 0
    assert "Train with prompt" in capsys.readouterr().out
    out = str(tmp_path / "out")
    assert (
        main(["train", *words, "--output", out, "--max-steps", "1", "--batch-size", "2", "--probe-examples", "1"]) == 0
    )
    assert json.loads((tmp_path / "out" / "sapo_prompts.json").read_text())["tasks"][TASK]["prompts"] == 2
