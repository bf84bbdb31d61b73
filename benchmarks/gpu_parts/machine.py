"""What the machine does: the build, the tests marked gpu, the two ceilings, compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from .. import ops  # noqa: F401
from ..registry import OPS, Setting
from ..rows import ROOT
from ..timing import Case, Provider, run_case
from ..workload import Cells
from . import Job, Skipped, measured


def _run(job: Job, command: list[str], seconds: float, **environment: str) -> tuple[int | str, str]:
    """(exit code, or why there is none; the end of its output) of a command in the checkout."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, timeout=max(5.0, seconds), text=True,
            errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        return "out of time", (output.decode("utf-8", "replace") if isinstance(output, bytes) else output)[-6000:]
    except OSError as error:
        return type(error).__name__, str(error)
    print(done.stdout[-20000:], flush=True)
    return done.returncode, done.stdout[-6000:]


def build(job: Job) -> None:
    """The native modules, in place, without the CUDA kernels where those fail; toy: only that the builder starts."""
    if job.toy:
        code, output = _run(job, [sys.executable, "csrc/build_native.py", "--help"], job.left)
        if code != 0:
            raise RuntimeError(f"the builder ended with {code}: {_last(output)}")
        return
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    ways, failed = (["on"] if compiler else []) + ["off"], []
    home = {"CUDA_HOME": str(Path(compiler).parents[1])} if compiler else {}
    major, minor = torch.cuda.get_device_capability()
    for cuda in ways:
        wanted = {**home, "SAPO_BUILD_CUDA": cuda, "SAPO_CUDA_ARCHS": f"{major}{minor}"}
        code, output = _run(job, [sys.executable, "setup.py", "build_ext", "--inplace"], job.left, **wanted)
        if code == 0:
            break
        failed.append(f"the build with CUDA kernels {cuda} ended with {code}: {_last(output)}")
    _, output = _run(job, [sys.executable, "-c", "import sapo_kernels.native as n; print(n.status())"], 60.0)
    job.say(f"native modules: {_last(output)}")
    if failed:
        raise RuntimeError("; ".join(failed))
    if not compiler:
        raise Skipped("the CUDA kernels, for nvcc is not installed; the others were built")


def gpu_test_files() -> list[str]:
    """Test files with something for a GPU; the others may import packages that the machine does not have."""
    named = re.compile(r"mark\.gpu|^def test_.*\bdevice\b|native_cases", re.MULTILINE)
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if named.search(path.read_text(encoding="utf-8"))]


def tests(job: Job) -> None:
    """``pytest -m gpu``; toy: that it collects one file."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--maxfail=40"]
    # Where pytest-timeout is not installed its option is unknown, and the project's own `addopts` make that an error.
    command += ["-o", "addopts=", "-o", "timeout=100"]
    command += ["--collect-only", "tests/kernels/test_reweight.py"] if job.toy else gpu_test_files()
    code, output = _run(job, command, job.left)
    failed = re.findall(r"^(?:FAILED|ERROR) .*", output, re.MULTILINE)
    for line in failed[:20]:
        job.say(line[:300])
    job.say(f"pytest -m gpu: exit {code}: {_last(output)}")
    if code != 0:
        raise RuntimeError(f"pytest ended with {code}")
    if not job.toy and not re.search(r"\b[1-9]\d* passed", output):
        raise Skipped(f"no test ran ({_last(output)})")


def ceilings(job: Job) -> None:
    """Bytes a second of a large copy (read plus written), bf16 operations a second of a large product."""
    measured(job, _copy(job))
    measured(job, _product(job))


def _copy(job: Job) -> Case:
    count = 1 << (30 if job.device == "cuda" else 16)
    draw = torch.Generator(job.device).manual_seed(0)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=job.device, generator=draw)
    target = torch.zeros_like(source)
    return Case(
        "ceiling", "copy", {"torch": Provider(lambda: target.copy_(source), 10)},
        lambda out: 0.0 if torch.equal(out, source) else float("inf"), 0.0, shape=f"bytes={count}", dtype="uint8",
        work=2.0 * count, work_unit="B", formula="read + written", rounds=9,
    )  # fmt: skip


def _product(job: Job) -> Case:
    width = 8192 if job.device == "cuda" else 64
    draw = torch.Generator(job.device).manual_seed(0)
    a, b = (torch.randn(width, width, device=job.device, generator=draw).bfloat16() for _ in range(2))
    expected = a[:4].double() @ b.double()

    def error(out: torch.Tensor) -> float:
        return float((out[:4].double() - expected).norm() / expected.norm())

    return Case(
        "ceiling", "matmul", {"torch": Provider(lambda: a @ b, 10)}, error, 1e-2, shape=f"N={width}", dtype="bf16",
        work=2.0 * width**3, formula="2*N^3", rounds=9,
    )  # fmt: skip


def every_kernel(device: str) -> None:
    """One small checked call of each, for compute-sanitizer."""
    cells, setting = Cells(2, 2, 4, 6, 1), Setting(device, impl="triton")
    shapes = {
        "tree_attention": (cells, (4, 2, 64)), "linear_logprob": (40, 300, 64), "accumulate": (cells,),
        "reweight": (4, 21),
    }  # fmt: skip
    for op, shape in shapes.items():
        case = OPS[op].build("sanitized", setting, only=("ours",), shape=shape)
        case.calls = case.rounds = 1
        run_case(case, device)
    print(f"{len(shapes)} operators ran and agreed")


def sanitizer(job: Job) -> None:
    """memcheck and racecheck over one small call of every kernel; toy: the calls without the tool."""
    code = f"from benchmarks.gpu_parts.machine import every_kernel; every_kernel({job.device!r})"
    calls = [sys.executable, "-c", code]
    if job.toy:
        code, output = _run(job, calls, job.left)
        if code != 0:
            raise RuntimeError(f"the calls alone ended with {code}: {_last(output)}")
        job.say(f"the calls alone: {_last(output)}")
        return
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        raise Skipped("compute-sanitizer is not installed")
    failed = []
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *calls]
        code, output = _run(
            job, command, job.left / (2 if check == "memcheck" else 1), PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        summary = re.findall(r"={5,} (ERROR SUMMARY.*|RACECHECK SUMMARY.*)", output)
        job.say(f"{check}: exit {code}; {summary[-1] if summary else _last(output)}")
        failed += [check] if code != 0 else []
    if failed:
        raise RuntimeError(f"{', '.join(failed)}: see the notes")


def _last(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing"
