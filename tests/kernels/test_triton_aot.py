"""Every Triton kernel compiles for every target, without spills, inside its shared memory: tests/native/aot.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]


def run_aot(*options: str, interpret: str) -> subprocess.CompletedProcess:
    """In a process of its own: this one may have the interpreter in the compiler's place."""
    return subprocess.run(
        [sys.executable, "-m", "tests.native.aot", *options],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": interpret}, capture_output=True, text=True, timeout=570,
    )  # fmt: skip


def test_every_configuration_in_use():
    done = run_aot(interpret="0")
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.endswith(", 0 with complaints") and int(last.split()[0]) > 250, last


def test_refuses_the_interpreter():
    done = run_aot(interpret="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr
