"""SequenceConfig: everything that decides what a sequence run does."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

METHODS = ("lora-inc", "o-lora", "seq-lora")
POLICIES = ("original", "sapo", "random", "worst", "sample")
EVALUATE = ("all", "seen", "last")


@dataclass(frozen=True)
class SequenceConfig:
    """The options of `run_sequence`; the defaults are the paper's set-up where it says anything.

    Attributes:
        method: "lora-inc": each task gets a new LoRA, the earlier ones are frozen and stay active. "o-lora": the same
            with ``lambda_1 * sum |A_old A_new^T|`` in the loss. "seq-lora": one adapter, trained on from task to task.
        policy: the instruction that a task is trained with. "original"; "sapo": the prompt with the lowest loss under
            the model as it is; "worst": the one with the highest; "random": one paraphrase drawn by the seed (the
            original where there is none); "sample": for every example and epoch a fresh draw among all prompts of the
            pool. The chosen one then stands for its task in every later evaluation (with "sample": the original does);
            tasks not yet seen are evaluated with their original.
        train_examples, test_examples: the first so many of each task; None: all of them.
        probe_examples: of the training examples used, the first so many are scored on.
        epochs, max_steps: passes over the examples, or optimizer steps a task (if given, instead).
        batch_size, gradient_accumulation: examples per batch, batches per step.
        learning_rate, warmup: peak, then cosine to zero; the warm-up is a share of the steps.
        weight_decay, max_grad_norm: of the trainer.
        lora_r, lora_alpha, lora_dropout, target_modules: of each adapter; "all-linear" or a list of names.
        lambda_1: weight of the orthogonality, for "o-lora".
        max_source, max_target: longest context and response in tokens.
        max_new_tokens: longest answer; None: the longest target among the task's test examples.
        eval_batch_size: answers generated together.
        evaluate: "all": every task before training and after each task. "seen": after each task, those seen so far (no
            FWT). "last": each task when it was learned and all at the end (AP and BWT_last only).
        generate: generate answers and compare them with the targets (ROUGE-L, exact match).
        eval_loss: measure the loss of the targets as well, nats per token.
        score_always: score every pool before its task also where the policy does not need it.
        every_steps, each_epoch, drift: with "sapo", score again inside a task, see `SapoConfig`. Off: the paper.
        logging_steps: steps that one reported loss is the mean of.
        race: with "sapo", score only the cells that it takes to find the best prompt.
        trainer: more options of transformers' `TrainingArguments` by name, for those that are not here.
        seed: of everything drawn. What a task draws depends on the seed and its place only, so runs that differ in
            their policy are paired: same initial adapters, same order of examples.
        bf16, gradient_checkpointing: of the trainer.

    Raises:
        ValueError: naming the option, what was wanted and what was got.
    """

    method: str = "lora-inc"
    policy: str = "sapo"
    train_examples: int | None = 1000
    test_examples: int | None = None
    probe_examples: int = 250
    epochs: float = 10.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_r: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    target_modules: str | tuple[str, ...] = "all-linear"
    lambda_1: float = 0.5
    max_source: int = 1536
    max_target: int = 128
    max_new_tokens: int | None = None
    eval_batch_size: int = 32
    evaluate: str = "all"
    generate: bool = True
    eval_loss: bool = False
    score_always: bool = False
    every_steps: int | None = None
    each_epoch: bool = False
    drift: float | None = None
    logging_steps: int = 10
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    race: bool = False
    trainer: dict[str, Any] | None = None

    def __post_init__(self):
        for name, known in (("method", METHODS), ("policy", POLICIES), ("evaluate", EVALUATE)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("probe_examples", "batch_size", "gradient_accumulation", "lora_r", "lora_alpha", "max_source",
                     "max_target", "eval_batch_size", "logging_steps"):  # fmt: skip
            _count(name, getattr(self, name))
        for name in ("train_examples", "test_examples", "max_steps", "max_new_tokens", "every_steps"):
            if getattr(self, name) is not None:
                _count(name, getattr(self, name))
        for name in ("generate", "eval_loss", "score_always", "each_epoch", "bf16", "gradient_checkpointing", "race"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name, most in (("warmup", 1.0), ("weight_decay", math.inf), ("max_grad_norm", math.inf),
                           ("lora_dropout", 1.0), ("lambda_1", math.inf), ("epochs", math.inf),
                           ("learning_rate", math.inf)):  # fmt: skip
            _number(name, getattr(self, name), most)
        if self.drift is not None:
            _number("drift", self.drift, math.inf)
        if self.epochs <= 0:
            raise ValueError(f"epochs: expected more than 0, got {self.epochs!r}")
        for name in ("lora_dropout", "warmup"):
            # The trainer reads a warm-up of 1 as one step.
            if getattr(self, name) == 1.0:
                raise ValueError(f"{name}: expected less than 1, got 1.0")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected a whole number from 0 to 2**63 - 1, got {self.seed!r}")
        if not (self.generate or self.eval_loss):
            raise ValueError("generate, eval_loss: expected at least one of them, got neither")
        modules = self.target_modules
        # PEFT would read another string as a regular expression.
        if modules != "all-linear":
            if not isinstance(modules, (tuple, list)) or not modules or not all(isinstance(m, str) for m in modules):
                raise ValueError(f"target_modules: expected 'all-linear' or a list of module names, got {modules!r}")
            object.__setattr__(self, "target_modules", tuple(modules))
        if self.policy != "sapo" and (self.every_steps or self.each_epoch or self.drift is not None or self.race):
            raise ValueError(
                f"every_steps, each_epoch, drift, race: expected them with policy sapo only, got policy {self.policy}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        # Runs of before these were options have neither.
        new = {"race": False, "trainer": None}
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {name: v for name, v in values.items() if name not in new or v != new[name]}


def derived_seed(seed: int, task: int, purpose: str) -> int:
    """A seed (31 bits) for one purpose of the `task`-th task: whatever the policy, the same."""
    digest = hashlib.blake2b(f"{seed}/{task}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33


def _count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def _number(name: str, value: Any, most: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and 0.0 <= value <= most):
        raise ValueError(f"{name}: expected a number from 0 to {most:g}, got {value!r}")
