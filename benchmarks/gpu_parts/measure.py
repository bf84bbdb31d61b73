"""The operators of the registry against their peers, and every candidate configuration of the Triton kernels.

The reason to change a `config` function is a row of `configurations`. The summary sets all rates against the ceilings
measured in the same run.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, wait

import torch

import sapo_kernels as sk

from .. import candidates, ops  # noqa: F401
from ..registry import OPS, Setting
from ..timing import Case, Disagreement, Provider
from ..workload import Cells
from . import Job, measured

# Calls in one timing: the device is waited for once, so a short kernel is not timed with the wait.
CALLS = 10
IN_USE = " in use"
TRIE = Cells(21, 8, 100, 80)
# What is tried of each kernel, the shapes that matter most first, as the op's `make` takes them.
SHAPES = (
    ("tree_attention", "8B", (TRIE, (32, 8, 128))),
    ("linear_logprob", "8B 4k rows", (4096, 151936, 4096)),
    ("tree_attention keys", "8B 64 rows", (Cells(1, 64), (32, 8, 128))),
    ("tree_attention queries", "8B 64 rows", (Cells(1, 64), (32, 8, 128))),
    ("tree_attention", "0.6B", (TRIE, (16, 8, 128))),
    ("linear_logprob", "0.6B 4k rows", (4096, 151936, 1024)),
    ("tree_attention", "head 64", (TRIE, (8, 4, 64))),
    ("linear_logprob", "8B 512 rows", (512, 151936, 4096)),
    ("tree_attention", "head 256", (TRIE, (16, 8, 256))),
)
TOY_SHAPES = tuple((kernel, "toy", OPS[candidates.TIMED.get(kernel, kernel)].toy) for kernel in candidates.KERNELS)
# Processes that compile at once; each holds a context and a head of its own on the device.
COMPILERS = 8


def operators(job: Job, *names: str) -> None:
    """Every case of some operations; a provider that cannot run here is named. A case that fails ends no other."""
    failed = []
    for op in names:
        for provider, why in OPS[op].left_out(job.device).items():
            job.say(f"{op}: {provider}: {why}")
        for name in OPS[op].names(job.setting):
            if job.cases and name not in job.cases:
                continue
            if job.left <= 0:
                job.miss(f"{op}: {name} and what comes after it")
                break
            try:
                case = OPS[op].build(name, job.setting)
                if job.device == "cuda":
                    case.rounds = 15
                    for provider in case.providers.values():
                        provider.calls = 1 if provider.repeats > 1 else CALLS
                case.rounds = 1 if job.toy else case.rounds
                measured(job, case)
            except Exception:  # of one case
                traceback.print_exc()
                failed.append(f"{op}: {name}")
            case = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def capability(device: str) -> int:
    """10 * major + minor of an NVIDIA GPU, 0 elsewhere."""
    if device != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def with_candidates(case: Case, kernel: str, options: list[dict[str, int]], calls: int) -> Case:
    """`case` with one provider for each configuration of a kernel instead of its own."""
    ours = case.providers["ours"]

    def provider(chosen: dict[str, int]) -> Provider:
        def run():
            with candidates.in_use(kernel, chosen):
                return ours.run()

        return Provider(run, calls, ours.tokens)

    names = [candidates.label(chosen) + ("" if number else IN_USE) for number, chosen in enumerate(options)]
    case.providers = {name: provider(chosen) for name, chosen in zip(names, options, strict=True)}
    case.op = f"{kernel} config"
    return case


def options_of(job: Job, kernel: str, shape: tuple) -> list[dict[str, int]]:
    """What is tried of a kernel: of the head's the hidden size decides, of the attention's the size of a head."""
    width = shape[-1] if kernel == "linear_logprob" else shape[-1][-1]
    return candidates.candidates(kernel, width, job.setting.dtype, capability(job.device), job.toy)


def call(kernel: str, shape: tuple, options: dict[str, int], device: str) -> None:
    """Run a kernel as `configurations` does, on zeros: what is compiled stays in Triton's cache on the disk."""
    dtype = Setting(device).dtype
    with candidates.in_use(kernel, options):
        if kernel == "linear_logprob":
            rows, vocabulary, hidden = shape
            h, weight = (torch.zeros(n, hidden, dtype=dtype, device=device) for n in (rows, vocabulary))
            sk.linear_logprob(h, weight, torch.arange(rows, device=device) % vocabulary, impl="triton")
            return
        (cells, (q_heads, kv_heads, width)), backward = shape, kernel in candidates.TIMED
        cache = cells.cache(50257)
        trie = sk.plan_trie(cache.ids, cache.offsets, cache.context_lengths)
        plan = trie.make_pass(0, len(trie)).to(device)
        q, k, v = (
            torch.zeros(len(trie), heads, width, dtype=dtype, device=device, requires_grad=backward)
            for heads in (q_heads, kv_heads, kv_heads)
        )
        out = sk.tree_attention(q, k, v, plan, impl="triton")
        if backward:
            out.backward(torch.zeros_like(out))


def compile_candidates(job: Job, shapes: tuple) -> None:
    """Every candidate beforehand, in parallel processes; what fails there is named when its turn comes."""
    began, work = time.monotonic(), [(*shape, o) for shape in shapes for o in options_of(job, shape[0], shape[2])]
    workers = 1 if job.toy else min(COMPILERS, os.cpu_count() or 1)
    # Spawned: a process with a CUDA context cannot be forked.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    waiting = [pool.submit(call, kernel, shape, options, job.device) for kernel, _, shape, options in work]
    done, late = wait(waiting, timeout=job.left / 2)
    pool.shutdown(wait=not late, cancel_futures=True)
    failed = sum(one.exception() is not None for one in done)
    took = f"by {workers} processes in {time.monotonic() - began:.0f} s"
    job.say(f"{len(done)} of {len(work)} candidates run beforehand {took}, {failed} of them failed")


def configurations(job: Job) -> None:
    """All candidates take turns; one that does not compile or has no room on the part is named in the notes."""
    setting, wrong = dataclasses.replace(job.setting, impl="triton"), []
    shapes = TOY_SHAPES if job.toy else SHAPES
    if job.left > 0:
        compile_candidates(job, shapes)
    for kernel, name, shape in shapes:
        if job.left <= 0:
            job.miss(f"{kernel}, {name}")
            continue
        case = OPS[candidates.TIMED.get(kernel, kernel)].build(name, setting, only=("ours",), shape=shape)
        case.rounds = 1 if job.toy else 7
        case = with_candidates(case, kernel, options_of(job, kernel, shape), calls=1 if job.toy else 5)
        rows = measured(job, case)
        wrong += [name for name, why in case.left_out.items() if isinstance(why, Disagreement)]
        best, now = min(rows, key=lambda row: row.p50_s), rows[0]
        gain = f"{now.p50_s / best.p50_s:.2f}x of the one in use"
        job.say(f"{kernel}, {name}: best {best.provider}, {best.p50_s * 1e3:.3g} ms ({gain})")
    if wrong:
        raise RuntimeError(f"configurations with wrong output: {', '.join(wrong)}")
