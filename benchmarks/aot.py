"""What every kernel configuration takes of each NVIDIA part, ahead of time: the stand-in for a GPU.

    python -m benchmarks.aot                   # compile, print, and write benchmarks/results/aot.csv
    python -m benchmarks.aot --check           # compile and compare with the committed rows
    python -m benchmarks.aot --candidates      # also the configurations that the GPU suite would try on sm_90

Registers, spills and shared memory are the compiler's. "warps" is the bound that they put on the warps resident on a
multiprocessor, out of what it can hold: few warps are no fault of a kernel whose matrix instructions are asynchronous,
but a bound that falls without a reason is. Tables in docs/measured.md are made of the rows by tables.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sapo_kernels.files import atomic_write

from .rows import RESULTS, csv_text, read_csv, version

PATH = RESULTS / "aot.csv"
# CUDA programming guide, "technical specifications": registers, shared KiB (1 KiB a block is the system's), warps and
# blocks of a multiprocessor.
PARTS = {
    "sm_80": (65536, 164, 64, 32),
    "sm_89": (65536, 100, 48, 24),
    "sm_90": (65536, 228, 64, 32),
    "sm_100": (65536, 228, 64, 32),
    "sm_120": (65536, 100, 48, 24),
}
# Registers are handed out to warps in units of 256.
REGISTER_UNIT = 256


@dataclass(frozen=True)
class Use:
    """One configuration on one part. spills and shared in bytes; warps: resident ones at most; role: "in use" or
    "candidate"; complaint: why it is unfit, empty if it is not."""

    kernel: str
    shape: str
    target: str
    configuration: str
    role: str
    registers: int
    spills: int
    shared: int
    threads: int
    warps: int
    warps_of: int
    limited_by: str
    complaint: str
    triton: str


def occupancy(target: str, registers: int, shared: int, threads: int) -> tuple[int, int, str]:
    """(resident warps at most, what the part can hold, what limits them) of one multiprocessor."""
    file, shared_kib, most_warps, most_blocks = PARTS[target]
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    blocks = {
        "registers": file // (of_a_warp * warps) if registers else most_blocks,
        "shared memory": shared_kib * 1024 // (shared + 1024),
        "warps": most_warps // warps,
        "blocks": most_blocks,
    }
    limit = min(blocks, key=lambda name: blocks[name])
    return blocks[limit] * warps, most_warps, limit


def read_uses(path: Path = PATH) -> list[Use]:
    """The rows of a file; `DataError` names line and column of what does not fit."""
    return [Use(**row) for row in read_csv(path, Use)]


def _options_of(job) -> dict:
    from tests.native.aot import KERNELS

    return KERNELS[job.kernel][0](job.shape, job.capability)[3]


def _describe(options: dict) -> str:
    from .candidates import label

    return label({"num_warps": 4, "num_stages": 1, **options})


def _compiled(work: tuple) -> Use:
    """(job of tests.native.aot, options or None for those in use) -> what it takes. Runs in a process of its own."""
    from contextlib import nullcontext

    from tests.native.aot import build

    from .candidates import in_use

    job, options = work
    with in_use(job.kernel, options) if options is not None else nullcontext():
        chosen = _options_of(job)
        row = build(job)
    threads = 32 * chosen.get("num_warps", 4)
    warps, most, limit = (0, PARTS[job.target][2], "")
    if row.registers:
        warps, most, limit = occupancy(job.target, row.registers, row.shared, threads)
    return Use(
        job.kernel, job.label(), job.target, _describe(chosen), "in use" if options is None else "candidate",
        row.registers, row.spills, row.shared, threads, warps, most, limit, row.complaint, version("triton"),
    )  # fmt: skip


def work_list(with_candidates: bool, target: str = "sm_90") -> list[tuple]:
    """Every compilation of tests.native.aot for NVIDIA parts; then the candidates of the suite's shapes on `target`."""
    import torch

    from tests.native.aot import Job, jobs

    from .candidates import candidates

    listed = [(job, None) for job in jobs() if job.target in PARTS]
    if with_candidates:
        capability = int(target[3:])
        for shape in (("bf16", 128, 128, 4, ""), ("bf16", 64, 64, 2, "")):
            for kernel in ("tree_attention", "tree_attention queries", "tree_attention keys"):
                for options in candidates(kernel, shape[1], torch.bfloat16, capability)[1:]:
                    listed.append((Job(kernel, shape, target), options))
        for options in candidates("linear_logprob", 4096, torch.bfloat16, capability)[1:]:
            listed.append((Job("linear_logprob", ("bf16", 4096, "d"), target), options))
    return listed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a committed row differs")
    parser.add_argument("--candidates", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET, the interpreter replaces the compiler")
    listed = work_list(options.candidates)
    uses = []
    # Spawned, because forking a process that runs LLVM's threads is unsafe.
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for use in pool.map(_compiled, listed):
            uses.append(use)
            print(f"{use.kernel:24} {use.shape:24} {use.target:7} {use.configuration:22} {use.registers:4} "
                  f"{use.spills:4} {use.shared / 1024:6.1f} KiB {use.warps:2}/{use.warps_of} {use.limited_by:14} "
                  f"{use.role} {use.complaint}".rstrip(), flush=True)  # fmt: skip
    bad = [use for use in uses if use.role == "in use" and use.complaint]
    if options.check:
        committed = read_uses(options.out)
        differing = [use for use in uses if use not in committed]
        for use in differing:
            print(f"not the committed row: {use}")
        return 1 if differing or bad else 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(options.out, csv_text(uses))
    print(f"{options.out}: {len(uses)} rows, {len(bad)} unfit")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
