"""OverTrie: what a trainer's loss reads of a model, as the model itself or TRL's fused head gives it."""

from __future__ import annotations

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.scoring.attention import NotTreeable
from tests.training.test_tree_logprobs import SEQUENCES, lora
from tests.training.test_trie_batch import padded


@pytest.mark.parametrize("count", [None, 40])
def test_the_loss_of_the_model(count):
    model, batch = lora().eval(), padded(SEQUENCES)
    options = {} if count is None else {"num_items_in_batch": count}
    expected = model(**batch, **options).loss
    got = sk.OverTrie(model)(**batch, use_cache=False, **options)
    assert abs(float(got["loss"] - expected)) < 1e-5 and got.loss is got["loss"]


def test_the_fields_of_trls_fused_head():
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL has no fused head")
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    model, batch = lora().eval(), padded(SEQUENCES)
    utils.add_fused_lm_head(model.get_base_model(), outputs=fields)
    expected = model(**batch, fused_lm_head=True)
    got = sk.OverTrie(model, verify=False)(**batch, fused_lm_head=True)
    for name in (*fields, "label_mask"):
        own = getattr(expected, name)
        assert got[name].shape == own.shape
        assert torch.allclose(got[name].float(), own.float(), atol=2e-5), name
    assert abs(float(got.loss - expected.loss)) < 1e-5


def test_changed_labels_are_packed_anew():
    """A trainer that masks some labels before it calls the model must not get the loss of the others."""
    model, batch = lora().eval(), padded(SEQUENCES)
    known = sk.OverTrie(model, sk.TrieBatch.of_padded(batch), batch["labels"])
    changed = batch["labels"].clone()
    changed[0] = -100
    expected = model(**{**batch, "labels": changed}).loss
    assert abs(float(known(**{**batch, "labels": changed}).loss - expected)) < 1e-5
    assert known.config is model.config


@pytest.mark.parametrize(
    "options, why",
    [({"output_hidden_states": True}, "output_hidden_states"), ({"labels": None}, "without labels")],
)
def test_what_a_trie_does_not_give(options, why):
    batch = {**padded(SEQUENCES), **options}
    with pytest.raises(NotTreeable, match=why):
        sk.OverTrie(lora())(**batch)
    found = sk.OverTrie(lora().eval())(**padded(SEQUENCES))
    with pytest.raises(NotTreeable, match="reads 'logits'"):
        _ = found.logits
