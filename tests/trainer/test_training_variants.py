"""Precision, recomputation, compiled models, several adapters, several processes: each trains and scores."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig

from sapo_peft import SapoConfig
from tests.trainer.test_training_ranks import pytestmark as needs_gloo
from tests.trainer.test_training_ranks import torchrun
from tests.trainer.training_helpers import curve, lora_model, pool_of, prefer, sapo_trainer


def run(tmp_path, model=None, **options):
    """A short run that scores twice and switches; (trainer, callback)."""
    config = options.pop("config", SapoConfig(every_steps=2, probe_examples=2))
    trainer, callback = sapo_trainer(tmp_path, config=config, model=model, max_steps=4, **options)
    prefer(callback, [1, 2])
    trainer.train()
    assert [scoring.step for scoring in callback.history] == [0, 2]
    assert callback.switches == 2 and callback.choice.chosen.tolist() == [2]
    losses = [loss for _, loss, _ in curve(trainer)]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    return trainer, callback


def test_bf16(tmp_path):
    """Autocast, 20 steps: it learns, switches and scores as float32 does but for rounding."""
    runs = []
    for bf16 in (False, True):
        config = SapoConfig(every_steps=5, probe_examples=4)
        trainer, callback = sapo_trainer(
            tmp_path, pool_of(4), config, model=lora_model(dropout=0.0), max_steps=20, bf16=bf16, learning_rate=2e-2,
            max_grad_norm=1.0,
        )  # fmt: skip
        measured = prefer(callback, [1, 2, 0, 3])
        trainer.train()
        losses = [loss for _, loss, _ in curve(trainer)]
        assert len(losses) == 20 and all(map(math.isfinite, losses))
        assert [scoring.step for scoring in callback.history] == [0, 5, 10, 15] and callback.switches == 4
        runs.append((torch.tensor(losses), torch.stack([sums[0] / sums[1] for sums in measured])))
    (plain, scored), (rounded, scored_too) = runs
    assert plain[-4:].mean() < plain[:4].mean() - 2, "it learns"
    # bfloat16 keeps 8 bits: a loss of 8 nats is known to about 0.03, and that much was found (0.036; scored 0.028).
    assert 0 < (plain - rounded).abs().max() < 0.1, (plain, rounded)
    assert (scored - scored_too).abs().max() < 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    plain, _ = run(tmp_path)
    trainer, _ = run(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for (_, a, _), (_, b, _) in zip(curve(plain), curve(trainer), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    layers = [module for module in trainer.model.modules() if hasattr(module, "gradient_checkpointing")]
    assert any(module.gradient_checkpointing for module in layers), "it is still on"


def test_a_compiled_model_is_not_compiled_again_for_scoring(tmp_path):
    torch._dynamo.reset()
    graphs = []

    def run_with(every):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = SapoConfig(every_steps=every, probe_examples=2)
        # One length of batch, so that shapes make no graphs.
        data = [{"input": f"{i}", "target": "red"} for i in range(8)]
        trainer, callback = sapo_trainer(
            tmp_path, pool_of(1), config, max_steps=2, data=data, torch_compile=True, torch_compile_backend="eager",
        )  # fmt: skip
        trainer.train()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return trainer, callback

    first, callback = run_with(100)
    second, often = run_with(1)
    assert len(callback.history) == 1 and len(often.history) == 2
    assert curve(first) == curve(second) and len(curve(first)) == 2
    assert graphs[0] == graphs[1] > 0, graphs
    torch._dynamo.reset()


def test_a_frozen_adapter_beside_the_one_that_trains(tmp_path):
    model = lora_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.05)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["second", "default"])
    model.set_requires_grad("default", False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trainer, _ = run(tmp_path, model)
    after = dict(trainer.model.named_parameters())
    assert {name: p.requires_grad for name, p in after.items()} == flags
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all(".second." in name for name in changed)
    assert list(model.active_adapters) == ["second", "default"]


CHILD = """
import json, sys, torch
torch.set_num_threads(1)
from sapo_kernels import Race
from sapo_peft import SapoConfig, attach_sapo
from tests.trainer.training_helpers import adapter_digest, choices, colours, curve, plain_trainer, pool_of, sapo_trainer

refused = plain_trainer(sys.argv[1])
try:
    attach_sapo(refused, pool_of(4, head="Now: " * refused.args.process_index))
except ValueError as error:
    refused = str(error)
race = Race(first=6, relative=0.02) if sys.argv[2] == "race" else None
config = SapoConfig(
    mode="hard" if race else sys.argv[2], temperature=0.5, every_steps=2, drift=0.5, drift_cooldown=1,
    probe_examples=20 if race else 2, race=race,
)
trainer, callback = sapo_trainer(
    sys.argv[1], pool_of(4), config, data=colours(32), save_strategy="steps", save_steps=3, learning_rate=5e-2
)
rank = trainer.args.process_index
if rank and not race:
    # What rounding does on another device, exaggerated: only rank 0's numbers may count.
    score = callback.rescorer.score
    import sapo_kernels as sk
    shared_out = sk.score_prompts_sharded
    def other(*args, **kwargs):
        scores = shared_out(*args, **kwargs)
        assert scores.stats["world"] == 2
        scores.nll.mul_(torch.arange(4.0, 0.0, -1.0, dtype=scores.nll.dtype)[:, None])
        return scores
    sk.score_prompts_sharded = other
seen = []
step = trainer.training_step
def training_step(model, inputs, *rest):
    seen.append(inputs["input_ids"][0, :60].tolist())
    return step(model, inputs, *rest)
trainer.training_step = training_step
trainer.train()
decode = trainer.processing_class.decode
made = {"choices": choices(callback), "saved": [s.cells_saved for s in callback.history],
        "reasons": [s.reason for s in callback.history],
        "refused": refused, "world": trainer.args.world_size, "texts": [decode(ids) for ids in seen],
        "steps": trainer.state.global_step, "losses": [loss for _, loss, _ in curve(trainer)],
        "adapter": adapter_digest(trainer.accelerator.unwrap_model(trainer.model))}
open(f"{sys.argv[1]}/rank{rank}.json", "w").write(json.dumps(made))
torch.distributed.destroy_process_group()
"""


@needs_gloo
@pytest.mark.parametrize("mode", ["hard", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("soft", "race"))])
def test_two_processes_choose_the_same(tmp_path, mode):
    """DDP over gloo; the second process measures something else, and still follows the first."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    done = torchrun(str(script), str(tmp_path), mode)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["world"] == 2 and first["steps"] == second["steps"] == 6
    assert first["refused"] == "rank 1: expected the pools and template and probe of rank 0, got others"
    for name in ("refused", "choices", "reasons", "adapter", "losses", "saved"):
        assert first[name] == second[name], name
    assert [step for step, _ in first["choices"]][:3] == [0, 2, 4]
    assert first["texts"] != second["texts"], "each has its own examples"
    assert mode != "race" or max(first["saved"]) > 0.1
    assert (tmp_path / "checkpoint-6" / "sapo_prompts.json").is_file()
