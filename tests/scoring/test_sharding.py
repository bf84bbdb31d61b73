"""score_prompts_sharded: the same bits for 1 to 4 ranks, and what the others say when one is lost."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.scoring.distributed import cut
from tests.conftest import ROOT
from tests.oracles import flatten, random_cells, small_qwen3
from tests.scoring.ranks_child import BEGIN, cache_of, tiny
from tests.tolerances import TOLERANCES

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch was built without gloo",
)
# All worlds start in one fixture, which may take its time on a busy machine.
pytestmark = pytest.mark.timeout(1200)
TIMEOUT = 4.0
KINDS, PHASES = ("kill", "stop", "raise", "late"), ("first", "start", "forward", "idle", "results")


def lost(kind: str, phase: str, world: int, culprit: int, **more) -> dict:
    name = f"{kind}-{phase}-{world}-{culprit}" + "-fsdp" * bool(more.get("fsdp"))
    return {"scene": "lost", "name": name, "kind": kind, "phase": phase, "world": world, "culprit": culprit,
            "timeout": TIMEOUT, **more}  # fmt: skip


FEW = [
    lost("kill", "forward", 3, 0), lost("kill", "results", 3, 2), lost("kill", "forward", 2, 1, fsdp=True),
    lost("stop", "forward", 3, 1, fsdp=True),
    lost("raise", "forward", 3, 0), lost("raise", "start", 2, 1, fsdp=True),
    lost("interrupt", "forward", 2, 1), lost("late", "first", 2, 1),
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
        {"name": "random", "scene": "random", "world": 4, "seeds": [0, 40], "deadline": 600},
        {"name": "alike", "scene": "alike", "world": 3},
        {"name": "wrapped", "scene": "wrapped", "world": 2},
        {"name": "trained", "scene": "trained", "world": 2},
        {"name": "fsdp2", "scene": "sharded", "world": 2},
        {"name": "fsdp3", "scene": "sharded", "world": 3},
        *FEW,
    ]
    return worlds(tmp_path_factory.mktemp("ranks"), cases, deadline=900)


def results(ranks: list[dict]) -> list[dict]:
    for rank, found in enumerate(ranks):
        assert found["exit"] == 0, (rank, found.get("trace"))
    return [found["result"] for found in ranks]


def check_random(ranks: list[dict], jobs: int) -> None:
    found = [result["found"] for result in results(ranks)]
    assert [len(entries) for entries in found] == [jobs] * 4
    apart, races, broken, empty, shards = [], 0, 0, 0, set()
    for row in zip(*found, strict=True):
        digests = {value for entry in row for value in entry["bits"].values()}
        bests = {value for entry in row for value in entry["best"].values()}
        first = row[0]
        assert set(first["bits"]) == {"1", "2", "3", "4"}
        assert len(digests) == 1 and len(bests) == 1 and first["shapes"] == 1, first
        races, broken, empty = races + first["race"], broken + (not first["finite"]), empty + first["empty"]
        shards.add(first["shards"])
        if not first["race"]:
            assert first["same_finite"]
            # Against scoring as one job: within rounding, and another choice only between equals.
            apart.append(first["apart"])
            assert first["plain_best"] in bests or abs(first["gap"]) <= TOLERANCES["mean loss"].atol
    assert 0 < max(apart) <= TOLERANCES["token nll"].atol
    # The random jobs reach what they are for.
    assert races > jobs / 10 and broken >= jobs / 50 and empty > jobs / 5 and {1, 2, 3, 5} <= shards


@needs_gloo
def test_any_number_of_ranks_gives_the_same_bits_and_the_same_choice(few):
    check_random(few["random"], 40)


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
@pytest.mark.parametrize("name", ["fsdp2", "fsdp3"])
def test_a_model_sharded_by_fsdp2_gives_the_bits_of_the_whole_one(few, name):
    ranks = results(few[name])
    for result in ranks:
        assert "DTensor" in result["kinds"] and not result["training"]
        assert result["timeout"] == BEGIN.total_seconds(), "the group's own again"
        assert result["sharded"] == result["whole"] == ranks[0]["whole"]
        assert "spread over ranks" in result["refused"] and "up_proj.weight" in result["refused"]


@needs_gloo
def test_a_model_sharded_by_fsdp2_is_scored_as_the_whole_one_while_it_is_trained(few):
    ranks = results(few["trained"])
    for found in ranks:
        assert found["kinds"] == ["DTensor"], "nothing was sharded"
        for (path, whole), (other, sharded) in zip(found["whole"], found["sharded"], strict=True):
            assert path == other == "tree"
            assert torch.allclose(torch.tensor(whole), torch.tensor(sharded), rtol=0, atol=1e-5)
        assert found["whole"][0][1] != found["whole"][1][1], "the step changed nothing"
    assert ranks[0]["sharded"] == ranks[1]["sharded"]


def check_lost(case: dict, ranks: list[dict]) -> None:
    culprit, kind, phase = case["culprit"], case["kind"], case["phase"]
    for rank, found in enumerate(ranks):
        if rank == culprit:
            own = {"kill": -9, "stop": "hung", "late": "hung"}
            assert found["exit"] == own.get(kind, 1) and "result" not in found, ranks
            continue
        assert found["exit"] == 1 and found["kind"] == "RankError" and found["rank"] == culprit, (rank, found)
        assert found["error"].startswith(f"rank {culprit} ")
        if kind in ("raise", "interrupt") and phase not in ("first", "start"):
            assert ("KeyboardInterrupt" if kind == "interrupt" else "ValueError: boom: ? {0.__class__}") in found[
                "error"
            ]
        at_once = phase != "first" and kind in ("kill", "raise", "interrupt")
        # Beyond the deadline there is the grace in which the others are told, and a busy machine.
        assert found["after"] <= (2.0 if at_once else TIMEOUT + 3.0), (rank, found)


@needs_gloo
@pytest.mark.parametrize("case", FEW, ids=lambda case: case["name"])
def test_a_lost_rank_is_named_by_the_others(few, case):
    check_lost(case, few[case["name"]])


@needs_gloo
@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize(("cases", "count"), [(MANY, 60), (GATHERING, 27)], ids=["sixty", "while_weights_are_gathered"])
def test_ways_to_lose_a_rank(cases, count, tmp_path):
    found = worlds(tmp_path, cases, deadline=3600)
    assert len(found) == count
    for case in cases:
        check_lost(case, found[case["name"]])


@pytest.mark.parametrize("seed", range(12))
def test_a_cut_has_every_cell_once_and_costs_at_most_a_path(seed):
    cells = random_cells(seed, prompts=1 + seed % 5, examples=1 + seed % 7)
    trie = sk.plan_trie(*flatten(cells))
    for count in (1, 2, 3, 8, len(cells), 1000):
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


def test_one_process_alone_needs_no_group():
    model, cache = tiny(), cache_of(4)
    plain = sk.score_prompts(model, cache, progress=False)
    scores = sk.score_prompts_sharded(model, cache, shards=6)
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
        ({"timeout": float("nan")}, "timeout: expected seconds above 0"),
        ({"examples": [{"input": "a", "target": "b"}]}, "expected none beside a ResponseCache"),
        ({"suffix": "x"}, "suffix: expected none beside a ResponseCache"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        sk.score_prompts_sharded(tiny(), cache_of(1), **options)


def test_a_model_spread_in_another_way_is_refused():
    model = small_qwen3()
    model.model.layers[0].mlp.up_proj.weight.ds_id = 1
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' is spread over ranks"):
        sk.score_prompts_sharded(model, cache_of(1))
