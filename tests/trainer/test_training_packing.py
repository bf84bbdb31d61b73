"""Training over a trie inside a trainer: the padded run's losses and weights, or padded rows and the reason."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from sapo_peft import SapoConfig
from tests.oracles import small_qwen3
from tests.trainer.test_training_ranks import pytestmark as needs_gloo
from tests.trainer.test_training_ranks import torchrun
from tests.trainer.training_helpers import colours, curve, lora_model, sapo_trainer


def run(folder, packing, tokens=None, config=None, **options):
    """(callback, losses and gradient norms, losses of evaluations, weights) of a run without dropout."""
    kept = SapoConfig(probe_examples=2, packing=packing, train_max_tokens=tokens, **(config or {}))
    options = {"model": lora_model(dropout=0.0), "per_device_train_batch_size": 4, **options}
    trainer, callback = sapo_trainer(folder, config=kept, **options)
    trainer.train()
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return callback, torch.tensor([row[1:] for row in curve(trainer)]), torch.tensor(evaluated), weights


VARIANTS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "workers": {"dataloader_num_workers": 1},
    "evaluation": {"eval_dataset": colours(6), "eval_strategy": "steps", "eval_steps": 3},
    "no count of items": {"average_tokens_across_devices": False},
}


@pytest.mark.parametrize("tokens", [None, 40], ids=["one forward", "in parts"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_norms_and_weights_are_those_of_padded_rows(tmp_path, variant, tokens):
    _, losses, evaluated, weights = run(tmp_path / "a", "padded", **VARIANTS[variant])
    callback, got, got_evaluated, got_weights = run(tmp_path / "b", "trie", tokens, **VARIANTS[variant])
    assert 0 < callback.packing.tokens < callback.packing.padded_tokens
    assert torch.allclose(got, losses, rtol=1e-4) and torch.allclose(got_evaluated, evaluated, rtol=1e-5)
    assert (got_weights - weights).norm() < 1e-3 * weights.norm()


def test_fifty_steps_end_within_a_ten_thousandth(tmp_path):
    options = dict(max_steps=50, learning_rate=1e-3)
    losses, got = (run(tmp_path / packing, packing, **options)[1][:, 0] for packing in ("padded", "trie"))
    assert (losses[0] - losses[-1]) > 0.1, "something was learnt"
    assert abs(float(got[-1] / losses[-1]) - 1) < 1e-4


def test_low_precision_and_the_same_bits_again(tmp_path):
    first, again = (run(tmp_path / name, "trie", bf16=True) for name in ("a", "b"))
    assert torch.equal(first[1], again[1]) and torch.equal(first[3], again[3])
    padded = run(tmp_path / "c", "padded", bf16=True)
    assert torch.allclose(first[1], padded[1], rtol=2e-2)


def test_dropout_is_drawn_and_auto_takes_the_trie(tmp_path):
    callback, losses, *_ = run(tmp_path, "auto", model=lora_model(dropout=0.5))
    assert callback.packing.agreed and callback.packing.tokens
    assert not torch.allclose(losses, run(tmp_path / "b", "auto", model=lora_model(dropout=0.0))[1])


def hooked():
    model = lora_model(dropout=0.0)
    model.get_base_model().model.layers[0].register_forward_hook(lambda *args: None)
    return model


def dropping():
    model = lora_model(dropout=0.0)
    model.config.attention_dropout = 0.1
    return model


def prompt_tuned():
    return get_peft_model(small_qwen3(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


REFUSED = {
    "virtual tokens": (
        dict(model=prompt_tuned, config={"at_start": False}),
        "adds virtual tokens in front of the text",
    ),
    "foreign code": (dict(model=hooked), "is not code of a known library"),
    "attention dropout": (dict(model=dropping), "its attention has a dropout of 0.1"),
    "label smoothing": (dict(label_smoothing_factor=0.1), "label_smoothing_factor needs whole batches"),
    "noise": (dict(neftune_noise_alpha=5.0), "neftune_noise_alpha needs whole batches"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_padded_once_said_or_refused(tmp_path, caplog, name):
    options, why = REFUSED[name]
    options = {key: value() if callable(value) else value for key, value in options.items()}
    with caplog.at_level(logging.WARNING, logger="sapo_peft"):
        callback, losses, *_ = run(tmp_path / "a", "auto", **options)
    said = [record.message for record in caplog.records if "padded" in record.message]
    assert len(said) == 1 and why in said[0] and callback.packing.tokens == 0
    with pytest.raises(RuntimeError, match=f"packing='trie': .*{why}"):
        run(tmp_path / "b", "trie", **options)


CHILD = """
import json, os, sys, torch
torch.set_num_threads(1)
from tests.trainer.test_training_packing import run
made = {}
for name in ("padded", "trie", "trie unused"):
    callback, losses, _, weights = run(f"{sys.argv[1]}/{name}", name.split()[0], max_steps=3,
        ddp_find_unused_parameters="unused" in name, average_tokens_across_devices=True)
    made[name] = {"losses": losses.tolist(), "sum": float(weights.double().sum()), "tokens": callback.packing.tokens}
from sapo_peft.trainer import ranks
if int(os.environ["RANK"]) == 0:
    open(sys.argv[1] + "/made.json", "w").write(json.dumps(made))
ranks.leave()
# DDP's threads may abort the interpreter at its end even so, seldom; all that is compared is written by now.
sys.stderr.flush()
os._exit(0)
"""


@needs_gloo
def test_two_ranks(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    done = torchrun(str(tmp_path / "child.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    padded, *tries = json.loads((tmp_path / "made.json").read_text()).values()
    for trie in tries:
        assert trie["tokens"]
        assert torch.allclose(torch.tensor(trie["losses"]), torch.tensor(padded["losses"]), rtol=1e-4)
        assert abs(trie["sum"] - padded["sum"]) < 1e-4 * abs(padded["sum"])
