"""The lists of keys that Triton's attention kernels walk, against the paths of an oracle; kernels on random lists."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.tree_attention.reference import tree_attention_backward_reference
from sapo_kernels.trie import tiles
from sapo_kernels.trie.tiles import build_pieces, build_tiles, split_tiles, tiles_numpy
from tests.oracles import PrefixOracle, flatten, random_cells, skip_unless_runnable
from tests.tolerances import assert_close
from tests.triton_cases import attention_oracle, layout

JOBS = {
    "random": random_cells(4, prompts=3, examples=4, longest=12),
    "large": random_cells(5, prompts=5, examples=6, longest=20),
    "siblings": [([1, 2, 3], [c, c]) for c in range(40)],
    "deep": [([1] * 70 + [2 + c] * 20, [3, 4]) for c in range(4)],
    "one token": [([1], [2])],
}


def passes(job: str, budget: int | None, share: float):
    """(pass, trie tokens of its keys) of a job of which a share of the tokens is held; and the oracle."""
    cells = JOBS[job]
    trie, oracle = sk.plan_trie(*flatten(cells)), PrefixOracle(cells)
    held = np.random.default_rng(len(trie)).random(len(trie)) < share
    held[trie.row_token] = False
    for step in trie.passes(budget, 8, held if share else None):
        inside = np.arange(step.start, step.stop)
        yield step, [*oracle.path(step.start)[:-1], *inside[held[inside]], *inside[~held[inside]]], oracle


@pytest.mark.parametrize("build", [build_tiles, tiles_numpy])
@pytest.mark.parametrize("chunk", [4, 32])
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("budget", [None, 9])
@pytest.mark.parametrize("job", JOBS)
def test_every_tile_lists_what_its_queries_see(job, budget, share, chunk, build, monkeypatch):
    monkeypatch.setattr(tiles, "CHUNK", chunk)
    for step, tokens, oracle in passes(job, budget, share):
        keys, queries, end = len(step.position), len(step.input_ids), step.subtree_end.numpy()
        seen = np.array([np.isin(tokens, oracle.path(t)) for t in tokens[step.carried :]])  # [Tq, Tk]
        for size in (1, 3, 16):
            packed = build(*layout(step)[1:], size)
            begin, chunks, seen_from, entries = split_tiles(packed, keys, queries, size)
            assert packed.dtype == np.int32 and begin[-1] == len(entries) and len(chunks) == -(-queries // size)
            for tile, first in enumerate(range(0, queries, size)):
                truth, mine = seen[first : first + size], entries[begin[tile] : begin[tile + 1]]
                whole = (mine[: chunks[tile], None] + np.arange(chunk)).reshape(-1, chunk)
                single = mine[chunks[tile] :]
                listed = np.concatenate([whole.ravel(), single])
                assert truth[:, whole.ravel()].all(), "all queries see the keys of the chunks"
                assert ((whole[:, 0] < step.carried) == (whole[:, -1] < step.carried)).all(), "of one memory each"
                assert len(set(listed.tolist())) == len(listed)
                hidden = np.setdiff1d(np.arange(keys), listed)
                assert not truth[:, hidden].any() and (share or truth[:, listed].any(0).all())
                query = step.carried + np.arange(first, min(first + size, queries))[:, None]
                assert (((seen_from[listed] <= query) & (query < end[listed])) == truth[:, listed]).all()
                # What skipping by a window counts on.
                position, least = step.position.numpy()[whole[:, 0]], chunk * np.arange(len(whole))
                assert (least <= position).all() and (position <= least + len(single)).all()
        assert (np.diff(seen_from[: step.carried]) >= 0).all()


@pytest.mark.parametrize("rows, more", [(10**6, 10**6), (24, 10**6), (1, 10**6), (1, 3)])
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("job", ["large", "deep", "one token"])
def test_pieces_cover_the_queries_of_every_key(job, share, rows, more, monkeypatch):
    for name, value in {"KEY_TILE": 16, "SPLIT_ROWS": rows, "MORE_PIECES": more}.items():
        monkeypatch.setattr(tiles, name, value)
    for step, tokens, oracle in passes(job, 60, share):
        pieces = build_pieces(*layout(step)[1:], 2)
        count = -(-len(tokens) // 16)
        assert pieces[:, 0].tolist() == sorted(pieces[:, 0]) and set(pieces[:, 0]) == set(range(count))
        slots = pieces[pieces[:, 3] >= 0, 3].tolist()
        assert slots == list(range(len(slots))) and len(slots) <= 2 * (len(pieces) - count) <= 2 * more
        for tile in range(count):
            mine = pieces[pieces[:, 0] == tile]
            assert len(mine) == 1 or (mine[:, 3] >= 0).all(), "one alone needs no slot"
            assert (mine[1:, 1] == mine[:-1, 2]).all() and (
                more < 10**6 or (mine[:, 2] - mine[:, 1] <= max(1, rows // 2)).all()
            )
            for query in range(step.carried, len(tokens)):
                seen = np.isin(tokens[16 * tile : 16 * tile + 16], oracle.path(tokens[query])).any()
                assert not seen or mine[0, 1] <= query < mine[-1, 2]


def test_lists_are_made_once_and_on_the_host():
    step = sk.plan_trie(*flatten(JOBS["random"])).passes()[0]
    there = step.to("meta")
    assert there.tiles(16) is there.tiles(16) and there.tiles(16).is_meta and there.tiles(8) is not there.tiles(16)
    assert there.to("cpu").tiles(16) is step.tiles(16) and there.to("cpu").position is step.position


def test_long_contexts_have_short_lists():
    """One sequence of 20,000 tokens: an entry for 32 keys, not for each."""
    n = 20_000
    (step,) = sk.plan_trie(np.arange(n + 1) % 97, [0, n + 1], [n]).passes()
    assert len(step.tiles(16)) < n * n / 16 / 2 / 25


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(8))
def test_fuzz(seed, monkeypatch, poisoned_outputs):
    random_case(seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_long_fuzz(monkeypatch, poisoned_outputs):
    for seed in range(8, 500):
        random_case(seed, monkeypatch)


def random_case(seed, monkeypatch):
    """Random tries, passes, tiles, heads, options; past keys in a memory of their own; values that are not finite."""
    skip_unless_runnable("tree_attention", "triton", "cpu")
    from sapo_kernels.tree_attention import triton_common
    from sapo_kernels.tree_attention.triton import tree_attention_backward_triton, tree_attention_triton

    rng = random.Random(seed)
    for module in (tiles, triton_common):
        monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(tiles, "SPLIT_ROWS", rng.choice([8, 10**6]))
    trie = sk.plan_trie(*flatten(random_cells(seed, prompts=2, examples=3, longest=rng.choice([4, 12, 40]))))
    steps = trie.passes(rng.choice([None, 20, 50]), rng.choice([1, 8, 64]))
    step = rng.choice(steps)
    queries, keys = len(step.input_ids), len(step.position)
    kv_heads, group = rng.choice([(1, 1), (2, 2), (1, 3), (1, 7)])
    head_k, head_v = rng.choice([(16, 16), (24, 16), (8, 40)])
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, kv_heads * group, head_k, generator=draw)
    k, v = (torch.randn(keys, kv_heads, width, generator=draw) for width in (head_k, head_v))
    sinks = torch.randn(kv_heads * group, generator=draw) if rng.random() < 0.3 else None
    window, softcap = rng.choice([None, None, 3, 20]), rng.choice([None, None, 2.0])
    sick = rng.random() < 0.4
    if sick:
        rng.choice([k, v])[rng.randrange(keys), 0] = rng.choice([float("nan"), float("inf")])
    options = (sinks, 0.3, window, softcap, step.block_tokens)
    size = rng.choice([1, 5, 16])
    walk = (torch.from_numpy(build_tiles(*layout(step)[1:], size)), size)
    out, lse = tree_attention_triton(q, k, v, *layout(step), *options, True, *walk)
    apart = (k[step.carried :].clone(), v[step.carried :].clone())
    past = (k[: step.carried].clone(), v[: step.carried].clone()) if step.carried else (None, None)
    again, _ = tree_attention_triton(q, *apart, *layout(step), *options, False, *walk, *past)
    assert torch.equal(out.nan_to_num(9.0), again.nan_to_num(9.0)), "the same bits wherever the keys lie"
    expected, wanted_lse = attention_oracle(q, k, v, step, *options[:-1])
    good = expected.isfinite().all(-1)
    assert torch.equal(out.isfinite().all(-1), good) and (sick or good.all())
    assert_close("tree_attention fp32", out[good], expected[good])
    assert_close("linear_logprob fp32", lse[good], wanted_lse[good])
    if not sick:
        up = torch.randn(out.shape, generator=draw)
        rest = (*layout(step), *options)
        got, again = (tree_attention_backward_triton(up, q, k, v, out, lse, *rest, *walk) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(got[:3], again, strict=False))
        wide = [t.double() for t in (up, q, k, v)]
        rest = (*layout(step), None if sinks is None else sinks.double(), *options[1:])
        for ours, exact in zip(got, tree_attention_backward_reference(*wide, None, None, *rest), strict=True):
            if exact is not None:
                assert_close("tree_attention gradient fp32", ours, exact)
