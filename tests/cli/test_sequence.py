"""`sapo sequence` on the command line: a run, its report, going on, faults in one line."""

from __future__ import annotations

import json
import re

import pytest

from sapo_peft.assets import BUNDLED_DIR
from tests.cli.cli_helpers import one_line_error, put
from tests.sequence.sequence_helpers import everything

SMALL = ("--train-examples", 2, "--test-examples", 2, "--probe-examples", 1, "--epochs", 1, "--max-new-tokens", 3,
         "--batch-size", 2, "--device", "cpu")  # fmt: skip


def test_a_run_its_report_and_going_on(tiny, sapo, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    command = ("sequence", "--tasks", "task02_odd_one_out,task03_message_field", "--output", tmp_path / "run", *SMALL)
    code, out, err = sapo(*command, "--method", "o-lora")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["task", "prompt", "loss", "original"] and max(map(len, lines[:3])) <= 100
    for number, name in ((1, "task02_odd_one_out"), (2, "task03_message_field")):
        assert re.match(rf" +{number}(?: +\d+/21)(?: +\d+\.\d{{4}}){{2}}  {name}$", lines[number]), lines[number]
    found = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    for name, title in (("rougeL", "ROUGE-L, %"), ("exact_match", "Exact match, %")):
        told = "  ".join(f" *{100 * found[name][key]:.2f}" for key in ("AP", "BWT", "BWT_last", "FWT"))
        assert re.search(rf"^{told}  {title}$", out, re.MULTILINE), (told, out)
    assert re.search(r"scoring is [\d.]+% of training", out) and f"sapo report {tmp_path}/run" in out
    # Not on a terminal: a line a phase.
    assert "sapo: 0/2 all tasks: evaluate, 4 examples" in err and "sapo: 2/2 task03_message_field: train, 1 step" in err
    before = everything(tmp_path / "run")
    assert sapo(*command, "--method", "o-lora", "--quiet")[:2] == (0, out)
    one_line_error(sapo(*command), "method: ", "'o-lora', as this run began with, got 'lora-inc'")
    assert everything(tmp_path / "run") == before


def test_lines_within_a_phase(tiny, sapo, tmp_path, monkeypatch):
    """What is said every half minute off a terminal; here at every turn."""
    monkeypatch.setattr("sapo_kernels.scoring.progress.LINE_SECONDS", 0.0)
    more = ("--max-steps", 3, "--probe-examples", 40, "--eval-batch-size", 1, "--train-examples", 40)
    code, _, err = sapo("sequence", "--tasks", "task02_odd_one_out", "--output", tmp_path / "run", *SMALL, *more)
    assert code == 0
    for line in (r"0/1 all tasks: evaluate: 1 of 2 examples, about 1 min left",
                 r"1/1 task02_odd_one_out: scoring: \d+ of 840 cells, about 1 min left",
                 r"1/1 task02_odd_one_out: train: 2 of 3 steps, about 1 min left",
                 r"1/1 task02_odd_one_out: evaluate: 1 of 2 examples, about 1 min left"):  # fmt: skip
        assert re.search(rf"^sapo: {line}$", err, re.MULTILINE), (line, err)


def test_a_file_with_options_of_the_run_and_of_the_trainer(tiny, sapo, tmp_path):
    text = "tasks: task02_odd_one_out\nlr: 1e-3\nadam_beta2: 0.98\nrace: true\nquiet: true\nepochs: 3\n"
    file = put(tmp_path / "run.yaml", text + "target_modules: q_proj,v_proj\n")
    small = [*map(str, SMALL), "--epochs", "1"]
    code, _, err = sapo("sequence", "--config", file, "--output", tmp_path / "run", *small)
    assert (code, err) == (0, "")
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (config["learning_rate"], config["epochs"], config["race"]) == (1e-3, 1.0, True)
    assert config["trainer"] == {"adam_beta2": 0.98} and config["target_modules"] == ["q_proj", "v_proj"]
    one_line_error(
        sapo("sequence", "--config", put(tmp_path / "b.yaml", "save_strategy: no")), "b.yaml", "sapo sequence"
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--order", "nowhere"), ["an order in CL_configs/order, got 'nowhere'", "'bundled_a', 'bundled_b'"]),
        (("--tasks", "task02"), ["exact name 'task02'"]),
        (("--tasks", "a", "--order", "b"), ["--order, --tasks: expected one of them, got both"]),
        (("--data", BUNDLED_DIR), ["--order: expected the name of an order"]),
        (("--data", "/nowhere", "--order", "a"), ["/nowhere: ", "a folder with tasks, got no such folder"]),
        (("--epochs", "0"), ["'epochs': ", "greater than 0"]),
        (("--train-examples", "x"), ["--train-examples"]),
        (("--policy", "best"), ["--policy"]),
        (("--no-generate",), ["generate, eval_loss: ", "at least one of them"]),
        (("--policy", "worst", "--each-epoch"), ["policy sapo only"]),
        (("--policy", "worst", "--race"), ["policy sapo only"]),
        (("--model", "./nowhere", "--tasks", "task02_odd_one_out"), ["--model './nowhere'", "no such folder"]),
        (("--output", "{file}", "--tasks", "task02_odd_one_out"), ["file"]),
        (("--output", "/proc/none", "--tasks", "task02_odd_one_out"), ["/proc/none"]),
    ],
)
def test_faults_are_one_line(sapo, tmp_path, arguments, words):
    file = put(tmp_path / "file", "text")
    arguments = [str(one).replace("{file}", str(file)) for one in arguments]
    one_line_error(sapo("sequence", "--output", tmp_path / "run", *arguments), *words)
    assert not (tmp_path / "run" / "run.json").exists() and file.read_text() == "text"


def test_control_c_says_how_to_go_on(tiny, sapo, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.training_step", interrupted)
    code, out, err = sapo("sequence", "--tasks", "task02_odd_one_out", "--output", tmp_path / "r", *SMALL)
    assert (code, out) == (130, "") and f"sapo: stopped; the same command continues in {tmp_path}/r" in err
    assert json.loads((tmp_path / "r" / "run.json").read_text())["status"] == "running"
