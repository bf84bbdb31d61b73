"""SequenceConfig: everything that decides what a sequence run does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from ..trainer.config import Amount, Count, check_fields

Method = Literal["lora-inc", "o-lora", "seq-lora"]
Policy = Literal["original", "sapo", "random", "worst", "sample"]
METHODS, POLICIES = get_args(Method), get_args(Policy)
# What the report of a run has room for.
MAX_TASKS = 256
MAX_NAME = 300

# The trainer reads a warm-up of 1 as one step.
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class SequenceConfig:
    """The options of `run_sequence`; the defaults are the paper's where it states one.

    Attributes:
        method: "lora-inc": each task gets a new LoRA, the earlier ones are frozen and stay active. "o-lora": the same
            with ``lambda_1 * sum |A_old A_new^T|`` in the loss. "seq-lora": one adapter, trained on from task to task.
        policy: the instruction that a task is trained with. "original"; "sapo": the prompt with the lowest loss under
            the model as it is; "worst": the one with the highest; "random": one paraphrase drawn by the seed (the
            original where there is none); "sample": for every example and epoch a fresh draw among all prompts of the
            pool. The chosen one then stands for its task in every later evaluation (with "sample": the original does);
            tasks not yet seen are evaluated with their original.
        train_examples, test_examples: how many of each task, the first ones; None: all.
        probe_examples: how many of the training examples are scored on, the first ones.
        epochs, max_steps: passes over the examples, or optimizer steps a task (if given, instead).
        batch_size, gradient_accumulation: examples per batch, batches per step.
        learning_rate, warmup: peak, then cosine to zero; the warm-up is a share of the steps.
        weight_decay, max_grad_norm: of the trainer.
        lora_r, lora_alpha, lora_dropout, target_modules: of each adapter; "all-linear" or a list of names.
        lambda_1: weight of the orthogonality, for "o-lora".
        instruction_role: "user" or "system", as in `SapoConfig`.
        max_source, max_target: longest context and response in tokens.
        max_new_tokens: longest answer; None: the longest target among the task's test examples.
        eval_batch_size: answers generated together.
        evaluate: "all": every task before training and after each task. "seen": after each task, those seen so far (no
            FWT). "last": each task when it was learned and all at the end (AP and BWT_last only).
        generate: generate answers and compare them with the targets (ROUGE-L, exact match strict and
            normalised).
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
        ValueError: naming the option, what was expected and what was got.
    """

    method: Method = "lora-inc"
    policy: Policy = "sapo"
    train_examples: Count | None = 1000
    test_examples: Count | None = None
    probe_examples: Count = 250
    epochs: Annotated[float, Field(gt=0)] = 10.0
    max_steps: Count | None = None
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    learning_rate: Amount = 1e-4
    warmup: Share = 0.05
    weight_decay: Amount = 0.0
    max_grad_norm: Amount = 1.0
    lora_r: Count = 8
    lora_alpha: Count = 32
    lora_dropout: Share = 0.1
    target_modules: str | tuple[str, ...] = "all-linear"
    lambda_1: Amount = 0.5
    instruction_role: Literal["user", "system"] = "user"
    max_source: Count = 1536
    max_target: Count = 128
    max_new_tokens: Count | None = None
    eval_batch_size: Count = 32
    evaluate: Literal["all", "seen", "last"] = "all"
    generate: bool = True
    eval_loss: bool = False
    score_always: bool = False
    every_steps: Count | None = None
    each_epoch: bool = False
    drift: Amount | None = None
    logging_steps: Count = 10
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    race: bool = False
    trainer: dict[str, Any] | None = None

    def __post_init__(self):
        modules = self.target_modules
        # PEFT would read another string as a regular expression.
        if modules != "all-linear":
            if not isinstance(modules, (tuple, list)) or not modules:
                raise ValueError(f"target_modules: expected 'all-linear' or a list of module names, got {modules!r}")
            object.__setattr__(self, "target_modules", tuple(modules))
        check_fields(self)
        if not (self.generate or self.eval_loss):
            raise ValueError("generate, eval_loss: expected at least one of them, got neither")
        if self.policy != "sapo" and (self.every_steps or self.each_epoch or self.drift is not None or self.race):
            raise ValueError(
                f"every_steps, each_epoch, drift, race: expected them with policy sapo only, got policy {self.policy}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))


def derived_seed(seed: int, task: int, purpose: str) -> int:
    """A seed (31 bits) for one purpose of the `task`-th task: whatever the policy, the same."""
    digest = hashlib.blake2b(f"{seed}/{task}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33
