"""Each operator against its peers; the summary sets the rates against the ceilings measured in the same run."""

from __future__ import annotations

import gc

import torch

import sapo_kernels as sk

from .. import attention, heads, in_place, reweight
from ..bench_linear_logprob import GPU_CASES as HEADS
from ..bench_tree_attention import GPU_CASES as ATTENTION
from ..timing import Case, Provider
from ..workload import Cells
from . import Job
from .settle import measured, settle

# Calls in one timing: the device is waited for once, so a short kernel is not timed with the wait.
CALLS = 10
TOY = Cells(2, 2, 4, 6, 1)


def measure(job: Job, case: Case, calls: int = CALLS) -> None:
    """Measure the providers that can take part."""
    settle(job, case)
    for provider in case.providers.values():
        provider.calls = 1 if job.toy else calls
    case.rounds = 1 if job.toy else case.rounds
    job.emit(measured(job, case))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tree_attention(job: Job) -> None:
    for name, (cells, shape) in ATTENTION.items():
        if job.left <= 0:
            return job.miss(f"{name} and what comes after it")
        if job.toy:
            case = attention.make_case(TOY, name, (4, 2, 16), torch.float32, "cpu", impl="triton", flex="eager")
        else:
            case = attention.make_case(cells, name, shape, torch.bfloat16, "cuda", rounds=15)
        measure(job, case)
        del case
        _free()
        if job.toy:
            return


def linear_logprob(job: Job) -> None:
    for name, why in heads.left_out(job.device).items():
        job.say(f"{name}: {why}")
    for name, shape in HEADS.items():
        if job.left <= 0:
            return job.miss(f"{name} and what comes after it")
        if job.toy:
            case = heads.make_case(name, 8, 300, 16, torch.float32, "cpu", impl="triton")
        else:
            case = heads.make_case(name, *shape, torch.bfloat16, "cuda", rounds=15)
        measure(job, case)
        del case
        _free()
        if job.toy:
            return


def reweight_case(device: str) -> Case:
    """reweight_ and its maths in eager torch on the device, 8 pools of 32 prompts, compared in one update."""
    numbers, given = (0.9, 0.1, 0.05), reweight.losses(8, 32, 0)
    nll, tokens = (t.to(device) for t in given)

    def fresh():
        return sk.PromptState(8, 32, device=device)

    exact = sk.PromptState(8, 32)
    sk.reweight_(exact, *given, *numbers)
    wanted = exact.mean.nan_to_num(-1.0)

    def ours():
        state = fresh()
        sk.reweight_(state, nll, tokens, *numbers)
        return state.mean

    def composed():
        state = fresh()
        reweight.composed(*reweight.tensors(state), nll, tokens, *numbers)
        return state.mean

    return Case(
        "reweight", "8x32, a new state and one update", {"ours": Provider(ours), "composed": Provider(composed)},
        lambda mean: float((mean.cpu().nan_to_num(-1.0) - wanted).abs().max()), 1e-9, shape="pools=8 K=32",
        dtype="fp64", work=8 * 32 * 61.0, work_unit="B", formula="61 bytes a prompt, read and written", rounds=15,
    )  # fmt: skip


def in_place_ops(job: Job) -> None:
    cells = TOY if job.toy else Cells(21, 250)
    measure(job, in_place.accumulate_case("21x250, 4 tokens", cells, job.device, rounds=15))
    measure(job, reweight_case(job.device))
