"""The examples run as they stand, in a fresh process with no network; what one claims about time is measured."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.trainer.training_helpers import environment

EXAMPLES = ROOT / "examples"
NAMES = ("dpo_shared_prefix.py", "grpo_group.py", "hf_trainer.py", "plain_loop.py", "trl_sft.py")
# Seconds; the longest takes about 45 on one free core.
DEADLINE = 400


def run(name, *words: str, folder) -> str:
    command = [sys.executable, str(EXAMPLES / name), *words]
    # No proxy, no hub: any attempt to reach one fails at once instead of waiting.
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_PROXY": ""}
    # Two threads wait for each other where other tests run beside them, and shares of the time say nothing then.
    nowhere["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        command, env={**environment(), **nowhere}, cwd=folder, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_they_are_short_and_all_there():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(NAMES)
    for name in NAMES:
        assert len((EXAMPLES / name).read_text().splitlines()) < 60, name


def test_the_plain_loop_imports_sapo_kernels_alone():
    tree = ast.parse((EXAMPLES / "plain_loop.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "sapo_kernels" in modules and not any(module.startswith("sapo_peft") for module in modules)


def test_plain_loop(tmp_path):
    printed = run("plain_loop.py", folder=tmp_path)
    steps = [re.match(r"step (\d+): prompt (\d) of \[(.+)\]", line) for line in printed.splitlines()]
    assert [int(found[1]) for found in steps] == [0, 20, 40]
    for found in steps:
        losses = [float(x) for x in found[3].split(", ")]
        assert losses[int(found[2])] == min(losses)
    assert float(steps[2][3].split(", ")[0]) < float(steps[0][3].split(", ")[0]) - 1, "it learns"


def test_trl_sft(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    printed = run("trl_sft.py", "out", "4", folder=tmp_path)
    assert "SAPO: 1 scorings took" in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "sapo_prompts.json").read_text())["tasks"]


def test_the_overhead_of_the_trainer_example(tmp_path):
    """21 prompts, 64 examples, scored twice, four passes over 1,000 examples: below 15 % of what they take padded."""
    text = (EXAMPLES / "hf_trainer.py").read_text()
    assert "SapoConfig(every_steps" in text
    (tmp_path / "padded.py").write_text(
        text.replace("SapoConfig(every_steps", 'SapoConfig(packing="padded", every_steps')
    )
    # A busy moment of the machine during a scoring counts as overhead: over the bound, it is measured once more.
    for _ in range(2):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        printed = run(tmp_path / "padded.py", "out", folder=tmp_path)
        found = re.search(r"SAPO: 2 scorings took ([\d.]+) s of ([\d.]+) s \(([\d.]+)%\)", printed)
        assert found, printed[-2000:]
        print(f"overhead: {found[0]}")
        if float(found[3]) < 15:
            break
    state = json.loads((tmp_path / "out" / "checkpoint-500" / "trainer_state.json").read_text())
    history = state["stateful_callbacks"]["sapo"]["history"]
    assert [(scoring["step"], *map(len, scoring["losses"].values())) for scoring in history] == [(0, 21), (250, 21)]
    assert sum(scoring["seconds"] for scoring in history) == pytest.approx(float(found[1]), abs=0.02)
    assert float(found[3]) == pytest.approx(100 * float(found[1]) / float(found[2]), abs=0.1)
    assert float(found[3]) < 15
    assert (tmp_path / "out" / "sapo_prompts.json").is_file()
