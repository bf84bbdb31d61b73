"""accumulate_ against torch's index_add_ and segment_reduce: the log-probabilities of a whole job summed by cell."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch

import sapo_kernels as sk

from ..registry import Op, Setting
from ..timing import Case
from ..workload import Cells


def make(setting: Setting, name: str, cells: Cells):
    cache, device = cells.cache(50257), setting.device
    trie = sk.plan_trie(cache.ids, cache.offsets, cache.context_lengths)
    draw = torch.Generator().manual_seed(0)
    logprob = -torch.rand(len(trie.targets), generator=draw).mul_(10)
    # Left to right in float64, in Python's own floats.
    values, where = logprob.double().tolist(), trie.cell_target.tolist()
    sums = [-sum(values[i] for i in where[a:b]) for a, b in itertools.pairwise(trie.cell_ptr.tolist())]
    exact = torch.tensor(sums, dtype=torch.float64)
    target, pointer = (torch.from_numpy(a).to(device) for a in (trie.cell_target, trie.cell_ptr))
    cell = torch.arange(len(exact), device=device).repeat_interleave(pointer.diff())
    case = Case(
        "accumulate", name, check=lambda out: float((out.cpu() - exact).abs().max()), tolerance=1e-9, rounds=30,
        shape=f"C={len(exact)} E={len(target)}", dtype="fp32 to fp64", work=len(target) * 12.0 + len(exact) * 24.0,
        work_unit="B", formula="12*E + 24*C", tokens=len(target), calls=1 if len(target) > 100_000 else 20,
    )  # fmt: skip
    return case, SimpleNamespace(logprob=logprob.to(device), target=target, pointer=pointer, cell=cell)


accumulate = Op(
    "accumulate", make, toy=(Cells(2, 3, 6, 10, 2),),
    cpu={
        "21x50, 4 tokens": (Cells(21, 50, 30, 40, 4),), "21x50, 64 tokens": (Cells(21, 50, 30, 40, 64),),
        "64x250, 4 tokens": (Cells(64, 250, 10, 10, 4),),
    },
    gpu={"21x250, 4 tokens": (Cells(21, 250),)},
)  # fmt: skip


def _zeros(x) -> torch.Tensor:
    return torch.zeros(len(x.pointer) - 1, dtype=torch.float64, device=x.pointer.device)


@accumulate.provider("ours")
def ours(x):
    def run():
        nll, tokens = _zeros(x), torch.zeros_like(x.pointer[1:])
        sk.accumulate_(nll, tokens, x.logprob, x.target, x.pointer)
        return nll

    return run


@accumulate.provider("index_add")
def index_add(x):
    return lambda: _zeros(x).index_add_(0, x.cell, -x.logprob.double()[x.target])


@accumulate.provider("segment_reduce")
def segment_reduce(x):
    return lambda: torch.segment_reduce(-x.logprob.double()[x.target], "sum", offsets=x.pointer)
