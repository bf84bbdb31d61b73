"""The cost model's formulas against counted operations and weights, and docs/scaling.md against the command."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost_model
from benchmarks.cost_model import Job, Machine, Model, operations, predict
from benchmarks.workload import Cells, qwen3_shaped
from tests.conftest import ROOT

MACHINE = Machine(matmul=1e12, copy=1e11)
SHAPE = Model("small", 512, 8, 8, 4, 64, 1536, 50257)
JOB = Job(cells=100, dense=20000, tokens=10000, rows=500, pairs=1_000_000)


@pytest.fixture(scope="module")
def model():
    model = qwen3_shaped(vocabulary=300, hidden=128, layers=3)
    model.set_attn_implementation("eager")
    return model


def test_weights_are_those_of_the_model(model):
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert Model.of(model.config).weights == matrices


def test_operations_are_those_that_torch_counts(model):
    length = 37
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(length)[None], use_cache=False)
    # The model alone computes all logits, and all pairs of tokens, also those that the mask hides.
    job = Job(1, length, length, rows=length, pairs=length * length)
    # Rotary tables are products as well: head_dim / 2 a position.
    rotary = 2 * length * model.config.head_dim // 2
    assert counter.get_total_flops() - operations(Model.of(model.config), job) in (0, rotary)


def test_a_job_counts_its_trie():
    cache = Cells(3, 4, prompt=10, input=12, response=2).cache(50)
    job = Job.of(cache)
    assert job.cells == 12 and job.dense == int(cache.lengths.sum()) and job.tokens < job.dense
    assert job.tokens < job.pairs < job.dense * int(cache.lengths.max())


def test_more_ranks_take_less_time_until_the_shards_run_out():
    made = [predict(SHAPE, JOB, MACHINE, world, 1024, False, shards=8) for world in (1, 2, 4, 8, 16)]
    times = [one.seconds for one in made]
    assert times[0] > times[1] > times[2] > times[3] == times[4]
    assert times[0] / times[3] == pytest.approx(8, rel=0.05)
    assert made[0].messages == 0 < made[1].messages and made[0].gathered == 0


def test_gathering_bounds_a_small_pass():
    slow = replace(MACHINE, link=1e6)
    whole, spread = (predict(SHAPE, JOB, slow, 2, 1024, spread, shards=8) for spread in (False, True))
    assert spread.gathered == spread.passes * SHAPE.weights * SHAPE.bytes / 2
    assert spread.seconds == pytest.approx(spread.gathered / 1e6) and spread.seconds > whole.seconds


def test_the_tables_of_the_docs_are_what_the_command_prints(capsys):
    assert cost_model.main([]) == 0
    printed = capsys.readouterr().out.strip()
    assert "Not measured" in printed and "assumed" in printed and "Llama-3.1-70B" in printed
    assert printed in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_check_measures_what_it_predicts(monkeypatch):
    monkeypatch.setattr(cost_model, "CASES", [(64 * 2, 1, 300, Cells(2, 2, prompt=6, input=6, response=2))])
    monkeypatch.setattr(cost_model, "ceilings", lambda hidden, tokens: MACHINE)
    lines = cost_model.check(rounds=1)
    row = next(line for line in lines if line.startswith("| hidden 128"))
    ratio = float(row.split("|")[6])
    assert ratio > 0 and f"geometric mean of measured / predicted: {ratio:.2f}" in lines[-1]
