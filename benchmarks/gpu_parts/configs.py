"""Every candidate configuration of the two Triton kernels on this architecture, the one in use first.

A candidate is a provider like any other: its output is checked, and all of them take turns. One that does not compile
or needs more shared memory than the part has is named in the notes. The reason to change a `config` function is a row
here.
"""

from __future__ import annotations

import torch

from .. import attention, candidates, heads
from ..timing import Case, Provider, run_case
from ..workload import Cells
from . import Job
from .ops import TOY

# name: (q heads, kv heads, head_dim); (rows, vocabulary, hidden)
ATTENTION = {"8B": (32, 8, 128), "0.6B": (16, 8, 128), "head 64": (8, 4, 64), "head 256": (16, 8, 256)}
HEADS = {"8B 4k rows": (4096, 151936, 4096), "0.6B 4k rows": (4096, 151936, 1024), "8B 512 rows": (512, 151936, 4096)}


def capability(device: str) -> int:
    """10 * major + minor of an NVIDIA GPU, 0 elsewhere."""
    if device != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def with_candidates(job: Job, case: Case, options: list[dict[str, int]]) -> Case:
    """`case` with one provider for each configuration that runs; those tried when the time was over are left out."""
    op, ours, kept = case.op, case.providers["ours"].run, {}
    for number, chosen in enumerate(options):
        name = candidates.label(chosen) + (" in use" if number == 0 else "")
        if number and job.left <= 0:
            job.say(f"{case.op}, {case.name}: no time for {name}")
            continue

        def run(chosen=chosen):
            with candidates.in_use(op, chosen):
                return ours()

        try:
            error = case.check(run())
        except Exception as failure:  # what the compiler or the device refuses is the finding
            lines = str(failure).strip().splitlines() or ["no message"]
            job.say(f"{case.op}, {case.name}: {name}: {type(failure).__name__}: {lines[0][:160]}")
            continue
        if not error <= case.tolerance:
            raise RuntimeError(f"{case.op}, {case.name}: {name}: wanted within {case.tolerance}, got {error}")
        kept[name] = Provider(run, calls=1 if job.toy else 5, tokens=case.providers["ours"].tokens)
    case.providers, case.op = kept, f"{op} config"
    return case


def sweep(job: Job) -> None:
    dtype = torch.float32 if job.toy else torch.bfloat16
    part, impl = capability(job.device), "triton"
    jobs = [("tree_attention", name, shape) for name, shape in ATTENTION.items()]
    jobs += [("linear_logprob", name, shape) for name, shape in HEADS.items()]
    # The shapes that matter most first, of both kernels.
    jobs = sorted(jobs, key=lambda entry: list({**ATTENTION, **HEADS}).index(entry[1]) % len(ATTENTION))
    if job.toy:
        jobs = [("tree_attention", "toy", (4, 2, 16)), ("linear_logprob", "toy", (8, 300, 16))]
    end, each = job.seconds, job.seconds / len(jobs)
    for number, (op, name, shape) in enumerate(jobs):
        # Each shape has its share, so that the first does not take all of it for its candidates.
        job.seconds = min(end, (number + 1) * each)
        if job.left <= 0:
            job.say(f"no time for {op}, {name}")
            continue
        if op == "tree_attention":
            cells = TOY if job.toy else Cells(21, 8, 100, 80)
            case = attention.make_case(cells, name, shape, dtype, job.device, 7, flex="off", dense=False, impl=impl)
            options = candidates.attention(shape[2], dtype, part, job.toy)
        else:
            case = heads.make_case(name, *shape, dtype, job.device, 7, impl=impl)
            options = candidates.logprob(shape[2], dtype, part, job.toy)
        case.rounds = 1 if job.toy else 7
        rows = run_case(with_candidates(job, case, options), job.device, job.deadline)
        job.emit(rows)
        best, now = min(rows, key=lambda row: row.p50_s), rows[0]
        gain = f"{now.p50_s / best.p50_s:.2f}x of the one in use"
        job.say(f"{op}, {name}: best {best.provider}, {best.p50_s * 1e3:.3g} ms ({gain})")
    job.seconds = end
