"""score_prompts_sharded: the same bits for 1 to 4 ranks, and what the others say when one is lost."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.scoring import paths
from sapo_kernels.scoring.distributed import cut
from sapo_kernels.scoring.ranks import GRACE, RankError, Ranks, _Answering
from tests.conftest import ROOT
from tests.oracles import flatten, random_cells
from tests.scoring.ranks_child import BEGIN, cache_of, tiny
from tests.tolerances import TOLERANCES

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch was built without gloo",
)
# All worlds start in one fixture, which may take its time on a busy machine.
pytestmark = pytest.mark.timeout(1200)
TIMEOUT = 3.0
KINDS, PHASES = ("kill", "stop", "raise", "late"), ("first", "start", "forward", "results")


def lost(kind: str, phase: str, world: int, culprit: int, **more) -> dict:
    name = f"{kind}-{phase}-{world}-{culprit}" + "-fsdp" * bool(more.get("fsdp"))
    return {"scene": "lost", "name": name, "kind": kind, "phase": phase, "world": world, "culprit": culprit,
            "timeout": TIMEOUT, **more}  # fmt: skip


FEW = [
    lost("kill", "forward", 3, 0), lost("stop", "results", 3, 2), lost("late", "first", 2, 1),
    lost("kill", "forward", 2, 1, fsdp=True), lost("stop", "forward", 3, 1, fsdp=True),
    lost("raise", "forward", 3, 0), lost("raise", "start", 2, 1, fsdp=True), lost("interrupt", "forward", 2, 1),
]  # fmt: skip
MANY = [
    lost(kind, phase, world, (i * 7) % world)
    for i, (kind, phase, world) in enumerate(itertools.product(KINDS, PHASES, (2, 3, 4)))
]
# In the middle of a forward that gathers weights, each rank of each world.
GATHERING = [
    lost(kind, "forward", world, culprit, fsdp=True)
    for kind in ("kill", "stop", "raise")
    for world in (2, 3, 4)
    for culprit in range(world)
]


def worlds(folder, cases: list[dict], deadline: float) -> dict[str, list[dict]]:
    """Run the cases in one process that forks their ranks."""
    out = folder / "found.json"
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET",)}
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    done = subprocess.run(
        [sys.executable, "-m", "tests.scoring.ranks_child", str(out), json.dumps(cases)],
        cwd=ROOT, env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=deadline,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Every world that is not slow, from one start of Python."""
    cases = [
        {"name": "random", "scene": "random", "world": 4, "seeds": [13, 37]},
        {"name": "alike", "scene": "alike", "world": 3},
        {"name": "wrapped", "scene": "wrapped", "world": 2},
        {"name": "fsdp", "scene": "sharded", "world": 3},
        {"name": "gradients", "scene": "gradients", "world": 2},
        *FEW,
    ]
    return worlds(tmp_path_factory.mktemp("ranks"), cases, deadline=900)


def results(ranks: list[dict]) -> list[dict]:
    for rank, found in enumerate(ranks):
        assert found["exit"] == 0, (rank, found.get("trace"))
    return [found["result"] for found in ranks]


def check_random(ranks: list[dict], jobs: int) -> None:
    found = results(ranks)
    assert [len(entries) for entries in found] == [jobs] * 4
    for row in zip(*found, strict=True):
        # Rank 0 is in all four groups, rank 3 in one.
        assert [len(entry["bits"]) for entry in row] == [4, 3, 2, 1]
        assert len({value for entry in row for value in entry["bits"]}) == 1, row
        assert len({value for entry in row for value in entry["best"]}) == 1, row
    # Against scoring as one job: within rounding, and another choice only between equals.
    plain = [entry for entry in found[0] if not entry["race"]]
    assert all(entry["same_finite"] for entry in plain)
    assert 0 < max(entry["apart"] for entry in plain) <= TOLERANCES["token nll"].atol
    assert all(entry["same_choice"] or abs(entry["gap"]) <= TOLERANCES["mean loss"].atol for entry in plain)
    # The random jobs reach what they are for: races, cells that are not finite, ranks without a shard.
    assert len(plain) < 0.9 * jobs and sum(not entry["finite"] for entry in found[0]) >= jobs / 50
    assert {1, 2, 3, 5} <= {entry["shards"] for entry in found[0]}


@needs_gloo
def test_any_number_of_ranks_gives_the_same_bits_and_the_same_choice(few):
    check_random(few["random"], 24)


@needs_gloo
@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_five_hundred_random_jobs(tmp_path):
    case = {"name": "random", "scene": "random", "world": 4, "seeds": [1000, 1500], "deadline": 3000}
    check_random(worlds(tmp_path, [case], deadline=3600)["random"], 500)


@needs_gloo
def test_the_rank_that_holds_something_else_is_named(few):
    ranks = results(few["alike"])
    for what in ("prompts and examples", "options", "model", "weights"):
        for result in ranks:
            assert result["said"][what].startswith(f"rank 1: {what}: expected the same on all 3 ranks"), what
    assert len({result["after"] for result in ranks}) == 1


@needs_gloo
def test_wrapped_models_are_scored_as_the_plain_one(few):
    ranks = results(few["wrapped"])
    made = [entry for result in ranks for entry in result["made"]]
    assert len(made) == 6 and len({digest for digest, *_ in made}) == 1
    plain = torch.tensor(ranks[0]["plain"])
    for _, nll, best, world in made:
        assert torch.allclose(torch.tensor(nll), plain, rtol=0, atol=1e-4) and world == 2
        # Prompts 0 and 2 are the same: bit for bit, and the lower index wins.
        assert nll[0] == nll[2] and best == 0


@needs_gloo
def test_a_model_sharded_by_fsdp2_gives_the_bits_of_the_whole_one(few):
    ranks = results(few["fsdp"])
    for result in ranks:
        assert result["kinds"] == ["DTensor"]
        assert result["timeout"] == BEGIN.total_seconds(), "the group's own again"
        assert result["sharded"] == result["whole"] == ranks[0]["whole"]
        assert "spread over ranks" in result["refused"] and "up_proj.weight" in result["refused"]
        # One rank scores as one job, before a step and after.
        whole, sharded = result["trained"]["whole"], result["trained"]["sharded"]
        assert {path for path, _ in whole + sharded} == {"tree"} and whole[0][1] != whole[1][1]
        for (_, own), (_, other) in zip(whole, sharded, strict=True):
            assert torch.allclose(torch.tensor(own), torch.tensor(other), rtol=0, atol=1e-5)


@needs_gloo
def test_gradients_over_a_trie_of_a_sharded_model(few):
    for found in results(few["gradients"]):
        assert len(found) == 4 and all(loss < 1e-3 and worst < 1e-4 for loss, worst in found), found


def check_lost(case: dict, ranks: list[dict]) -> None:
    culprit, kind, phase = case["culprit"], case["kind"], case["phase"]
    reason = {"raise": "failed: ValueError: boom: ? {0.__class__}", "interrupt": "failed: KeyboardInterrupt"}
    for rank, found in enumerate(ranks):
        if rank == culprit:
            own = {"kill": -9, "stop": "hung", "late": "hung"}
            assert found["exit"] == own.get(kind, 1) and "result" not in found, ranks
            continue
        assert found["exit"] == 1 and found["kind"] == "RankError" and found["rank"] == culprit, (rank, found)
        # Outside a call of the scoring nobody hears why.
        told = kind in reason and phase not in ("first", "start")
        assert found["error"].startswith(f"rank {culprit} {reason[kind] if told else ''}")
        # Beyond that there is a busy machine.
        assert found["after"] <= (3.0 if told else TIMEOUT + GRACE + 2.0), (rank, found)


@needs_gloo
@pytest.mark.parametrize("case", FEW, ids=lambda case: case["name"])
def test_a_lost_rank_is_named_by_the_others(few, case):
    check_lost(case, few[case["name"]])


@needs_gloo
@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_ways_to_lose_a_rank(tmp_path):
    found = worlds(tmp_path, [*MANY, *GATHERING], deadline=3600)
    assert len(found) == 48 + 27
    for case in (*MANY, *GATHERING):
        check_lost(case, found[case["name"]])


@pytest.mark.parametrize("seed", range(6))
def test_a_cut_has_every_cell_once_and_costs_at_most_a_path(seed):
    cells = random_cells(seed, prompts=1 + seed % 5, examples=1 + seed % 7)
    trie = sk.plan_trie(*flatten(cells))
    for count in (1, 3, 8, 1000):
        parts = cut(trie, count)
        assert 1 <= len(parts) <= count and all(len(part) for part in parts)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(cells)))
        tokens = [len(sk.plan_trie(*flatten([cells[c] for c in part]))) for part in parts]
        longest = max(len(context) + len(response) - 1 for context, response in cells)
        assert len(trie) <= sum(tokens) <= len(trie) + (len(parts) - 1) * longest
        if count == 3 and len(cells) > 20:
            assert max(tokens) < 2.2 * len(trie) / count + longest, "parts are about even"
        # Equal sequences are not parted.
        home = {c: i for i, part in enumerate(parts) for c in part.tolist()}
        whole = [tuple(context + response) for context, response in cells]
        for a, b in itertools.combinations(range(len(cells)), 2):
            assert whole[a] != whole[b] or home[a] == home[b]


def test_one_process_alone_needs_no_group(monkeypatch):
    model, cache, asked, fused = tiny(), cache_of(4), [], paths.Paths._fused
    plain = sk.score_prompts(model, cache, progress=False)
    monkeypatch.setattr(paths.Paths, "_fused", lambda job: asked.append(job.fuse) or fused(job))
    scores = sk.score_prompts_sharded(model, cache, shards=6, fuse=False)
    assert asked == [False] * 6
    assert scores.stats["world"] == 1 and scores.stats["shards"] == 6
    assert scores.stats["trie_tokens"] > plain.stats["trie_tokens"]
    assert torch.allclose(scores.nll, plain.nll, rtol=0, atol=1e-4) and torch.equal(scores.tokens, plain.tokens)
    whole = sk.score_prompts_sharded(model, cache, shards=1)
    assert torch.equal(whole.nll, plain.nll)
    race = sk.Race(first=5, relative=0.1)
    many = cache_of(4, 4, 16)
    raced = sk.score_prompts_sharded(model, many, shards=2, race=race)
    assert raced.best == sk.score_prompts(model, many, race=race, progress=False).best
    assert raced.race is not None and torch.equal(raced.nll.isnan(), raced.tokens == 0)


def test_the_log_says_things_once(caplog):
    model = tiny()
    model.get_input_embeddings().weight.data[:] = float("nan")
    with caplog.at_level("WARNING", "sapo_kernels"):
        scores = sk.score_prompts_sharded(model, cache_of(1, 2, 6), shards=4)
    assert scores.nonfinite == [0, 1] and scores.stats["path"] == "alone" and scores.stats["reason"]
    said = ["scoring each sequence without padding", "prompt 0", "prompt 1"]
    assert [m.split(":")[0] for m in caplog.messages] == said


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shards": 0}, "shards: expected a whole number"),
        ({"timeout": 0}, "timeout: expected seconds above 0"),
        ({"examples": [{"input": "a", "target": "b"}]}, "expected none with a ResponseCache"),
    ],
)
def test_bad_options_and_a_model_spread_in_another_way_are_refused(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        sk.score_prompts_sharded(tiny(), cache_of(1), **options)
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.ds_id = 1
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' is spread over ranks"):
        sk.score_prompts_sharded(model, cache_of(1))


def two(store, timeout=20.0):
    return [Ranks((0, 1), rank, store, timeout) for rank in (0, 1)]


def together(*calls):
    """Each call in a thread of its own; what it returns or raises."""
    with ThreadPoolExecutor(len(calls)) as pool:
        made = [pool.submit(call) for call in calls]
        return [one.exception(60) or one.result() for one in made]


def test_a_value_of_many_pieces_is_read_whole_and_old_ones_are_deleted(monkeypatch):
    """Two ranks of one process, in threads."""
    monkeypatch.setattr("sapo_kernels.scoring.ranks.PIECE", 64)
    store = torch.distributed.HashStore()
    values = [list(range(300)), "b" * 1000, None]

    def exchanges(ranks):
        return [ranks.exchange((ranks.rank, value)) for value in values]

    found = together(*(functools.partial(exchanges, ranks) for ranks in two(store)))
    assert found[0] == found[1] == [[[0, value], [1, value]] for value in values]
    # Two attempts, two signs at most, and the last exchange.
    assert store.num_keys() < 10


def test_an_exchange_that_is_complete_is_read_though_a_rank_has_failed_since(monkeypatch):
    """All ranks fail by the same values, each for itself: none may hear of another's failure instead."""
    store = torch.distributed.HashStore()
    first, second = two(store)

    def failing():
        with pytest.raises(ValueError), first.together():
            raise ValueError(first.exchange(0))

    thread = threading.Thread(target=failing)

    def asleep(seconds):
        if not thread.ident:  # between its first look and its second the other one comes and fails
            thread.start()
            thread.join(20)
            second._beaten = 0.0

    monkeypatch.setattr("sapo_kernels.scoring.ranks.time.sleep", asleep)
    assert second.exchange(1) == [0, 1]


def test_ranks_of_which_one_failed_after_the_last_exchange_meet_again():
    store = torch.distributed.HashStore()
    first, second = two(store)
    assert together(*(functools.partial(one.exchange, "call 1") for one in (first, second))) == [["call 1"] * 2] * 2
    with pytest.raises(ValueError), second.together():
        raise ValueError("afterwards")
    for call in ("call 2", "call 3"):
        again = two(store)
        for one, before in zip(again, (first, second), strict=True):
            one.follow(before)
        assert together(*(functools.partial(one.exchange, call) for one in again)) == [[call] * 2] * 2
        first, second = again


def test_a_rank_that_was_given_up_does_not_end_with_a_result():
    first, second = two(torch.distributed.HashStore(), 0.3)

    def late():
        time.sleep(2.0)
        return second.exchange(1)

    ended = together(lambda: first.exchange(0), late)
    assert all(isinstance(one, RankError) and one.rank == 1 for one in ended), ended


def test_a_store_that_does_not_answer_is_given_up():
    class Stopped:
        def check(self, keys):
            time.sleep(5)

    with pytest.raises(RankError, match="was not heard from for 0.2 s"):
        _Answering(Stopped(), 0.2).check(["key"])
