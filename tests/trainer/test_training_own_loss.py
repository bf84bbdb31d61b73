"""Trainers, models and callbacks that do more than the libraries do: over tries as on padded rows, or padded rows."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, set_seed

import sapo_kernels as sk
from sapo_peft import SapoConfig
from sapo_peft.trainer import packing
from sapo_peft.trainer.packing import Packing
from tests.families import build
from tests.trainer.training_helpers import AtSteps, colours, curve, lora_model, sapo_trainer


def both(folder, tokens=None, setup=None, model=None, **options):
    """The callback of a run with packing="auto"; losses, gradient norms and evaluations are those of a padded one."""
    rows = []
    for how in ("padded", "auto"):
        config = SapoConfig(probe_examples=2, at_start=False, packing=how, train_max_tokens=tokens)
        defaults = dict(model=(model or (lambda: lora_model(dropout=0.0)))(), per_device_train_batch_size=4)
        trainer, callback = sapo_trainer(folder / how, config=config, **{**defaults, "max_steps": 3, **options})
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


class IdsStepped(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        return super().training_step(model, other_ids(inputs), *args, **kwargs)


class Masked(Trainer):
    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        inputs["attention_mask"][:, 3:8] = 0
        return inputs


class OnPadding(Trainer):
    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "labels": torch.where(inputs["attention_mask"] == 0, inputs["input_ids"], inputs["labels"])}


@pytest.mark.parametrize("kind", [LabelsPrepared, LabelsFetched, IdsStepped])
def test_a_changed_batch_is_trained_on_as_changed(tmp_path, kind):
    assert both(tmp_path, trainer_class=kind).packing.tokens


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Masked, "expected padding on the right"), (OnPadding, "expected -100 where attention_mask is 0")],
)
def test_what_no_trie_is_made_of_is_padded_and_said_once(tmp_path, caplog, kind, why):
    callback = both(tmp_path, trainer_class=kind)
    said = [record.message for record in caplog.records if "padded, not packed" in record.message]
    assert len(said) == 1 and why in said[0] and not callback.packing.tokens


class LabelsDrawn(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        labels = inputs["labels"].masked_fill(torch.rand(inputs["labels"].shape) < 0.5, -100)
        return super().compute_loss(model, {**inputs, "labels": labels}, *args, **kwargs)


class Mean:
    """Keeps what it is given."""

    def __init__(self):
        self.seen = []

    def __call__(self, value):
        self.seen.append(float(value))
        return sum(self.seen) / len(self.seen)


class Remembers(Trainer):
    """Its state is in objects of its own, an iterator and Python's random numbers."""

    def compute_loss(self, *args, **kwargs):
        if not hasattr(self, "mean"):
            random.seed(0)
            self.mean, self.weights = Mean(), itertools.cycle([1.0, 0.5, 2.0])
        loss = super().compute_loss(*args, **kwargs)
        return loss / self.mean(loss.detach()) * next(self.weights) * random.random()


class Referred(Trainer):
    """How far the logits are from those without the adapter, read when that is on again."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        outputs = model(**inputs)
        with torch.no_grad(), model.disable_adapter():
            reference = model(**inputs)
        return outputs.loss + (outputs.logits - reference.logits).square().mean()


class Decorated(Trainer):
    """A wrapper of torch's own stands where its method does."""

    @torch.enable_grad()
    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(**inputs).get("logits").square().mean()


@pytest.mark.parametrize("tokens", [None, 40], ids=["one forward", "in parts"])
@pytest.mark.parametrize("kind", [LabelsDrawn, Remembers, Referred, Decorated])
def test_a_loss_of_the_users_own_is_called_as_ever(tmp_path, caplog, kind, tokens):
    callback = both(tmp_path, tokens=tokens, trainer_class=kind)
    assert not callback.packing.tokens and caplog.text.count("compute_loss is the trainer's own") == 1


class ByOverTrie(Trainer):
    def compute_loss(self, model, *args, **kwargs):
        over = sk.OverTrie(model)
        assert isinstance(over, type(model))
        over.calls = getattr(model, "calls", 0) + 1
        return super().compute_loss(over, *args, **kwargs)


def test_a_loss_of_the_users_own_may_take_the_trie(tmp_path):
    curves = []
    for kind in (Trainer, ByOverTrie):
        config = SapoConfig(probe_examples=2, at_start=False, packing="padded")
        trainer, _ = sapo_trainer(
            tmp_path / kind.__name__, config=config, model=lora_model(dropout=0.0), trainer_class=kind, max_steps=3
        )
        trainer.train()
        curves.append(torch.tensor([row[1:] for row in curve(trainer)]))
    assert trainer.model.calls == 3 and torch.allclose(*curves, rtol=1e-5)


class ReadsLate(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        late = self.state.global_step == 1 if model.training else self.args.do_eval
        loss = outputs["loss"] + (outputs["logits"].square().mean() if late else 0.0)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("evaluated", [False, True])
def test_what_a_library_reads_that_a_trie_has_not_is_padded_from_then_on(tmp_path, caplog, monkeypatch, evaluated):
    monkeypatch.setattr(packing, "_own_code", lambda *_: None)
    more = dict(eval_dataset=colours(4), eval_strategy="steps", eval_steps=2, max_steps=4) if evaluated else {}
    callback = both(tmp_path, trainer_class=ReadsLate, **more)
    assert callback.packing.tokens and caplog.text.count("batches are padded") == 1
    assert caplog.text.count("reads 'logits'") == 1


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


class Decays(Trainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        for p in self.model.parameters():
            if p.requires_grad:
                p.grad += 0.5 * p.detach()
        return loss


def clamping():
    model = lora_model(dropout=0.0)
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda grad: grad.clamp(-1e-2, 1e-2))
    return model


def running_clip():
    """Gradients are cut at the mean norm of those that its hooks have seen."""
    model = lora_model(dropout=0.0)
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(functools.partial(cut, Mean()))
    return model


def cut(mean, grad):
    return grad * min(1.0, mean(grad.norm()) / max(float(grad.norm()), 1e-9))


def test_hooks_of_parameters_get_the_gradients_of_the_training_alone(tmp_path):
    assert both(tmp_path, model=running_clip, max_steps=4).packing.tokens


@pytest.mark.parametrize("options", [{"trainer_class": Decays}, {"model": clamping}], ids=["its step", "hooks"])
def test_what_counts_once_a_step_is_not_done_in_parts(tmp_path, caplog, options):
    callback = both(tmp_path, tokens=40, **options)
    assert caplog.text.count("train_max_tokens: batches go in one forward each") == 1 and callback.packing.tokens


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
