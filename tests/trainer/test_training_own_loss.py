"""Trainers, models and callbacks that do more than the libraries do: over tries as on padded rows, or padded rows."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, set_seed

from sapo_peft import SapoConfig
from sapo_peft.trainer.packing import Packing
from tests.families import build
from tests.trainer.training_helpers import AtSteps, colours, curve, lora_model, sapo_trainer


def both(folder, tokens=None, setup=None, model=None, **options):
    """The callback of a run with packing="auto"; losses, gradient norms and evaluations are those of a padded one."""
    rows = []
    for packing in ("padded", "auto"):
        config = SapoConfig(probe_examples=2, at_start=False, packing=packing, train_max_tokens=tokens)
        defaults = dict(model=(model or (lambda: lora_model(dropout=0.0)))(), per_device_train_batch_size=4)
        trainer, callback = sapo_trainer(folder / packing, config=config, **{**defaults, "max_steps": 3, **options})
        if setup:
            setup(trainer)
        trainer.train()
        found = [row[1:] for row in curve(trainer)]
        found += [(row["eval_loss"], 0.0) for row in trainer.state.log_history if "eval_loss" in row]
        rows.append(torch.tensor(found))
    assert len(rows[0]) >= 3 and torch.allclose(*rows, rtol=1e-5), rows
    return callback


def unlabelled(labels):
    """Without the first token of each response."""
    return labels.scatter(1, (labels != -100).int().argmax(1, keepdim=True), -100)


def other_ids(inputs):
    ids = inputs["input_ids"].clone()
    ids[(inputs["labels"] == -100) & (torch.arange(ids.shape[1]) % 7 == 3)] = 40
    return {**inputs, "input_ids": ids}


class LabelsPrepared(Trainer):
    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "labels": unlabelled(inputs["labels"])}


class LabelsFetched(Trainer):
    def get_batch_samples(self, *args):
        batches, count = super().get_batch_samples(*args)
        for batch in batches:
            batch["labels"].copy_(unlabelled(batch["labels"]))
        return batches, count


class LabelsInPlace(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs["labels"].copy_(unlabelled(inputs["labels"]))
        return super().compute_loss(model, inputs, *args, **kwargs)


class LabelsDrawn(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        labels = inputs["labels"].masked_fill(torch.rand(inputs["labels"].shape) < 0.5, -100)
        return super().compute_loss(model, {**inputs, "labels": labels}, *args, **kwargs)


class IdsStepped(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        return super().training_step(model, other_ids(inputs), *args, **kwargs)


class IdsOfLoss(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, other_ids(inputs), *args, **kwargs)


class Counts(Trainer):
    calls = 0

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        return super().compute_loss(*args, **kwargs) * self.calls


@pytest.mark.parametrize(
    "kind", [LabelsPrepared, LabelsFetched, LabelsInPlace, LabelsDrawn, IdsStepped, IdsOfLoss, Counts]
)
def test_a_changed_batch_is_trained_on_as_changed(tmp_path, kind):
    assert both(tmp_path, trainer_class=kind).packing.tokens


class Masked(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        mask = inputs["attention_mask"].clone()
        mask[:, 3:8] = 0
        return super().compute_loss(model, {**inputs, "attention_mask": mask}, *args, **kwargs)


class OnPadding(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        labels = torch.where(inputs["attention_mask"] == 0, inputs["input_ids"], inputs["labels"])
        return super().compute_loss(model, {**inputs, "labels": labels}, *args, **kwargs)


class AsksForLogits(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        outputs = model(**inputs)
        logits = outputs.get("logits")
        return outputs["loss"] + (0 if logits is None else 0.1 * logits.square().mean())


class ReadsLate(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        outputs = model(**inputs)
        return outputs["loss"] + (outputs["logits"].square().mean() if self.state.global_step == 1 else 0.0)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Masked, "expected padding on the right"),
        (OnPadding, "expected -100 where attention_mask is 0"),
        (AsksForLogits, "compute_loss: its losses over the trie differ"),
        (ReadsLate, "reads 'logits'"),
    ],
)
def test_what_a_trie_has_not_is_padded_from_then_on_and_said_once(tmp_path, caplog, kind, why):
    callback = both(tmp_path, trainer_class=kind)
    said = [record.message for record in caplog.records if "padded, not packed" in record.message]
    assert len(said) == 1 and why in said[0]
    assert bool(callback.packing.tokens) == (kind is ReadsLate)


class ReadsInEvaluation(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = outputs["loss"] if model.training else outputs["loss"] + outputs["logits"].square().mean()
        return (loss, outputs) if return_outputs else loss


def test_logits_read_in_evaluation_alone_leave_training_as_it_is(tmp_path, caplog):
    options = dict(eval_dataset=colours(4), eval_strategy="steps", eval_steps=2, max_steps=4)
    callback = both(tmp_path, trainer_class=ReadsInEvaluation, **options)
    assert caplog.text.count("evaluation is padded") == 1
    trained = callback.packing.tokens
    plain = both(tmp_path / "plain", trainer_class=Trainer, **options)
    assert trained == plain.packing.tokens > 0


def centred(module, args, output):
    first = output[0] if isinstance(output, tuple) else output
    first = first - first.mean(1, keepdim=True)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def clamped(module, given, got):
    return tuple(g if g is None else g.clamp(-2e-3, 2e-3) for g in given)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda layer: layer.register_forward_hook(centred), "a forward hook"),
        (lambda layer: layer.register_full_backward_hook(clamped), "a backward hook"),
        (lambda layer: setattr(layer.self_attn.config, "attention_dropout", 0.5), "dropout of 0.5"),
    ],
    ids=["forward hook", "backward hook", "dropout"],
)
def test_a_model_that_changes_during_a_run_is_looked_at_again(tmp_path, caplog, change, why):
    def setup(trainer):
        layer = trainer.model.base_model.model.model.layers[0]
        trainer.add_callback(AtSteps(lambda step: change(layer) if step == 1 else None))

    callback = both(tmp_path, setup=setup)
    assert callback.packing.tokens and why in caplog.text


class Regularised(Trainer):
    def compute_loss(self, *args, **kwargs):
        weights = [p for p in self.model.parameters() if p.requires_grad]
        return Trainer.compute_loss(self, *args, **kwargs) + 0.5 * sum(p.square().sum() for p in weights)


class Decorated(Trainer):
    """A wrapper of torch's own stands where its method does."""

    @torch.enable_grad()
    def compute_loss(self, *args, **kwargs):
        return Regularised.compute_loss(self, *args, **kwargs)


class OwnModel(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return self.model(**inputs).loss


def clamping():
    model = lora_model(dropout=0.0)
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda grad: grad.clamp(-1e-2, 1e-2))
    return model


@pytest.mark.parametrize(
    "options",
    [{"trainer_class": kind} for kind in (Regularised, Decorated, OwnModel)] + [{"model": clamping}],
    ids=["regulariser", "behind a decorator", "its model", "hooks of parameters"],
)
def test_what_counts_once_a_step_is_not_done_in_parts(tmp_path, caplog, options):
    callback = both(tmp_path, tokens=40, **options)
    assert caplog.text.count("train_max_tokens: batches go in one forward each") == 1
    # Of that trainer nothing goes over a trie.
    assert bool(callback.packing.tokens) == (options.get("trainer_class") is not OwnModel)


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def windowed():
    set_seed(0)
    model = build(
        "qwen2_moe", vocab_size=300, use_sliding_window=True, sliding_window=96, max_position_embeddings=1024,
        layer_types=["sliding_attention"] * 3,
    )  # fmt: skip
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def test_longer_batches_are_checked_before_they_are_taken(tmp_path, caplog):
    fox = "the quick brown fox jumps over it and "
    long = [{"input": fox + "again and again", "target": "yes it does"}, {"input": fox + "sleeps", "target": "no"}]
    data = [{"input": "a", "target": "x"}] * 4 + long * 4
    callback = both(tmp_path, model=windowed, data=data, trainer_class=InOrder)
    assert callback.packing.tokens and callback.packing.differs < 200
    assert f"batches with a row of {callback.packing.differs} tokens or more are padded" in caplog.text
    with pytest.raises(RuntimeError, match="packing='trie'"):
        config = SapoConfig(probe_examples=2, at_start=False, packing="trie")
        sapo_trainer(
            tmp_path / "trie", config=config, model=windowed(), data=data, trainer_class=InOrder, max_steps=3,
            per_device_train_batch_size=4,
        )[0].train()  # fmt: skip


def test_checks_are_few_where_each_batch_is_longer(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(Packing, "_reason", lambda self, trainer, model, batch: checked.append(batch.longest))
    data = [{"input": "x" * (n // 4 * 4), "target": "y"} for n in range(80)]
    callback = both(tmp_path, data=data, trainer_class=InOrder, max_steps=20)
    assert callback.packing.tokens and 2 <= len(checked) <= 4
    assert all(after >= 1.25 * before for before, after in zip(checked, checked[1:], strict=False))
