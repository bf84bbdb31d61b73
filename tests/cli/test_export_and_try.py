"""`sapo export` and `sapo try`: from a run to one adapter, and from that to an answer; faults in one line."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest

from sapo_peft.assets import BUNDLED_DIR
from sapo_peft.cli.main import main
from sapo_peft.sequence import load_adapters, read_tasks
from sapo_peft.sequence.evaluate import Evaluator
from sapo_peft.tiny_base import load_tiny_base, sequence_tasks
from sapo_peft.trainer.records import CARD_TITLE
from tests.cli.cli_helpers import one_line_error
from tests.sequence.sequence_helpers import small_config

TASKS = ("task04_active_to_passive", "task03_message_field")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two tasks on the trained tiny base, and its one adapter."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["sequence", "--model", "tiny-base", "--tasks", ",".join(TASKS), "--output", str(folder / "run"),
             "--max-steps", "8", "--lr", "6e-3", "--lora-dropout", "0", "--probe-examples", "4", "--test-examples",
             "4", "--evaluate", "last", "--quiet", "--device", "cpu"]  # fmt: skip
    assert main(words) == 0
    assert main(["export", str(folder / "run"), "--out", str(folder / "one")]) == 0
    return folder


def test_the_answer_is_that_of_the_evaluation(runs, sapo, monkeypatch, capsys):
    adapter, task = runs / "one", TASKS[1]
    (row, *_), entry = sequence_tasks(TASKS, 0)[1].test, json.loads((adapter / "sapo_prompts.json").read_text())
    code, out, err = sapo("try", adapter, "--task", task, "--input", row["input"])
    assert code == 0 and out.endswith("\n") and "What the model reads:" in err, err
    for text in (entry["tasks"][task]["prompt"], row["input"].splitlines()[0], "<|im_start|>assistant"):
        assert text in err.replace("\n  ", "\n")
    assert "What the model reads" not in out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(row["input"].encode() + b"\n")))
    assert sapo("try", adapter, "--task", task, "--quiet") == (0, out, "")
    # As the sequence itself evaluates, with all its adapters.
    model, tokenizer = load_tiny_base()
    model = load_adapters(model, runs / "run")
    (whole,) = read_tasks(BUNDLED_DIR, [task])
    whole = whole.used(1, None)
    evaluator = Evaluator(model, [whole], tokenizer, small_config(max_new_tokens=128, max_source=1536))
    place = next(i for i, other in enumerate(whole.test) if other["input"] == row["input"])
    assert out.strip() == evaluator.answers(model, 0, entry["tasks"][task]["index"])[place].strip() != ""


def test_one_adapter_of_several_says_so(runs, sapo):
    (adapter,) = (runs / "run" / "tasks").glob("02-*/adapter")
    code, out, err = sapo("try", adapter, "--input", "city: Rome", "--max-new-tokens", "2")
    assert code == 0 and "1 adapters of earlier tasks were active too" in err and "sapo export" in err
    card = (adapter / "README.md").read_text()
    assert card.index(CARD_TITLE) < card.index("# Model Card for Model ID") and "1 tasks before it" in card


def test_the_snippet_of_the_card_answers_as_sapo_try(runs, sapo, monkeypatch, capsys):
    card = (runs / "one" / "README.md").read_text()
    section = card[card.index(CARD_TITLE) : card.index("# Model Card for Model ID")]
    code = section[section.index("    import json") :].replace("\n    ", "\n").strip()
    monkeypatch.chdir(runs / "one")
    exec(compile(code.replace('"the input"', "TEXT"), "card", "exec"), {"TEXT": "Anna painted the door."})
    printed = capsys.readouterr().out.strip()
    again = sapo("try", ".", "--task", TASKS[0], "--input", "Anna painted the door.", "--quiet")[1].strip()
    assert printed and again == printed


def test_faults_are_one_line(runs, sapo, tmp_path, monkeypatch):
    for arguments, words in (
        ((runs / "run",), ("adapter_config.json, got none", "sapo export")),
        ((tmp_path / "none",), ("none: expected a folder with adapter_config.json, got none",)),
        ((runs / "one",), ("--task: expected one of the 2 tasks", "got none", TASKS[0])),
        ((runs / "one", "--task", "x"), ("--task: ", "got 'x'", TASKS[1])),
        ((runs / "one", "--task", TASKS[0], "--input", " "), ("--input", "expected a text, got an empty one")),
        ((runs / "one", "--max-new-tokens", "0"), ("--max-new-tokens: expected at least 1, got 0",)),
        ((runs / "one", "--task", TASKS[0], "--input", "x", "--model", "tiny"), ("an adapter for this model",)),
    ):
        one_line_error(sapo("try", *arguments), *words)
    for data, fault in ((b"caf\xe9", "line 1: expected UTF-8 text, got byte 0xe9"), (b"x" * 101, "at most 100 bytes")):
        monkeypatch.setattr("sapo_kernels.files.MAX_BYTES", 100)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        one_line_error(sapo("try", runs / "one", "--task", TASKS[0]), "standard input: ", fault)
    monkeypatch.undo()
    one_line_error(sapo("export", tmp_path, "--out", tmp_path / "o"), "run.json")
    one_line_error(sapo("export", runs / "run", "--out", runs / "one"), "not there or is empty")
    one_line_error(sapo("export", runs / "run", "--out", "/proc/none"), "/proc/none")
    one_line_error(sapo("export", runs / "run"), "--out")


def test_a_layout_of_the_callers_is_kept_or_refused(runs, sapo, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "a")
    (tmp_path / "a" / "sapo_manifest.json").unlink()
    place = tmp_path / "a" / "sapo_prompts.json"
    record = json.loads(place.read_text())
    entry = record["tasks"] = {"t": dict(next(iter(record["tasks"].values())))}
    for template, word in (("{input} -> {prompt}", None), ("<layout>", "a function makes")):
        entry["t"]["template"] = template
        place.write_text(json.dumps(record))
        result = sapo("try", tmp_path / "a", "--input", "door", "--max-new-tokens", "1")
        if word is None:
            assert result[0] == 0 and f"door -> {entry['t']['prompt']}"[:40] in result[2]
        else:
            one_line_error(result, word)
    place.write_text('{"tasks": {"t": {"prompt": 3}}}')
    one_line_error(sapo("try", tmp_path / "a", "--input", "door"), "sapo_prompts.json", "'prompt'")
    place.unlink()
    one_line_error(sapo("try", tmp_path / "a", "--input", "door"), "expected an adapter with sapo_prompts.json")
