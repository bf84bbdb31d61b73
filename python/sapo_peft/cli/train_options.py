"""The options of `sapo train`: the model, the data, SAPO, LoRA, and everything of transformers' TrainingArguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from ..terminal import MODEL_HELP
from ..trainer.config import SapoConfig
from .options import options_of


def option(default: Any, text: str = "", *aliases: str, **others: Any) -> Any:
    """A field with its help, other names, and what else argparse takes."""
    shown = f" (default {default})" if default not in (None, False, "") else ""
    return field(default=default, metadata={"help": f"{text}{shown}".strip(), "aliases": list(aliases), **others})


@dataclass
class ModelArguments:
    """Which model is trained, and where."""

    _argument_group_name = "model"
    model: str = option("tiny", MODEL_HELP)
    tokenizer: str | None = option(None, "tokenizer, if it is not beside the model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "dtype of the weights")
    device: Literal["auto", "cpu", "cuda"] = option("auto")


@dataclass
class DataArguments:
    """What it is trained on."""

    _argument_group_name = "data and prompts"
    data: str | None = option(None, "examples: a file, a task folder, or a dataset of the hub (owner/name)")
    task: str | None = option(None, "which task, if the files have several")
    examples: int | None = option(None, "train on that many examples at most")
    eval_data: str | None = option(None, "examples to evaluate on, as for --data")
    prompts: str | None = option(None, "prompts: JSON, one per line in a .txt file, a folder, or a saved pool")


SapoArguments = options_of(
    SapoConfig,
    "SAPO",
    skip={"decay", "at_start", "drift_cooldown", "template", "now", "seed"},
    types={"mode": Literal["hard", "soft"], "packing": Literal["auto", "trie", "padded"], "race": bool,
           "instruction_role": Literal["user", "system"]},
    race="score only the cells that it takes to find the best prompt (hard mode)",
)  # fmt: skip


@dataclass
class LoraArguments:
    """The adapter."""

    _argument_group_name = "LoRA"
    lora_r: int = option(8, "rank")
    lora_alpha: int = option(32, "scale")
    lora_dropout: float = option(0.1, "dropout")
    target_modules: str = option("all-linear", "module names with commas")


@dataclass
class TrainArguments(TrainingArguments):
    """Every option of transformers' trainer, with this command's defaults and shorter names for some."""

    _argument_group_name = "training (options of transformers' TrainingArguments)"
    output_dir: str | None = option(None, "folder for the adapter and its checkpoints", "--output")
    num_train_epochs: float = option(1.0, "passes over the examples", "--epochs")
    max_steps: int = option(-1, "stop after that many optimizer steps")
    per_device_train_batch_size: int = option(8, "examples per device and step", "--batch-size")
    gradient_accumulation_steps: int = option(1, "batches per optimizer step", "--gradient-accumulation")
    learning_rate: float = option(1e-4, "peak", "--lr")
    lr_scheduler_type: str = option("cosine", "schedule of the learning rate")
    warmup_steps: float = option(0.05, "steps of warm-up, or their share if below 1")
    logging_steps: float = option(10)
    save_steps: float = option(100)
    seed: int = option(0)
    dataloader_num_workers: int = option(0, "processes that make batches", "--workers")
    report_to: str = option("none", "tensorboard, wandb, trackio, with commas")
    debug: str = option("", "show the traceback of an error; with a value, see TrainingArguments", nargs="?", const="")
    resume: bool = option(False, "continue from the newest whole checkpoint in the output folder")
    early_stopping_patience: int | None = option(None, "stop after so many evaluations without a better loss")
