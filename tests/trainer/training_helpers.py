"""Tiny trainers with SAPO attached, and what the tests of the training layer look at."""

from __future__ import annotations

import hashlib
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from sapo_peft import PromptPool, SapoConfig, attach_sapo
from tests.oracles import CHATML, byte_tokenizer, small_qwen3

WORDS = ("red", "blue", "green", "black", "white", "brown", "pink", "grey", "gold", "lime", "teal", "navy", "plum",
         "rust", "sand", "snow")  # fmt: skip
PHRASINGS = (
    "Say the colour.",
    "Which colour is it?",
    "Name it:",
    "Repeat the word that stands below, please.",
    "Write the colour again",
)


def colours(n: int = 16, task: str | None = None) -> list[dict[str, str]]:
    """Examples whose input and response have different lengths from one to the next."""
    rows = [{"input": f"{WORDS[i % 16]} {'x' * (i % 5)}{i}", "target": WORDS[(7 * i) % 16]} for i in range(n)]
    return [{**row, "task": task} for row in rows] if task else rows


def pool_of(n: int = 3, task: str = "colours", head: str = "") -> PromptPool:
    texts = [head + text for text in PHRASINGS[:n]]
    return PromptPool.build(task, texts[0], texts[1:], suffix="One word.")


def lora_model(dropout: float = 0.1, seed: int = 0, **options):
    set_seed(seed)
    lora = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(small_qwen3(**options), lora)


def plain_trainer(out, data=None, model=None, trainer_class=Trainer, tokenizer=True, **options) -> Trainer:
    """A Trainer on the CPU: 2 examples a step, 6 steps, every loss logged, nothing saved."""
    defaults: dict[str, Any] = dict(
        output_dir=str(out), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=1, remove_unused_columns=False,
    )  # fmt: skip
    others = {name: options.pop(name) for name in ("eval_dataset", "data_collator") if name in options}
    return trainer_class(
        lora_model() if model is None else model,
        TrainingArguments(**{**defaults, **options}),
        train_dataset=colours() if data is None else data,
        processing_class=byte_tokenizer(chat_template=CHATML) if tokenizer else None,
        **others,
    )


def sapo_trainer(out, pools=None, config: SapoConfig | None = None, probe=None, **options):
    """(trainer, callback); pools default to one of three prompts, the probe to four examples of each task."""
    trainer = plain_trainer(out, **options)
    config = config or SapoConfig(probe_examples=4)
    return trainer, attach_sapo(trainer, pools or pool_of(), probe, config)


def curve(trainer) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every training log."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


def adapter_digest(model) -> str:
    """SHA-256 of the adapter's names and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(get_peft_model_state_dict(model).items()):
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def choices(callback) -> list[tuple[int, dict[str, int]]]:
    return [(scoring.step, scoring.chosen) for scoring in callback.history]


def prefer(callback, wanted: list[int] | list[list[int]]) -> list[torch.Tensor]:
    """Make the i-th scoring choose prompt ``wanted[i]`` of every pool (or one by pool); returns what was measured."""
    seen: list[torch.Tensor] = []

    def agree(sums):
        if sums.ndim == 3:
            forced = sums.clone()
            forced[0, torch.arange(sums.shape[1]), wanted[len(seen)]] = 0.0
            seen.append(sums)
            return forced
        return sums

    callback.rescorer.agree = agree
    return seen


def record_batches(trainer) -> list[dict[str, Any]]:
    """Everything that reaches `training_step`: the batch, the step, the number of items."""
    # No reference to the trainer: its workers would be ended by the cycle collector, late.
    seen, this, plain = [], weakref.ref(trainer), type(trainer).training_step

    def training_step(model, inputs, num_items_in_batch=None):
        trainer = this()
        seen.append({**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()},
                     "step": trainer.state.global_step, "items": num_items_in_batch})  # fmt: skip
        return plain(trainer, model, inputs, num_items_in_batch)

    trainer.training_step = training_step
    return seen


def texts_of(trainer, batch) -> list[tuple[str, str]]:
    """(context, response) of every row, decoded by the labels alone."""
    decode = trainer.processing_class.decode
    rows = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        on = labels != -100
        assert not bool((on & (mask == 0)).any()) and torch.equal(ids[on], labels[on])
        rows.append((decode(ids[(mask == 1) & ~on]), decode(ids[on])))
    return rows


class AtSteps(TrainerCallback):
    """Calls ``action(step)`` after every optimizer step, before or after SAPO by where it is added."""

    def __init__(self, action):
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        self.action(state.global_step)


def environment() -> dict[str, str]:
    """Of a child process: this checkout first, no hub, one thread."""
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
