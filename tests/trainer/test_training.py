"""Training with SAPO attached: nothing else about the run changes, and every batch is of the choice in force."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from transformers import set_seed

import sapo_kernels as sk
from sapo_peft import SapoConfig, plain_scores
from tests.oracles import CHATML, byte_tokenizer
from tests.trainer.training_helpers import (
    AtSteps,
    adapter_digest,
    choices,
    colours,
    curve,
    lora_model,
    plain_trainer,
    pool_of,
    prefer,
    record_batches,
    sapo_trainer,
    texts_of,
)


def independent_collator(pool):
    """The rendering of one prompt, written down again: the chat template by hand, byte tokens, padding."""
    tokenizer = byte_tokenizer()

    def collate(rows):
        cells = []
        for row in rows:
            turn = f"{pool.prompts[0]}\n\nText:\n{row['input']}\n\n{pool.suffix}"
            context = tokenizer(f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
            cells.append((context, tokenizer(f"{row['target']}<|im_end|>\n")["input_ids"]))
        width = max(len(context) + len(response) for context, response in cells)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for context, response in cells:
            rest = width - len(context) - len(response)
            batch["input_ids"].append(context + response + [256] * rest)
            batch["attention_mask"].append([1] * (width - rest) + [0] * rest)
            batch["labels"].append([-100] * len(context) + response + [-100] * rest)
        return {name: torch.tensor(value) for name, value in batch.items()}

    return collate


@pytest.mark.parametrize("schedule, workers, scored", [
    ({"at_start": False}, 0, []),
    ({"every_steps": 2, "each_epoch": True}, 0, [0, 2, 4, 6]),
    ({"every_steps": 2, "each_epoch": True}, 2, [0, 2, 4, 6]),
])  # fmt: skip
def test_with_one_prompt_it_is_the_plain_trainer_bit_for_bit(tmp_path, schedule, workers, scored):
    """LoRA dropout, accumulation and shuffling all draw random numbers; one that scoring used would show."""
    options = dict(gradient_accumulation_steps=2, max_steps=7, logging_steps=2, dataloader_num_workers=workers)
    pool = pool_of(1)
    plain = plain_trainer(tmp_path, data_collator=independent_collator(pool), **options)
    plain.train()
    trainer, callback = sapo_trainer(
        tmp_path, pool, SapoConfig(probe_examples=4, packing="padded", **schedule), **options
    )
    trainer.train()
    assert [scoring.step for scoring in callback.history] == scored
    # Also where a scoring and a log fall on the same step.
    assert [step for step, *_ in curve(trainer)] == [2, 4, 6]
    assert curve(trainer) == curve(plain)
    assert adapter_digest(trainer.model) == adapter_digest(plain.model)


def test_the_choice_is_the_argmin_of_an_independent_scoring_at_that_step(tmp_path):
    """Three tasks; the adapter as it was at each scoring is put into a fresh model, which is scored the plain way."""
    pools, data = three_pools()
    probe = {task: [row for row in data if row["task"] == task][:4] for task in pools}
    trainer, callback = sapo_trainer(
        tmp_path, pools, SapoConfig(every_steps=3), probe, data=data, max_steps=10, learning_rate=5e-2
    )
    kept = {0: snapshot(trainer.model)}
    # Added after SAPO, hence called after it; scoring changes no weight.
    trainer.add_callback(AtSteps(lambda step: kept.update({step: snapshot(trainer.model)})))
    trainer.train()
    assert [scoring.step for scoring in callback.history] == [0, 3, 6, 9]
    tokenizer = byte_tokenizer(chat_template=CHATML)
    for scoring in callback.history:
        model = lora_model(seed=5)
        model.load_state_dict(kept[scoring.step])
        for task, pool in pools.items():
            cache = sk.ResponseCache.build(tokenizer, pool.prompts, probe[task], suffix=pool.suffix)
            tokens = torch.as_tensor(cache.response_lengths.reshape(len(pool.prompts), -1)).sum(1)
            loss = plain_scores(model, cache).sum(1) / tokens
            assert torch.allclose(loss, torch.tensor(scoring.losses[task], dtype=torch.float64), atol=1e-5, rtol=0)
            assert scoring.chosen[task] == int(loss.argmin()), (scoring.step, task)
    assert any(index for _, chosen in choices(callback) for index in chosen.values())


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def three_pools():
    pools = {name: pool_of(n, name, f"{name}. ") for name, n in (("a", 2), ("b", 5), ("c", 3))}
    rows = [row for rows in zip(*(colours(8, task) for task in pools), strict=True) for row in rows]
    return pools, rows


def test_a_mixture_is_updated_by_one_call_and_each_task_has_its_own_choice(tmp_path, monkeypatch):
    pools, data = three_pools()
    calls, plain = [], sk.reweight_
    monkeypatch.setattr(sk, "reweight_", lambda *a, **k: calls.append(a[1].shape) or plain(*a, **k))
    trainer, callback = sapo_trainer(tmp_path, pools, SapoConfig(every_steps=3, probe_examples=2), data=data)
    wanted = [[1, 4, 2], [0, 3, 1]]
    prefer(callback, wanted)
    batches = record_batches(trainer)
    trainer.train()
    assert [tuple(shape) for shape in calls] == [(3, 5)] * 2
    assert choices(callback) == [(0, {"a": 1, "b": 4, "c": 2}), (3, {"a": 0, "b": 3, "c": 1})]
    tasks = set()
    for batch in batches:
        chosen = wanted[0 if batch["step"] < 3 else 1]
        for context, _ in texts_of(trainer, batch):
            p, task = next((p, t) for p, t in enumerate(pools) if f"user\n{t}. " in context)
            assert f"user\n{pools[task].prompts[chosen[p]]}\n\nText:\n" in context
            tasks.add(task)
    assert tasks == set(pools)


@pytest.mark.parametrize("workers, accumulate, persistent", [(0, 1, False), (2, 2, False), (2, 1, True)])
def test_no_batch_is_stale_and_none_is_lost(tmp_path, workers, accumulate, persistent):
    """The choice changes at every step; each batch is of the choice before its step, each example once an epoch."""
    wanted = [1, 2, 0, 1, 2, 0]
    trainer, callback = sapo_trainer(
        tmp_path, config=SapoConfig(every_steps=1, probe_examples=2), dataloader_num_workers=workers,
        gradient_accumulation_steps=accumulate, dataloader_persistent_workers=persistent, data=colours(9),
    )  # fmt: skip
    prefer(callback, wanted)
    batches = record_batches(trainer)
    trainer.train()
    assert [scoring.chosen["colours"] for scoring in callback.history] == wanted
    prompts = callback.choice.pools["colours"].prompts
    answers, sources = {row["input"]: row["target"] for row in colours(9)}, []
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels", "step", "items"}
        for context, response in texts_of(trainer, batch):
            assert f"user\n{prompts[wanted[batch['step']]]}\n\nText:\n" in context, batch["step"]
            sources.append(context.split("Text:\n")[1].split("\n")[0])
            assert response == f"{answers[sources[-1]]}<|im_end|>\n"
    assert sorted(sources[:9]) == sorted(answers)
    assert accumulate == 1 or sorted(sources[9:]) == sorted(answers)
    for step in range(6):
        group = [batch for batch in batches if batch["step"] == step]
        assert len(group) in (1, accumulate)
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in group)
        assert all(int(batch["items"]) == items for batch in group)


def test_evaluation_uses_the_chosen_prompt_and_the_model_never_sees_what_a_batch_carries(tmp_path):
    trainer, callback = sapo_trainer(
        tmp_path, config=SapoConfig(every_steps=2, probe_examples=2), eval_dataset=colours(4), eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=4,
    )  # fmt: skip
    wanted = [2, 1, 0]
    prefer(callback, wanted)
    seen, plain = [], trainer.prediction_step

    def prediction_step(model, inputs, *args, **kwargs):
        seen.append((trainer.state.global_step, set(inputs), texts_of(trainer, inputs)))
        return plain(model, inputs, *args, **kwargs)

    trainer.prediction_step = prediction_step
    names: set[str] = set()
    trainer.model.register_forward_pre_hook(lambda m, args, kwargs: names.update(kwargs), with_kwargs=True)
    trainer.train()
    prompts = callback.choice.pools["colours"].prompts
    assert [step for step, *_ in seen] == [1, 2, 3, 4, 5, 6]
    for step, keys, rows in seen:
        assert keys == {"input_ids", "attention_mask", "labels"}
        assert len(rows) == 4
        assert all(f"user\n{prompts[wanted[min(step // 2, 2)]]}\n\nText:\n" in context for context, _ in rows)
    assert "sapo" not in names
    assert all(math.isfinite(row["eval_loss"]) for row in trainer.state.log_history if "eval_loss" in row)
    # Outside of train() as well.
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("attached", [False, True])
def test_a_trainer_is_freed_when_its_last_user_lets_go(tmp_path, attached):
    """Not by the cycle collector: memory would stay taken, and persistent workers would end after a timeout."""
    trainer = sapo_trainer(tmp_path, max_steps=1)[0] if attached else plain_trainer(tmp_path)
    if attached:
        trainer.train()
    enabled = gc.isenabled()
    gc.disable()
    try:
        there = weakref.ref(trainer)
        del trainer
        assert there() is None
    finally:
        if enabled:
            gc.enable()


@pytest.mark.parametrize("at_start", [True, False])
def test_a_second_run_of_the_same_trainer_starts_over(tmp_path, at_start):
    """The weights are kept: the second run is that of a new trainer with those weights."""
    # What records batches stands in front of the packing.
    config = SapoConfig(at_start=at_start, every_steps=2, decay=0.5, probe_examples=4, packing="padded")
    trainer, callback = sapo_trainer(tmp_path, config=config, max_steps=3)
    prefer(callback, [2, 2, 1, 1])
    trainer.train()
    assert callback.choice.chosen.tolist() == [2]
    weights = snapshot(trainer.model)
    callback.rescorer.agree = lambda value: value
    # The trainer would go on with its optimizer.
    trainer.optimizer = trainer.lr_scheduler = None
    batches = record_batches(trainer)
    set_seed(1)
    trainer.train()

    model = lora_model()
    model.load_state_dict(weights)
    other, fresh = sapo_trainer(tmp_path, config=config, max_steps=3, model=model)
    set_seed(1)
    other.train()
    assert [(s.step, s.reason, s.losses, s.chosen) for s in callback.history] == [
        (s.step, s.reason, s.losses, s.chosen) for s in fresh.history
    ]
    assert [s.step for s in callback.history] == [0, 2][not at_start :]
    assert callback.switches == fresh.switches and curve(trainer) == curve(other)
    assert adapter_digest(trainer.model) == adapter_digest(other.model)
    first = callback.choice.pools["colours"].prompts[callback.history[0].chosen["colours"] if at_start else 0]
    assert all(f"user\n{first}\n\n" in context for context, _ in texts_of(trainer, batches[0]))
