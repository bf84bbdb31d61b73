"""Training one task of a sequence with HF's Trainer, on the prompt that the policy says."""

from __future__ import annotations

import logging
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

import sapo_kernels as sk

from ..trainer.attach import attach_sapo
from ..trainer.config import SapoConfig
from ..trainer.records import prompt_record
from .config import SequenceConfig, derived_seed
from .methods import Adapters
from .tasks import SequenceTask


@dataclass
class Trained:
    """What training one task did.

    chosen: the prompt it ended with. scorings: one dict each, see `scoring_record`. losses: (step, mean loss of the
    steps up to it), nats per token; penalties: likewise lambda_1 * orthogonality. tokens: that went through the model.
    record: the content of ``sapo_prompts.json``.
    """

    chosen: int = 0
    scorings: list[dict[str, Any]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    penalties: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    score_seconds: float = 0.0
    tokens: int = 0
    examples: int = 0
    notes: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)


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


class _Settled(TrainerCallback):
    """Puts what a policy has chosen in place, once SAPO's callback has begun the run with the original."""

    def __init__(self, choice: Any, prompt: int, sample: bool):
        self.choice, self.prompt, self.sample = choice, prompt, sample

    def on_train_begin(self, args, state, control, **kwargs):
        self.choice.chosen[0] = self.prompt
        if self.sample:
            self.choice.state.probs.fill_(1.0 / self.choice.state.num_prompts)


class _Ticker(TrainerCallback):
    def __init__(self, tick: Callable[[int, float | None], None]):
        self.tick, self.loss = tick, None

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args, state, control, **kwargs):
        self.tick(state.global_step, self.loss)


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
    tick: Callable[[int, float | None], None] | None = None,
) -> Trained:
    """Choose the prompt of the `index`-th task (from 1) and train the newest adapter on it.

    `tick` hears each step and the newest loss. The pool must have been checked with the tokenizer.
    """
    found = Trained(examples=len(task.train))
    probe = list(task.train[: config.probe_examples])
    if config.policy == "worst" or (config.score_always and config.policy != "sapo"):
        found.scorings.append(score_pool(adapters.model, tokenizer, task, probe, config))
    fixed = _fixed_prompt(task, index, config, found)
    for scoring in found.scorings:
        scoring["chosen"] = fixed
        scoring["weights"] = [1.0 / len(task.pool.prompts) if config.policy == "sample" else float(k == fixed)
                              for k in range(len(task.pool.prompts))]  # fmt: skip
    seed = derived_seed(config.seed, index, "train")
    # Nothing is written by the trainer; it wants a folder all the same.
    with tempfile.TemporaryDirectory(prefix="sapo-") as scratch:
        trainer = _trainer(adapters, tokenizer, task, config, seed, scratch)
        sapo = config.policy == "sapo"
        options = SapoConfig(
            mode="soft" if config.policy == "sample" else "hard", at_start=sapo, every_steps=config.every_steps,
            each_epoch=config.each_epoch, drift=config.drift, probe_examples=config.probe_examples,
            max_source=config.max_source, max_target=config.max_target, train_max_target=config.max_target,
            seed=derived_seed(config.seed, index, "sample"), race=sk.Race() if config.race else None,
        )  # fmt: skip
        callback = attach_sapo(trainer, task.pool, {task.pool.task: probe} if sapo else None, options)
        if not sapo:
            trainer.add_callback(_Settled(callback.choice, fixed, config.policy == "sample"))
        if tick is not None:
            trainer.add_callback(_Ticker(tick))
        # Dropout draws from here on, whatever was drawn for the choice.
        set_seed(seed)
        started = time.perf_counter()
        with _quiet():
            trainer.train()
        adapters.settle()
        found.seconds = time.perf_counter() - started - callback.score_seconds
    found.scorings += [scoring_record(scoring, task.pool.task) for scoring in callback.history]
    found.score_seconds = math.fsum(scoring["seconds"] for scoring in found.scorings)
    found.chosen = int(callback.choice.chosen[0])
    found.tokens = int(torch.stack(trainer.tokens).sum()) if trainer.tokens else 0
    found.losses, found.penalties = _windows(trainer.parts, config.logging_steps)
    found.record = prompt_record(callback.choice, callback.history[-1] if callback.history else None)
    if lost := callback.scorings - len(callback.history):
        found.notes.append(f"task {task.name}: the first {lost} of {callback.scorings} scorings are not recorded")
    if not all(math.isfinite(loss) for _, loss in found.losses):
        found.notes.append(f"task {task.name}: the training loss is not finite; lower the learning rate")
    return found


def score_pool(model: Any, tokenizer: Any, task: SequenceTask, probe: list, config: SequenceConfig) -> dict[str, Any]:
    """The scoring of a task's pool by the model as it is, as a `scoring_record`."""
    started = time.perf_counter()
    pool = task.pool
    scores = sk.score_prompts(
        model, list(pool.prompts), probe, tokenizer=tokenizer, suffix=pool.suffix, text_word=pool.text_word,
        max_source=config.max_source, max_target=config.max_target, progress=False,
    )  # fmt: skip
    return {
        "step": 0,
        "reason": "start",
        "loss": [loss if math.isfinite(loss) else None for loss in scores.loss.tolist()],
        "tokens": scores.tokens.sum(1).tolist(),
        "weights": [],
        "chosen": 0,
        "seconds": time.perf_counter() - started,
        "dense_tokens": scores.stats["dense_tokens"],
        "computed_tokens": scores.stats["trie_tokens"],
    }


def scoring_record(scoring: Any, task: str) -> dict[str, Any]:
    """One scoring of the callback as an entry of ``scores.json``; the weights of mode "hard" are one-hot."""
    losses, chosen = scoring.losses[task], scoring.chosen[task]
    return {
        "step": scoring.step,
        # "every 7 steps", "epoch 1", "drift of +3.1 standard errors"
        "reason": "steps" if scoring.reason.startswith("every") else scoring.reason.split()[0],
        "loss": [loss if math.isfinite(loss) else None for loss in losses],
        "tokens": scoring.tokens[task],
        "weights": [float(k == chosen) for k in range(len(losses))],
        "chosen": chosen,
        "seconds": scoring.seconds,
        "dense_tokens": scoring.dense_tokens,
        "computed_tokens": scoring.computed_tokens,
    }


def _fixed_prompt(task: SequenceTask, index: int, config: SequenceConfig, found: Trained) -> int | None:
    """The prompt that the policy takes for the whole task; None: the callback chooses."""
    prompts = len(task.pool.prompts)
    if config.policy == "sapo":
        return None
    if config.policy == "random" and prompts > 1:
        return random.Random(derived_seed(config.seed, index, "prompt")).randrange(1, prompts)
    if config.policy == "worst":
        losses = [(-loss, k) for k, loss in enumerate(found.scorings[0]["loss"]) if loss is not None]
        if losses:
            return min(losses)[1]
        found.notes.append(f"task {task.name}: no prompt has a finite loss; the original was taken")
    return 0


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


def _windows(parts: list, size: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, mean over the steps since the last one) of losses and penalties, every `size` steps and at the end."""
    if not parts:
        return [], []
    count = parts[-1][0]
    sums = [[0.0] * (count + 1) for _ in range(2)]
    penalised = any(penalty is not None for _, _, penalty in parts)
    for step, loss, penalty in parts:
        sums[0][step] += float(loss)
        sums[1][step] += 0.0 if penalty is None else float(penalty)
    ends = [*range(size, count, size), count]
    starts = [0, *ends[:-1]]
    means = [[(b, math.fsum(values[a + 1 : b + 1]) / (b - a)) for a, b in zip(starts, ends, strict=True)]
             for values in sums]  # fmt: skip
    return means[0], means[1] if penalised else []
