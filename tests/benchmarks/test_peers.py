"""The peers of the benchmarks: they agree with ours, and leave the model alone."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import sapo_kernels as sk
from benchmarks.ops import end_to_end
from benchmarks.peers import PEERS
from benchmarks.workload import Cells
from tests.oracles import small_qwen3


@pytest.fixture(scope="module")
def jobs():
    """A model, and for each layout a job with our scores."""
    model = small_qwen3()
    made = {}
    for last in (False, True):
        cache = Cells(3, 9, 12, 9, 3, last).cache(200)
        made[last] = cache, sk.score_prompts(model, cache)
    return model, made


@pytest.mark.parametrize("last", [False, True], ids=["instruction first", "instruction last"])
@pytest.mark.parametrize("name", list(PEERS))
def test_peers_agree_with_ours_and_leave_the_model_alone(name, last, jobs):
    peer = PEERS[name]
    if peer.missing():
        pytest.skip(f"not installed: {peer.missing()}")
    model, made = jobs
    cache, ours = made[last]
    if peer.gpu:
        peer = dataclasses.replace(peer, run=functools.partial(peer.run, compiled=False))
    expected = ours.reduce("batch", 8) if peer.gives == "batch8" else ours.nll.flatten()
    sizes = {"batch_size": (4, 64), "tokens": (1, 100)}[peer.size_name] if peer.sizes else None
    for run in peer.variants(sizes).values():
        got = run(model, cache)
        assert got.dtype == torch.float64 and got.shape == expected.shape
        assert float((got - expected).abs().max()) < 1e-4 * float(ours.tokens.max())
    assert "forward" not in vars(model) and model.config._attn_implementation == "sdpa" and not model.training


def test_a_prefix_cache_of_equal_contexts_leaves_a_token_to_predict_from(jobs):
    model, _ = jobs
    cache = sk.ResponseCache.from_token_ids([[[1, 2, 3]] * 2, [[1, 2, 4]] * 2], [[5, 6], [7]])
    got = PEERS["prefix_cache"].run(model, cache)
    assert float((got - sk.score_prompts(model, cache).nll.flatten()).abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["tuned_plain", "packed", "prefix_cache"])
def test_tuned_peers_without_masks_in_logits_to_keep(name, jobs, monkeypatch):
    """As in transformers 5.17."""
    from transformers import modeling_utils

    monkeypatch.delattr(modeling_utils, "slice_logits_to_keep", raising=False)
    model, made = jobs
    cache, ours = made[False]
    got = PEERS[name].run(model, cache)
    assert float((got - ours.nll.flatten()).abs().max()) < 1e-4 * float(ours.tokens.max())
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_ours_agrees_with_each_sequence_alone(jobs):
    model, made = jobs
    for cache, ours in made.values():
        chosen = [0, 5, 26]
        assert float((end_to_end.alone(model, cache, chosen) - ours.nll.flatten()[chosen]).abs().max()) < 1e-4
