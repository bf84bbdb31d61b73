"""The compiled modules: found, refused or missing, and what is used then."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels import native

# Runs in a new process: state_dict after one update, a plan, and what was loaded.
REPORT = """
import json, torch, sapo_kernels as sk
from sapo_kernels import native
state = sk.PromptState(1, 3)
sk.reweight_(state, torch.tensor([3.0, 2.0, 4.0], dtype=torch.float64), torch.tensor([2, 2, 2]), temperature=0.5)
trie = sk.plan_trie([1, 2, 3, 1, 2, 4], [0, 3, 6], [1, 1])
print(json.dumps([native.status(), state.probs.tolist(), state.best.tolist(), len(trie)]))
"""


def report(folder: Path) -> tuple[list, str]:
    """What REPORT prints with the package that stands in `folder`, and its error output."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", REPORT], cwd=folder, env={**kept, "PYTHONPATH": str(folder)}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the installed package, free to be spoiled; its folder."""
    shutil.copytree(Path(sk.__file__).parent, tmp_path / "sapo_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def compiled_files(folder: Path) -> list[Path]:
    return sorted((folder / "sapo_kernels").glob("*.so"))


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """What the installed package reports."""
    folder = tmp_path_factory.mktemp("before")
    (folder / "sapo_kernels").symlink_to(Path(sk.__file__).parent)
    return report(folder)[0]


def test_without_compiled_modules_the_results_are_the_same(package, before):
    for path in compiled_files(package):
        path.unlink()
    after, errors = report(package)
    assert after[0] == {"_C": "not built", "_C_cuda": "not built", "_planner": "not built"}
    assert after[1][0] == pytest.approx(before[1][0], rel=1e-14)
    assert after[2:] == before[2:] and after[2] == [1]
    assert "WARNING" not in errors and "Traceback" not in errors


@pytest.mark.skipif(native.load("_C") != "loaded", reason="nothing is compiled here")
def test_a_module_that_was_cut_off_is_named_and_not_used(package, before):
    """The dynamic loader itself would die on it."""
    for path in compiled_files(package):
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    after, errors = report(package)
    for module in ("_C", "_planner"):
        assert after[0][module].startswith("does not load: "), after
        assert re.search(rf"{module} does not load", errors), errors
    assert after[2:] == before[2:]


@pytest.mark.skipif(native.load("_C") != "loaded", reason="nothing is compiled here")
def test_a_module_for_other_arguments_is_not_found(package):
    """A checkout that was pulled and not built again: its old modules must not be called with the new arguments."""
    source = package / "sapo_kernels" / "native.py"
    source.write_text(source.read_text().replace(f"\nABI = {native.ABI}\n", f"\nABI = {native.ABI + 1}\n"))
    status = report(package)[0][0]
    assert status["_C"] == "not built"
    assert status["_planner"] == f"built for interface {native.ABI}, expected {native.ABI + 1}: build it again"


@pytest.mark.skipif(native.load("_C") != "loaded", reason="nothing is compiled here")
def test_the_compiled_kernel_is_the_one_that_runs(monkeypatch):
    """The dispatcher prefers it: the plain one must not be reached."""
    monkeypatch.setattr("sapo_kernels.reweight.torch.reweight_torch", None)
    monkeypatch.setattr("sapo_kernels.accumulate.torch.accumulate_torch", None)
    state = sk.PromptState(1, 2)
    sk.reweight_(state, torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64))
    assert state.best.tolist() == [0]
    nll, tokens = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    sk.accumulate_(nll, tokens, torch.ones(1), torch.tensor([0]), torch.tensor([0, 1]))
    assert nll.tolist() == [-1.0]
