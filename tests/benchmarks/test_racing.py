"""Replays over the committed loss matrices: the promise, what is saved, and the rule that races are compared with."""

from __future__ import annotations

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch

from benchmarks import racing
from benchmarks.racing import MATRICES, Matrices, Replays, plain_rule, read_matrices, replays
from sapo_kernels import PromptScores, Race
from tests.scoring.test_race import plausible


@pytest.fixture(scope="module")
def matrices():
    return read_matrices()


def test_matrices_are_those_of_real_tasks(matrices):
    assert sum(path.stat().st_size for path in MATRICES) < 2_000_000
    assert [sum(one.set == name for one in matrices) for name in ("early", "tuning", "held-out")] == [6, 8, 8]
    for one in matrices:
        assert len(one.states) >= 3 and (one.responses is None) == (one.set == "early")
        for full in one.states:
            assert full.nll.shape == (21, 250) and full.nonfinite == [] and bool((full.tokens > 0).all())
            assert float(full.loss.max() / full.loss.min()) > 1.005


def test_the_shipped_base_has_the_matrices_of_every_task(matrices):
    tasks = {one.task.split("_")[0] for one in matrices if one.set != "early"}
    shared = {141, 195, 224, 273, 339, 360, 589, 611, 618, 1310}
    assert tasks == {f"task{number}" for number in shared} | {f"task0{number}" for number in range(1, 7)}


def together(rows: list[Replays]) -> tuple[float, float, float]:
    """(median saving, share of replays that broke the promise, largest regret in percent) over all matrices."""
    count = sum(row.replays for row in rows)
    broken = sum(row.broken * row.replays for row in rows) / count
    return float(np.median([row.saved_p50 for row in rows])), broken, max(row.worst_regret for row in rows)


@pytest.mark.parametrize("count", [1, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_the_promise_holds_on_real_matrices(matrices, count):
    """50 orders are 1,200 races of each rule over the held-out matrices and as many over the others."""
    for name, least in (("held-out", (0.55, 0.6)), ("early", (0.7, 0.88))):
        own = [one for one in matrices if one.set == name]
        for rule, share in zip(("race", "memory"), least, strict=True):
            rows = list(racing.all_replays(own, [rule], count, 0.05))
            saved, broken, _ = together(rows)
            assert saved > share, f"{name}, {rule} saves {saved:.1%}"
            noise = 3 * math.sqrt(0.05 * 0.95 / sum(row.replays for row in rows))
            assert broken <= 0.05 + noise, f"{name}, {rule} broke its promise in {broken:.1%} of the replays"


def test_the_plain_rule_by_hand():
    full = plausible(0, [0.0, 0.4, 3.0])
    values = (full.nll / full.tokens.sum(1, keepdim=True) * 250).numpy()
    order = np.asarray(Race(seed=5).order(250))
    winner, cells, rounds = plain_rule(full, order)
    live, wanted, n = [0, 1, 2], 0, 0
    while len(live) > 1 and n < 250:
        step = min(16, 250 - n)
        wanted, n = wanted + step * len(live), n + step
        leader = min(live, key=lambda k: values[k, order[:n]].mean())
        for k in list(live):
            apart = values[k, order[:n]] - values[leader, order[:n]]
            if k != leader and apart.mean() > 1.645 * apart.std(ddof=1) * math.sqrt((1 - n / 250) / n):
                live.remove(k)
    assert (winner, cells, rounds) == (leader, wanted, -(-n // 16))


def test_walds_scale_by_hand():
    """Equal responses of one token: one stratum; gaps of 1 and 3 with deviations of 2 and 1, best multiple known."""
    sign = np.tile([1.0, -1.0], 50)
    other = np.repeat([1.0, -1.0], 50)
    rows = np.stack([np.full(100, 10.0), 11.0 + 2.0 * sign, 13.0 + other])
    full = PromptScores(torch.from_numpy(rows), torch.ones(3, 100, dtype=torch.int64), list("abc"))
    share = []
    for left in ((2.0, 1.0), (0.0, 1.0)):
        need = [max(1.0, e / (1 + e / 100)) for e in (
            2 * math.log(20) * (100 * s * s / free) / (gap + 0.05) ** 2
            for s, gap, free in zip(left, (1.0, 3.0), (99, 99) if left[0] else (98, 98), strict=True)
        )]  # fmt: skip
        share.append(1 - (sum(need) + max(need)) / 300)
    # The memory knows the first pair's noise, and has none of the second's.
    old = PromptScores(torch.from_numpy(np.stack([rows[0], 5.0 + sign, rows[0]])), full.tokens, list("abc"))
    assert racing.wald(full, 0.05, np.zeros(100)) == pytest.approx(share[0])
    assert racing.wald(full, 0.05, np.zeros(100), old) == pytest.approx(share[1])


def test_rows_say_what_happened(tmp_path):
    states = [plausible(1, [0.0, 0.002, 0.5], noise=0.01), plausible(1, [0.0, 0.003, 0.6], noise=0.01)]
    rows = [replays(Matrices("early", "a task", states), 1, rule, 5, 0.05) for rule in racing.RULES]
    for row in rows[:4]:
        assert 0 < row.saved_p10 <= row.saved_p50 <= row.saved_p90 < 1 and row.near == 2 and row.replays == 5
        assert row.worst_regret >= 0 and 0 <= row.over_half_percent <= row.wrong <= 1
    assert rows[1].wrong == 0 and rows[1].saved_p50 < rows[0].saved_p50, "a strict race decides near ties too"
    racing.write_rows(tmp_path / "rows.csv", rows)
    with open(tmp_path / "rows.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["rule"] for row in read] == ["race", "strict", "memory", "plain", "wald", "wald-memory"]
    assert set(read[0]) == {"date", *(field.name for field in dataclasses.fields(Replays))}
    assert len(racing.table(rows).splitlines()) == 7 and len(racing.summary(rows).splitlines()) == 7
