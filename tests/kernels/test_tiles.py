"""The lists of keys that Triton's attention kernels walk, against the paths of an oracle; kernels on random lists."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.tree_attention.reference import tree_attention_backward_reference
from sapo_kernels.trie import tiles
from sapo_kernels.trie.tiles import build_tiles, split_tiles, tiles_numpy
from tests.kernels.test_tree_attention import TREES, passes_of
from tests.oracles import flatten, random_cells, skip_unless_runnable
from tests.tolerances import assert_close
from tests.triton_cases import attention_oracle, layout, poisoned


@pytest.mark.parametrize("build", [build_tiles, tiles_numpy])
@pytest.mark.parametrize("chunk", [4, 32])
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("budget", [None, 9])
@pytest.mark.parametrize("job", ["one token", "short siblings", "deep", "random", "large"])
def test_every_tile_lists_what_its_queries_see(job, budget, share, chunk, build, monkeypatch):
    monkeypatch.setattr(tiles, "CHUNK", chunk)
    oracle = TREES[job][1]
    for step, _, tokens in passes_of(job, budget, share)[1]:
        keys, queries, end = len(step.position), len(step.input_ids), step.subtree_end.numpy()
        seen = np.array([np.isin(tokens, oracle.path(t)) for t in tokens[step.num_past :].tolist()])  # [Tq, Tk]
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
                assert ((whole[:, 0] < step.num_past) == (whole[:, -1] < step.num_past)).all(), "of one memory each"
                assert len(set(listed.tolist())) == len(listed)
                hidden = np.setdiff1d(np.arange(keys), listed)
                assert not truth[:, hidden].any() and (share or truth[:, listed].any(0).all())
                query = step.num_past + np.arange(first, min(first + size, queries))[:, None]
                assert (((seen_from[listed] <= query) & (query < end[listed])) == truth[:, listed]).all()
                # What skipping by a window counts on.
                position, least = step.position.numpy()[whole[:, 0]], chunk * np.arange(len(whole))
                assert (least <= position).all() and (position <= least + len(single)).all()
        assert (np.diff(seen_from[: step.num_past]) >= 0).all()


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
    """Random tries, passes, tiles, heads, options, views into buffers of NaN; values that are not finite.

    Past keys in a memory of their own; a group of heads larger than a tile.
    """
    skip_unless_runnable("tree_attention", "triton", "cpu")
    from sapo_kernels.tree_attention import triton_common
    from sapo_kernels.tree_attention.triton import tree_attention_backward_triton, tree_attention_triton

    rng = random.Random(seed)
    for module in (tiles, triton_common):
        monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(tiles, "SPLIT_ROWS", rng.choice([8, 10**6]))
    monkeypatch.setattr(tiles, "MORE_PIECES", rng.choice([3, 10**6]))
    trie = sk.plan_trie(*flatten(random_cells(seed, prompts=2, examples=3, longest=rng.choice([4, 12, 40]))))
    steps = trie.passes(rng.choice([None, 20, 50]), rng.choice([1, 8, 64]))
    step = rng.choice(steps)
    queries, keys = len(step.input_ids), len(step.position)
    kv_heads, group = rng.choice([(1, 1), (2, 2), (1, 3), (1, 7)]) if seed else (1, 37)
    head_k, head_v = rng.choice([(16, 16), (24, 16), (8, 40)])
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, kv_heads * group, head_k, generator=draw)
    k, v = (torch.randn(keys, kv_heads, width, generator=draw) for width in (head_k, head_v))
    q, k, v = (poisoned(t, rng.choice(["rows", "heads"])) for t in (q, k, v))
    sinks = torch.randn(kv_heads * group, generator=draw) if rng.random() < 0.3 else None
    window, softcap = rng.choice([None, None, 3, 20]), rng.choice([None, None, 2.0])
    sick = rng.random() < 0.4
    if sick:
        rng.choice([k, v])[rng.randrange(keys), 0] = rng.choice([float("nan"), float("inf")])
    options = (sinks, 0.3, window, softcap, step.block_tokens)
    size = rng.choice([1, 5, 16])
    walk = (torch.from_numpy(build_tiles(*layout(step)[1:], size)), size)
    out, lse = tree_attention_triton(q, k, v, *layout(step), *options, True, *walk)
    apart = (k[step.num_past :].clone(), v[step.num_past :].clone())
    past = (k[: step.num_past].clone(), v[: step.num_past].clone()) if step.num_past else (None, None)
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
