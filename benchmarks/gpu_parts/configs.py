"""Every candidate configuration of the two Triton kernels on this architecture, the one in use first.

A candidate is a provider like any other: its output is checked, and all of them take turns. One that does not compile
or needs more shared memory than the part has is named in the notes. The reason to change a `config` function is a row
here.
"""

from __future__ import annotations

import torch

from .. import attention, candidates, heads
from ..timing import Case, Provider
from ..workload import Cells
from . import Job
from .ops import TOY
from .settle import measured, settle

IN_USE = " in use"

# What is tried, the shapes that matter most first: (q heads, kv heads, head_dim) or (rows, vocabulary, hidden).
SHAPES = (
    ("tree_attention", "8B", (32, 8, 128)),
    ("linear_logprob", "8B 4k rows", (4096, 151936, 4096)),
    ("tree_attention", "0.6B", (16, 8, 128)),
    ("linear_logprob", "0.6B 4k rows", (4096, 151936, 1024)),
    ("tree_attention", "head 64", (8, 4, 64)),
    ("linear_logprob", "8B 512 rows", (512, 151936, 4096)),
    ("tree_attention", "head 256", (16, 8, 256)),
)
TOY_SHAPES = (("tree_attention", "toy", (4, 2, 16)), ("linear_logprob", "toy", (8, 300, 16)))


def capability(device: str) -> int:
    """10 * major + minor of an NVIDIA GPU, 0 elsewhere."""
    if device != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def with_candidates(case: Case, options: list[dict[str, int]], calls: int) -> Case:
    """`case` with one provider for each configuration instead of its own."""
    op, ours = case.op, case.providers["ours"]

    def provider(chosen: dict[str, int]) -> Provider:
        def run():
            with candidates.in_use(op, chosen):
                return ours.run()

        return Provider(run, calls, ours.tokens)

    names = [candidates.label(chosen) + ("" if number else IN_USE) for number, chosen in enumerate(options)]
    case.providers = {name: provider(chosen) for name, chosen in zip(names, options, strict=True)}
    case.op = f"{op} config"
    return case


def sweep(job: Job) -> None:
    dtype = torch.float32 if job.toy else torch.bfloat16
    part, impl, wrong = capability(job.device), "triton", []
    shapes = TOY_SHAPES if job.toy else SHAPES
    end, each = job.seconds, job.seconds / len(shapes)
    for number, (op, name, shape) in enumerate(shapes):
        # Each shape has its share, so that the first does not take all of it for its candidates.
        job.seconds = min(end, (number + 1) * each)
        if job.left <= 0:
            job.miss(f"{op}, {name}")
            continue
        if op == "tree_attention":
            cells = TOY if job.toy else Cells(21, 8, 100, 80)
            case = attention.make_case(cells, name, shape, dtype, job.device, 7, flex="off", dense=False, impl=impl)
            options = candidates.attention(shape[2], dtype, part, job.toy)
        else:
            case = heads.make_case(name, *shape, dtype, job.device, 7, impl=impl)
            options = candidates.logprob(shape[2], dtype, part, job.toy)
        case.rounds = 1 if job.toy else 7
        case = with_candidates(case, options, calls=1 if job.toy else 5)
        wrong += settle(job, case, must=next(iter(case.providers)))
        rows = measured(job, case)
        job.emit(rows)
        best, now = min(rows, key=lambda row: row.p50_s), rows[0]
        gain = f"{now.p50_s / best.p50_s:.2f}x of the one in use"
        job.say(f"{op}, {name}: best {best.provider}, {best.p50_s * 1e3:.3g} ms ({gain})")
    job.seconds = end
    if wrong:
        raise RuntimeError(f"configurations with wrong output: {', '.join(wrong)}")
