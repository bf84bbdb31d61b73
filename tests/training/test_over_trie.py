"""OverTrie: what a trainer's loss reads of a model, as the model itself or TRL's fused head gives it."""

from __future__ import annotations

import types

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model

import sapo_kernels as sk
from sapo_kernels.scoring.attention import NotTreeable
from tests.oracles import small_qwen3
from tests.training.test_tree_logprobs import BATCH, SEQUENCES, alone, lora
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


@pytest.mark.parametrize(
    "options, why",
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"labels": None}, "without labels"),
        ({"input_ids": None}, "without input_ids"),
        ({"labels": padded(SEQUENCES)["input_ids"]}, "labels: expected -100 where attention_mask is 0"),
        ({"labels": torch.full_like(padded(SEQUENCES)["input_ids"], -100)}, "at least one that is not -100"),
    ],
)
def test_what_a_trie_does_not_give(options, why):
    batch = {**padded(SEQUENCES), **options}
    with pytest.raises(NotTreeable, match=why):
        sk.OverTrie(lora())(**batch)
    found = sk.OverTrie(lora().eval())(**padded(SEQUENCES), position_ids=None)
    with pytest.raises(NotTreeable, match="reads 'logits'"):
        _ = found.logits
    with pytest.raises(NotTreeable, match="reads 'logits'"):
        found.get("logits")
    with pytest.raises(NotTreeable, match="reads 0 of its output"):
        _ = found[0]
    found.loss = 3 * found.loss
    assert found["loss"] is found.loss


def focal(logits, labels, vocab_size=None, **options):
    kept = labels[:, 1:] != -100
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][kept], labels[:, 1:][kept], reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


def own_function(monkeypatch):
    model = lora()
    model.get_base_model().loss_function = focal
    return model


def registered(monkeypatch):
    from transformers.loss import loss_utils

    # As if it came with a library.
    library = types.FunctionType(focal.__code__, {**globals(), "__name__": "transformers.loss.focal"}, "focal")
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "Focal", library)
    model = lora()
    model.get_base_model().loss_type = "Focal"
    return model


def orthogonal(monkeypatch):
    config = AdaLoraConfig(r=4, init_r=6, target_r=4, total_step=100, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return get_peft_model(small_qwen3(), config).train()


@pytest.mark.parametrize(
    "model, why",
    [
        (own_function, "its loss function .* is not code of a known library"),
        (registered, "its losses over the trie differ"),
        (orthogonal, "its losses over the trie differ"),
    ],
    ids=["own function", "registered", "AdaLoRA"],
)
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 40}], ids=["mean", "sum"])
def test_a_loss_of_the_models_own_is_refused(monkeypatch, model, why, options):
    model = model(monkeypatch)
    with pytest.raises(RuntimeError, match=why):
        sk.OverTrie(model)(**padded(SEQUENCES), **options)
    assert (sk.tree_logprobs(model, BATCH) - alone(model)).abs().max() < 2e-5, "log-probabilities need no loss"


def test_a_loss_that_is_replaced_later_is_seen(monkeypatch):
    model = lora()
    sk.OverTrie(model)(**padded(SEQUENCES))
    monkeypatch.setitem(__import__("transformers").loss.loss_utils.LOSS_MAPPING, "ForCausalLM", focal)
    with pytest.raises(RuntimeError, match="its loss function .* is not code of a known library"):
        sk.OverTrie(model)(**padded(SEQUENCES))


@pytest.mark.parametrize("grad", [True, False])
def test_low_precision_is_measured_on_tokens_not_on_one_number(grad):
    """The rounding of a mean is next to nothing now and then, and no bound."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = lora(small_qwen3().to(torch.bfloat16)).train()
        with torch.set_grad_enabled(grad):
            expected, got = model(**padded(SEQUENCES)).loss, sk.OverTrie(model)(**padded(SEQUENCES)).loss
        assert abs(float(got - expected)) < 0.05
