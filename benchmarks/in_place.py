"""accumulate_, reweight_ and the planner as cases: what else gives the same numbers, checked in the same run."""

from __future__ import annotations

import numpy as np
import torch

import sapo_kernels as sk
from sapo_kernels import native, plan_trie
from sapo_kernels.trie.numpy_planner import plan_numpy

from . import planner, reweight
from .timing import Case, Provider
from .workload import Cells


def accumulate_case(name: str, cells: Cells, device: str = "cpu", rounds: int = 30) -> Case:
    """Log-probabilities of a whole job summed by cell: the operator, and torch's own index_add_ and segment_reduce."""
    cache = cells.cache(50257)
    trie = plan_trie(cache.ids, cache.offsets, cache.context_lengths)
    draw = torch.Generator().manual_seed(0)
    logprob = -torch.rand(len(trie.targets), generator=draw).mul_(10).to(device)
    target, pointer = (torch.from_numpy(a).to(device) for a in (trie.cell_target, trie.cell_ptr))
    count = len(pointer) - 1
    cell = torch.arange(count, device=device).repeat_interleave(pointer.diff())
    # Left to right in float64, in Python's own floats.
    values, where, edges = logprob.double().tolist(), trie.cell_target.tolist(), trie.cell_ptr.tolist()
    sums = [-sum(values[i] for i in where[a:b]) for a, b in zip(edges, edges[1:])]  # noqa: B905 (pairs of neighbours)
    exact = torch.tensor(sums, dtype=torch.float64)

    def ours():
        nll, tokens = torch.zeros(count, dtype=torch.float64, device=device), torch.zeros_like(pointer[1:])
        sk.accumulate_(nll, tokens, logprob, target, pointer)
        return nll

    def index_add():
        return torch.zeros(count, dtype=torch.float64, device=device).index_add_(0, cell, -logprob.double()[target])

    def segment_reduce():
        return torch.segment_reduce(-logprob.double()[target], "sum", offsets=pointer)

    calls = 1 if len(target) > 100_000 else 20
    providers = {f.__name__: Provider(f, calls, len(target)) for f in (ours, index_add, segment_reduce)}
    return Case(
        "accumulate", name, providers, lambda out: float((out.cpu() - exact).abs().max()), 1e-9, rounds=rounds,
        shape=f"C={count} E={len(target)}", dtype="fp32 to fp64", work=len(target) * 12.0 + count * 24.0, work_unit="B",
        formula="12*E + 24*C",
    )  # fmt: skip


def reweight_case(name: str, pools: int, prompts: int, rounds: int = 100) -> Case:
    """One update of all pools on the CPU; the operator, eager torch, and the operator without any pool."""
    shape = (pools, prompts, 0.9, 0.1, 0.05)
    worst = reweight.check(*shape)
    runs = reweight.providers(*shape)
    providers = {n: Provider(run, reweight.CALLS[n], pools * prompts) for n, run in runs.items()}
    providers["ours"] = providers.pop("operator")
    providers["empty"].note = "0 pools: what a call costs"
    # The states move on with every call; the numbers were compared over ten updates just now.
    return Case(
        "reweight", name, providers, lambda _: worst, reweight.TOLERANCE, shape=f"pools={pools} K={prompts}",
        dtype="fp64", work=pools * prompts * 61.0, work_unit="B", formula="61 bytes a prompt, read and written",
        rounds=rounds,
    )  # fmt: skip


def planner_case(name: str, tokens: int, rounds: int = 9) -> Case:
    """`plan_trie` against the numpy planner on one job of 21 prompts."""
    job = planner.make_job(tokens)
    wanted = plan_numpy(*job)

    def check(plan) -> float:
        planner.check(plan, wanted) if not isinstance(plan, dict) else None
        same = all(np.array_equal(plan[n], v) for n, v in wanted.items()) if isinstance(plan, dict) else True
        return 0.0 if same else float("inf")

    dense = len(job[0])
    providers = {"numpy": Provider(lambda: plan_numpy(*job), tokens=dense)}
    if native.planner() is not None:
        providers = {"ours": Provider(lambda: plan_trie(*job), tokens=dense), **providers}
    unique = len(wanted["tokens"])
    return Case(
        "planner", name, providers, check, 0.0, shape=f"dense={dense} trie={unique}", dtype="int64",
        work=8.0 * dense + 16.0 * unique, work_unit="B", formula="8*dense tokens read + 16*trie tokens written",
        rounds=rounds,
    )  # fmt: skip
