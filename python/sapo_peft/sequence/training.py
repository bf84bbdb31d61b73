"""Training one task of a sequence with HF's Trainer, on the prompt that the policy says."""

from __future__ import annotations

import logging
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import sapo_kernels as sk

from ..trainer.attach import attach_sapo
from ..trainer.config import SapoConfig
from .config import SequenceConfig, derived_seed
from .methods import Adapters
from .schema import Scores, ScoringRecord, Training, finite
from .tasks import SequenceTask


@dataclass(frozen=True)
class TrainedTask:
    """What training one task did; prompts: the content of ``sapo_prompts.json``."""

    scores: Scores
    train: Training
    prompts: dict[str, Any]


class _TaskTrainer(Trainer):
    """A `Trainer` that adds a penalty to the loss and keeps both apart in what it reports."""

    def __init__(self, *args, penalty: Callable[[], torch.Tensor | None], **options):
        super().__init__(*args, **options)
        self.penalty = penalty
        # Of every batch: the step, its share in the step's loss, and in the penalty.
        self.parts: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
        self.tokens: list[torch.Tensor] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.tokens.append(inputs["attention_mask"].sum())
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        penalty = self.penalty()
        # Either the batches of a step share one sum, or the trainer divides each by how many they are.
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        steps = self.current_gradient_accumulation_steps
        share = 1.0 if scaled else 1.0 / steps
        self.parts.append(
            (self.state.global_step + 1, loss.detach() * share, None if penalty is None else penalty.detach() / steps)
        )
        if penalty is not None:
            loss = loss + (penalty / steps if scaled else penalty)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **options):
        # The loss alone, for logs and for drift: what a re-scoring predicts has no penalty in it.
        super().training_step(*args, **options)
        return self.parts[-1][1]


class _Policy(TrainerCallback):
    """Puts what a policy other than SAPO chooses in place, once SAPO's callback has begun the run with the original.

    `tick` hears each step.
    """

    def __init__(
        self, sapo: Any, task: SequenceTask, index: int, config: SequenceConfig,
        tick: Callable[[int], None] | None = None,
    ):  # fmt: skip
        self.sapo, self.task, self.index, self.config, self.tick = sapo, task, index, config, tick
        self.notes: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        choice = self.sapo.choice
        if self.config.policy != "sapo":
            choice.chosen[0] = self._prompt()
        if self.config.policy == "sample":
            choice.state.probs.fill_(1.0 / choice.state.num_prompts)

    def on_step_end(self, args, state, control, **kwargs):
        if self.tick is not None:
            self.tick(state.global_step)

    def _prompt(self) -> int:
        prompts, policy = len(self.task.pool.prompts), self.config.policy
        if policy == "random" and prompts > 1:
            return random.Random(derived_seed(self.config.seed, self.index, "prompt")).randrange(1, prompts)
        if policy == "worst":
            losses = self.sapo.history[-1].losses[self.task.pool.task]
            known = [(-loss, k) for k, loss in enumerate(losses) if math.isfinite(loss)]
            if known:
                return min(known)[1]
            self.notes.append(f"task {self.task.name}: no prompt has a finite loss; the original was taken")
        return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """No line for every switch, unless somebody set the log's level: the run has its own report."""
    logger = logging.getLogger("sapo_peft")
    level = logger.level
    if level == logging.NOTSET:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def steps_of(task: SequenceTask, config: SequenceConfig) -> int:
    """Optimizer steps of one task, as the trainer counts them."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(len(task.train) / config.batch_size)
    return max(1, math.ceil(config.epochs * math.ceil(batches / config.gradient_accumulation)))


def train_task(
    adapters: Adapters,
    tokenizer: Any,
    task: SequenceTask,
    index: int,
    config: SequenceConfig,
    tick: Callable[[int], None] | None = None,
    scoring: Callable[[str, int], Any] | None = None,
    now: datetime | None = None,
) -> TrainedTask:
    """Choose the prompt of the `index`-th task (from 1) and train the newest adapter on it.

    `tick` hears each step; `scoring` is `Rescorer.progress`, `now` as in `SapoConfig`. The pool
    must have been checked with the tokenizer.

    Raises: `FloatingPointError`: training has left a weight that is no number.
    """
    sapo, probe = config.policy == "sapo", list(task.train[: config.probe_examples])
    scored = sapo or config.policy == "worst" or config.score_always
    seed = derived_seed(config.seed, index, "train")
    # Nothing is written by the trainer; it wants a folder all the same.
    with tempfile.TemporaryDirectory(prefix="sapo-") as scratch:
        trainer = _trainer(adapters, tokenizer, task, config, seed, scratch)
        options = SapoConfig(
            mode="soft" if config.policy == "sample" else "hard", at_start=scored, every_steps=config.every_steps,
            each_epoch=config.each_epoch, drift=config.drift, probe_examples=config.probe_examples,
            max_source=config.max_source, max_target=config.max_target, train_max_target=config.max_target,
            seed=derived_seed(config.seed, index, "sample"), race=sk.Race() if config.race else None,
            instruction_role=config.instruction_role, now=now,
        )  # fmt: skip
        callback = attach_sapo(trainer, task.pool, {task.pool.task: probe} if scored else None, options)
        if callback.rescorer is not None:
            callback.rescorer.progress = scoring
        policy = _Policy(callback, task, index, config, tick)
        trainer.add_callback(policy)
        started = time.perf_counter()
        with _quiet():
            trainer.train()
            callback.check_finite()
        adapters.settle()
        seconds = time.perf_counter() - started - callback.score_seconds
    losses, penalties = _windows(trainer.parts, config.logging_steps)
    chosen = int(callback.choice.chosen[0])
    scorings = [_record(scoring, task, None if sapo else chosen, config.policy) for scoring in callback.history]
    return TrainedTask(
        Scores(task=task.name, prompts=list(task.pool.prompts), suffix=task.pool.suffix, chosen=chosen,
               scorings=scorings),
        Training(losses=losses, penalties=penalties, seconds=seconds, examples=len(task.train), notes=policy.notes,
                 tokens=int(torch.stack(trainer.tokens).sum()) if trainer.tokens else 0),
        callback.prompts(),
    )  # fmt: skip


def _record(scoring: Any, task: SequenceTask, fixed: int | None, policy: str) -> ScoringRecord:
    """One scoring of the callback; `fixed` is what another policy than SAPO made of it."""
    losses = scoring.losses[task.pool.task]
    chosen = scoring.chosen[task.pool.task] if fixed is None else fixed
    return ScoringRecord(
        step=scoring.step,
        # "every 7 steps", "epoch 1", "drift of +3.1 standard errors"
        reason="steps" if scoring.reason.startswith("every") else scoring.reason.split()[0],
        loss=[finite(loss) for loss in losses],
        tokens=scoring.tokens[task.pool.task],
        weights=[1.0 / len(losses) if policy == "sample" else float(k == chosen) for k in range(len(losses))],
        chosen=chosen,
        seconds=scoring.seconds,
        dense_tokens=scoring.dense_tokens,
        computed_tokens=scoring.computed_tokens,
    )


def _trainer(
    adapters: Adapters, tokenizer: Any, task: SequenceTask, config: SequenceConfig, seed: int, scratch: str
) -> _TaskTrainer:
    cpu = next(adapters.model.parameters()).device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=scratch, num_train_epochs=config.epochs, max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size, gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate, lr_scheduler_type="cosine", warmup_steps=config.warmup,
        weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm, logging_steps=config.logging_steps,
        save_strategy="no", report_to=[], disable_tqdm=True, seed=seed, data_seed=seed, bf16=config.bf16,
        use_cpu=cpu, remove_unused_columns=False, logging_nan_inf_filter=False,
        **({"gradient_checkpointing": True} if config.gradient_checkpointing else {}), **(config.trainer or {}),
    )  # fmt: skip
    # Several visible GPUs would make the trainer copy the model to all of them for every batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = _TaskTrainer(
        adapters.model, arguments, train_dataset=list(task.train), processing_class=tokenizer, penalty=adapters.penalty
    )
    # It prints every log to the standard output.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _windows(parts: list, size: int) -> tuple[list[tuple[int, float | None]], ...]:
    """(step, mean over the steps since the last one) of losses and penalties, every `size` steps and at the end."""
    if not parts:
        return [], []
    steps, count = [step for step, _, _ in parts], parts[-1][0]
    ends = [*range(size, count, size), count]
    starts = [0, *ends[:-1]]
    found = []
    for values in zip(*((loss, penalty) for _, loss, penalty in parts), strict=True):
        if values[0] is None:
            found.append([])
            continue
        sums = np.bincount(steps, weights=torch.stack(values).double().cpu().numpy())[1:]
        means = np.add.reduceat(sums, starts) / np.diff([0, *ends])
        found.append([(step, finite(mean)) for step, mean in zip(ends, means.tolist(), strict=True)])
    return tuple(found)
