"""The operators of the registry against their peers, and every candidate configuration of the two Triton kernels.

The reason to change a `config` function is a row of `configurations`. The summary sets all rates against the ceilings
measured in the same run.
"""

from __future__ import annotations

import gc

import torch

from .. import candidates, ops  # noqa: F401
from ..registry import OPS, Setting
from ..timing import Case, Provider
from ..workload import Cells
from . import Job, measured, settle

# Calls in one timing: the device is waited for once, so a short kernel is not timed with the wait.
CALLS = 10
IN_USE = " in use"
TRIE = Cells(21, 8, 100, 80)
# What is tried, the shapes that matter most first, as the op's `make` takes them.
SHAPES = (
    ("tree_attention", "8B", (TRIE, (32, 8, 128))),
    ("linear_logprob", "8B 4k rows", (4096, 151936, 4096)),
    ("tree_attention", "0.6B", (TRIE, (16, 8, 128))),
    ("linear_logprob", "0.6B 4k rows", (4096, 151936, 1024)),
    ("tree_attention", "head 64", (TRIE, (8, 4, 64))),
    ("linear_logprob", "8B 512 rows", (512, 151936, 4096)),
    ("tree_attention", "head 256", (TRIE, (16, 8, 256))),
)
TOY_SHAPES = tuple((op, "toy", OPS[op].toy) for op in ("tree_attention", "linear_logprob"))


def setting_of(job: Job) -> Setting:
    """At toy size Triton's interpreter takes the place of the compiled kernels."""
    return Setting(job.device, job.toy, impl="triton" if job.toy else "auto")


def operators(job: Job, *names: str) -> None:
    """Every case of some operations; a provider that cannot run here is named."""
    setting = setting_of(job)
    for op in names:
        for provider, why in OPS[op].left_out(job.device).items():
            job.say(f"{op}: {provider}: {why}")
        for name in OPS[op].names(setting):
            if job.left <= 0:
                job.miss(f"{op}: {name} and what comes after it")
                break
            case = OPS[op].build(name, setting)
            settle(job, case)
            for provider in case.providers.values():
                provider.calls = 1 if job.toy or provider.repeats > 1 else CALLS
            case.rounds = 1 if job.toy else 15
            job.emit(measured(job, case))
            del case
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


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


def configurations(job: Job) -> None:
    """All candidates take turns; one that does not compile or has no room on the part is named in the notes."""
    setting, part, wrong = setting_of(job), capability(job.device), []
    setting.impl = "triton"
    shapes = TOY_SHAPES if job.toy else SHAPES
    end, each = job.seconds, job.seconds / len(shapes)
    for number, (op, name, shape) in enumerate(shapes):
        # Each shape has its share, so that the first does not take all of it for its candidates.
        job.seconds = min(end, (number + 1) * each)
        if job.left <= 0:
            job.miss(f"{op}, {name}")
            continue
        case = OPS[op].build(name, setting, only=("ours",), shape=shape)
        # Of the head's kernel the hidden size decides, of the attention's the size of a head.
        width = shape[-1][-1] if op == "tree_attention" else shape[-1]
        options = candidates.candidates(op, width, setting.dtype, part, job.toy)
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
