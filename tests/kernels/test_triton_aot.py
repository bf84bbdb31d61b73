"""Every Triton kernel compiles for every target without spills and inside its shared memory; see tests/aot.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]


def run_aot(*options: str, interpret: bool = False) -> subprocess.CompletedProcess:
    """In a process of its own: this one may have the interpreter in the compiler's place."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, "-m", "tests.native.aot", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=570,
    )  # fmt: skip


def test_one_configuration_of_each_kernel():
    done = run_aot("--short")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "sm_80",
        "sm_90",
        "sm_100",
        "gfx942",
        "tree_attention careful",
        "tree_attention keys",
        "tree_attention sums",
        "linear_logprob merge",
        "linear_logprob gradient",
    ):
        assert word in done.stdout
    assert done.stdout.rstrip().endswith("44 compilations, 0 with complaints")


@pytest.mark.slow
def test_all_configurations():
    done = run_aot()
    assert done.returncode == 0, done.stdout + done.stderr


def test_refuses_the_interpreter():
    done = run_aot(interpret=True)
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr
