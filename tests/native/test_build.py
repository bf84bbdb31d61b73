"""csrc/build_native.py: its switches, and what a failed or killed build leaves behind. Needs the checkout."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))

import build_native  # noqa: E402
from build_native import BuildError, Options  # noqa: E402

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


def sources(tmp_path: Path, monkeypatch) -> Path:
    """A copy of csrc/ to be spoiled, which build_native then compiles."""
    copy = shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build_native, "SOURCES", copy)
    return copy


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SAPO_BUILD_CUDA", "maybe", "auto, on or off, got 'maybe'"),
        ("SAPO_CUDA_ARCHS", "sm_90", "numbers like .*, got 'sm_90'"),
    ],
)
def test_switches_say_what_they_want(monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    with pytest.raises(BuildError, match=expected) as raised:
        Options()
    assert name in str(raised.value)


def test_cuda_on_without_nvcc_is_an_error_and_auto_is_not(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(BuildError, match="SAPO_BUILD_CUDA=on: expected nvcc"):
        Options(cuda="on")
    assert build_native.modules(Options(cuda="auto")) == build_native.modules(Options(cuda="off")) == ["_C", "_planner"]


def test_architectures_become_machine_code_and_ptx():
    flags = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90a,code=compute_90a"]
    assert build_native.gencode("80;90a+PTX") == [f"-gencode={flag}" for flag in flags]


@needs_compiler
def test_a_failed_build_says_so_and_leaves_no_module(tmp_path, monkeypatch):
    copy, out = sources(tmp_path, monkeypatch), tmp_path / "out"
    good = (copy / "reweight.cpp").read_text()
    (copy / "reweight.cpp").write_text(good + "\nthis is no C++\n")
    with pytest.raises(BuildError, match="_C could not be compiled; SAPO_BUILD_NATIVE=off") as raised:
        build_native.build(out, Options(cuda="off"), ["_C"])
    assert "this is no C++" in str(raised.value) or "does not name a type" in str(raised.value)
    (copy / "reweight.cpp").write_text("// no kernel\n")
    with pytest.raises(BuildError, match="undefined reference to .*run_cpu"):
        build_native.build(out, Options(cuda="off"), ["_C"])
    assert not list(out.rglob("*.so"))
    (copy / "reweight.cpp").write_text(good)
    assert build_native.build(out, Options(cuda="off"), ["_C"])["_C"].stat().st_size > 10_000


@needs_compiler
def test_a_killed_build_blocks_nothing(tmp_path):
    """SIGKILL while it compiles; the next one finds no lock and builds all of it."""
    out = tmp_path / "out"
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'csrc')!r}); import build_native as b; "
    code += f"b.build({str(out)!r}, b.Options(cuda='off'), ['_C'])"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not (out / "build.ninja").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    # The whole group: the compilers must not finish behind the builder's back.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    built = build_native.build(out, Options(cuda="off"), ["_C"])["_C"]
    assert subprocess.run(["nm", "-D", built], capture_output=True).returncode == 0
    assert not list(out.glob("*.part"))


def test_a_module_is_installed_whole_or_not_at_all(tmp_path, monkeypatch):
    source, target = tmp_path / "new.so", tmp_path / "package" / "_C.so"
    source.write_bytes(b"new" * 1000)
    target.parent.mkdir()
    target.write_bytes(b"old")

    def broken(*_):
        raise OSError("disk full")

    with monkeypatch.context() as context:
        context.setattr(shutil, "copyfileobj", broken)
        with pytest.raises(OSError, match="disk full"):
            build_native.install(source, target)
    assert target.read_bytes() == b"old" and list(target.parent.iterdir()) == [target]
    build_native.install(source, target)
    assert target.read_bytes() == source.read_bytes() and list(target.parent.iterdir()) == [target]


def test_setup_refuses_an_unknown_switch():
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env={**os.environ, "SAPO_BUILD_NATIVE": "perhaps"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0 and "SAPO_BUILD_NATIVE: expected on or off, got 'perhaps'" in done.stderr
