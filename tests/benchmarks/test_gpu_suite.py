"""The GPU suite at toy size: every part starts, a part that fails or hangs takes nothing with it, the time holds."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import candidates, gpu_parts, gpu_suite
from benchmarks.gpu_parts import machine
from benchmarks.registry import Setting
from benchmarks.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]
# Those that measure; "build", "tests" and "sanitizer" start processes of their own and are in the slow test.
MEASURING = [
    "ceilings", "tree_attention", "linear_logprob", "in_place", "small_model", "large_model", "training", "configs",
]  # fmt: skip


@pytest.fixture
def in_this_process(monkeypatch):
    """Parts of the suite, which then cannot be ended: a failure is their status."""

    def run(name, options, seconds, limit) -> str:
        with open(options.out / "logs" / f"{name}.log", "w+") as log, contextlib.redirect_stdout(log):
            try:
                gpu_parts.run_part(name, gpu_suite.job_of(name, options, seconds))
            except Exception as error:
                return f"failed ({type(error).__name__}: {error})"
            log.seek(0)
            return log.read().rpartition(gpu_parts.STATUS)[2].strip()

    monkeypatch.setattr(gpu_suite, "run_part_apart", run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="toy size is for the Triton interpreter, which is off with a GPU")
def test_every_measuring_part_starts(tmp_path, capsys, monkeypatch, in_this_process):
    pytest.importorskip("triton")
    monkeypatch.setitem(gpu_parts.PARTS, "in_place", ("measure.no_such_function", 0.03, ()))
    out = tmp_path / "out"
    code = gpu_suite.main(["--toy", "--minutes", "60", "--out", str(out), "--only", *MEASURING])
    assert code == 1, "a failed part shows in the exit status"
    ops = {row.op for row in read_rows(out / "rows.csv")}
    assert ops == {
        "ceiling", "tree_attention", "linear_logprob", "linear_logprob_backward", "end_to_end", "tree_attention config",
        "tree_attention queries config", "tree_attention keys config", "linear_logprob config",
        "tree_attention_backward", "training step",
    }  # fmt: skip
    summary = (out / "summary.md").read_text()
    for name in MEASURING:
        assert f"| {name} | {'failed (AttributeError' if name == 'in_place' else 'passed |'}" in summary
    assert "best 32x16 w1 s1 in use" in summary or "best 16x16 w1 s1" in summary
    assert "operators of one call" in summary
    tried = sum(row.op.endswith(" config") for row in read_rows(out / "rows.csv"))
    assert f"{tried} of {tried} candidates run beforehand by 1 processes" in summary and ", 0 of them failed" in summary
    with pytest.raises(SystemExit):
        gpu_suite.main(["--toy", "--out", str(out)])
    assert "without earlier rows" in capsys.readouterr().err


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path):
    log = tmp_path / "part.log"
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '300']).pid, flush=True); time.sleep(300)"
    started = time.monotonic()
    status = gpu_suite.run_apart([sys.executable, "-c", code], log, 3.0)
    assert status == "ended after 3 s" and time.monotonic() - started < 30
    grandchild = int(log.read_text().split()[0])
    for _ in range(100):
        if not alive(grandchild):
            break
        time.sleep(0.05)
    assert not alive(grandchild)
    assert gpu_suite.run_apart([sys.executable, "-c", "raise SystemExit(3)"], log, 30.0).startswith("failed (exit 3")
    assert gpu_suite.run_apart([sys.executable, "-c", "print('well')"], log, 30.0) == "passed"


def test_the_suite_ends_in_time(tmp_path, monkeypatch, capsys):
    """With parts that would all run for ever: each is ended after its share, the rest is said to have had no time."""
    monkeypatch.setattr(gpu_suite, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(gpu_suite, "part_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(300)"])
    started = time.monotonic()
    code = gpu_suite.main(
        ["--toy", "--minutes", "0.2", "--out", str(tmp_path), "--only", "ceilings", "configs", "tests"]
    )
    assert code == 1 and time.monotonic() - started < 14
    printed = capsys.readouterr().out
    assert printed.count("ended after") >= 1 and (tmp_path / "summary.md").exists()
    for wrong in (["--minutes", "0"], ["--minutes", "nan"], ["--minutes", "inf"], ["--data", str(tmp_path)]):
        with pytest.raises(SystemExit):
            gpu_suite.main([*wrong, "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("compiler", [None, "/bin/true", "/bin/false"], ids=["no nvcc", "nvcc", "nvcc that fails"])
def test_a_part_that_could_not_do_its_job_does_not_pass(compiler, tmp_path, monkeypatch, in_this_process):
    """Skipped for a tool that the machine does not have, failed for one that does not do."""
    monkeypatch.setattr(machine.shutil, "which", lambda name, path=None: compiler if name == "nvcc" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def run(job, command, seconds, **environment):
        return int(environment.get("SAPO_BUILD_CUDA") == "on" and compiler == "/bin/false"), "the end\n"

    monkeypatch.setattr(machine, "_run", run)
    code = gpu_suite.main(["--out", str(tmp_path), "--only", "build", "tests", "sanitizer"])
    summary = (tmp_path / "summary.md").read_text()
    build = {
        None: "skipped: the CUDA kernels, for nvcc is not installed", "/bin/true": "passed |",
        "/bin/false": "failed (RuntimeError",
    }  # fmt: skip
    assert f"| build | {build[compiler]}" in summary and code == (compiler == "/bin/false")
    assert "| sanitizer | skipped: compute-sanitizer is not installed |" in summary
    assert "| tests | skipped: no test ran (the end) |" in summary


def test_what_had_no_time_does_not_pass(tmp_path, monkeypatch, capsys):
    assert gpu_suite.main(["--toy", "--minutes", "0.15", "--out", str(tmp_path), "--only", "ceilings", "configs"]) == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "| ceilings | not run: no time left | 0 |" in summary and "| configs | not run: no time left |" in summary
    setting = Setting(toy=True)
    for rows, status in (
        (tmp_path / "x.csv", "not run: no time left"),
        (tmp_path / "summary.md", "passed in part: no"),
    ):
        job = gpu_parts.Job(setting, 0.0, rows)
        capsys.readouterr()
        gpu_parts.run_part("configs", job)
        assert f"status: {status}" in capsys.readouterr().out and len(job.missed) == 4
    # One that ends well and says nothing has not passed either.
    monkeypatch.setattr(gpu_suite, "part_command", lambda *_: [sys.executable, "-c", "pass"])
    assert gpu_suite.main(["--toy", "--out", str(tmp_path / "x"), "--only", "ceilings"]) == 1


def test_candidates_begin_with_what_is_in_use_and_put_it_back():
    pytest.importorskip("triton")
    from sapo_kernels.tree_attention import triton as attention

    own = attention.config
    for kernel in candidates.KERNELS:
        made = [candidates.label(options) for options in candidates.candidates(kernel, 128, torch.bfloat16, 90)]
        assert len(set(made)) == len(made) > 4
    assert candidates.candidates("tree_attention", 128, torch.bfloat16, 90)[0] == own(128, torch.bfloat16, 90)
    with pytest.raises(ZeroDivisionError), candidates.in_use("tree_attention", {"BLOCK_M": 1}):
        assert attention.config(1, 2, 3) == {"BLOCK_M": 1}
        raise ZeroDivisionError
    assert attention.config is own


def test_the_files_with_gpu_tests_are_found():
    files = machine.gpu_test_files()
    assert {
        f"tests/kernels/test_{op}.py" for op in ("tree_attention", "linear_logprob", "accumulate", "reweight")
    } <= set(files)
    assert "tests/system/test_readme.py" not in files


@pytest.mark.slow
def test_every_part_starts_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--toy", "--minutes", "9", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == len(gpu_parts.PARTS)
