"""`sapo train`: fine-tune a LoRA adapter on the prompt that hurts least, chosen again as the model changes."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..terminal import MODEL_HELP, log_on_stderr, plain

MAX_CONFIG_BYTES = 2**20
# The pool with its paraphrases, in the output folder.
STORE = "sapo_pool.json"
_EPILOG = """\
A YAML file given with --config holds the same options by their long names (max-steps: 100); options on the
command line win. With --resume the newest whole checkpoint in the output folder is continued; where there is none at
all the run begins anew. The adapter, sapo_prompts.json and the model card are written to the output folder.
With several processes: torchrun --nproc-per-node N -m sapo_peft.cli train ...
"""
# Long name, type, default, help. One list for the command line and the YAML file.
_OPTIONS: tuple[tuple[str, Any, Any, str], ...] = (
    ("model", str, "tiny", MODEL_HELP),
    ("tokenizer", str, None, "tokenizer, if it does not lie beside the model"),
    ("data", str, None, "examples: .json, .jsonl, .csv, .tsv or a task folder"),
    ("prompts", str, None, "prompts: JSON, one per line in a .txt file, a folder, or a saved pool"),
    ("paraphrase-with", str, None, "make paraphrases: URL of an OpenAI-compatible endpoint, or a model folder"),
    ("paraphrase-model", str, None, "model name at that endpoint"),
    ("paraphrases", int, 20, "how many to make (default 20)"),
    ("output", str, None, "folder for the adapter and its checkpoints"),
    ("task", str, None, "task, where the files hold several"),
    ("examples", int, None, "train on that many examples at most"),
    ("mode", str, "hard", "hard: the prompt with the lowest loss (default); soft: drawn by loss"),
    ("temperature", float, 0.05, "of soft mode, nats per token (default 0.05)"),
    ("floor", float, 0.0, "share of probability spread evenly in soft mode (default 0)"),
    ("every-steps", int, None, "score again after that many steps"),
    ("each-epoch", bool, False, "score again at each epoch"),
    ("drift", float, None, "score again when the loss has left its course by that many standard errors (4)"),
    ("race", bool, False, "score only the cells that it takes to find the best prompt (hard mode)"),
    ("probe-examples", int, 64, "examples to score on (default 64)"),
    ("max-source", int, 1536, "longest context in tokens (default 1536)"),
    ("max-target", int, 128, "response tokens that are scored, the first ones (default 128)"),
    ("train-max-target", int, None, "response tokens that are trained on (default: all)"),
    ("max-tokens", int, None, "new tokens per forward when scoring"),
    ("epochs", float, 1.0, "passes over the examples (default 1)"),
    ("max-steps", int, None, "stop after that many optimizer steps"),
    ("batch-size", int, 8, "examples per device and step (default 8)"),
    ("gradient-accumulation", int, 1, "batches per optimizer step (default 1)"),
    ("lr", float, 1e-4, "peak learning rate, cosine after a warm-up of 5 %% (default 1e-4)"),
    ("lora-r", int, 8, "rank (default 8)"),
    ("lora-alpha", int, 32, "scale (default 32)"),
    ("lora-dropout", float, 0.1, "dropout (default 0.1)"),
    ("target-modules", str, "all-linear", "module names with commas, or all-linear (default)"),
    ("logging-steps", int, 10, "(default 10)"),
    ("save-steps", int, 100, "(default 100)"),
    ("seed", int, 0, "(default 0)"),
    ("workers", int, 0, "dataloader workers (default 0)"),
    ("bf16", bool, False, "train in bfloat16 autocast"),
    ("gradient-checkpointing", bool, False, "recompute activations"),
    ("dtype", str, "auto", "of the weights: auto, float32, bfloat16, float16"),
    ("device", str, "auto", "auto, cpu or cuda"),
    ("report-to", str, "none", "tensorboard, wandb, trackio, with commas (default none)"),
    ("resume", bool, False, "continue from the newest whole checkpoint"),
)
_CHOICES = {
    "mode": ("hard", "soft"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
# Those of `SapoConfig` are its own.
_COUNT = ("a whole number of at least 1", lambda value: value >= 1)
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("paraphrases", "examples", "max-steps", "batch-size", "gradient-accumulation", "lora-r",
                     "lora-alpha", "logging-steps", "save-steps"), _COUNT),
    "workers": ("a whole number of at least 0", lambda value: value >= 0),
    "seed": ("a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32),
    "epochs": ("a number above 0", lambda value: 0 < value < math.inf),
    "lr": ("a number of at least 0", lambda value: 0 <= value < math.inf),
    "lora-dropout": ("a number of at least 0 and below 1", lambda value: 0 <= value < 1),
}  # fmt: skip


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the options of `sapo train`."""
    parser = subparsers.add_parser(
        "train", help="fine-tune a LoRA adapter on the chosen prompt", description=__doc__, epilog=_EPILOG,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", metavar="YAML", help="options from a file")
    for name, kind, _, text in _OPTIONS:
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", default=None, help=text)
        else:
            choices = _CHOICES.get(name)
            metavar = None if choices else kind.__name__.upper()
            parser.add_argument(f"--{name}", type=kind, choices=choices, metavar=metavar, help=text)
    return parser


def run(args: argparse.Namespace) -> int:
    """Train; all inputs are read and checked before the model is loaded."""
    options = _options(args)
    for needed in ("data", "output"):
        if options[needed] is None:
            raise ValueError(f"--{needed}: wanted one, got none")
    if options["prompts"] is None:
        raise ValueError("--prompts: wanted a file with at least the original instruction, got none")
    if options["paraphrase-with"] and "://" in options["paraphrase-with"] and options["paraphrase-model"] is None:
        raise ValueError("--paraphrase-model: wanted the model's name at that endpoint, got none")
    from sapo_kernels import Race

    from ..data.examples import read_examples
    from ..data.prompt_pool import PromptPool
    from ..trainer.config import SapoConfig
    from ..trainer.ranks import leave

    names = ("mode", "temperature", "floor", "every-steps", "each-epoch", "drift", "probe-examples", "max-source",
             "max-target", "train-max-target", "max-tokens", "seed")  # fmt: skip
    race = Race() if options["race"] else None
    config = SapoConfig(race=race, **{name.replace("-", "_"): options[name] for name in names})
    pool = PromptPool.read(options["prompts"], options["task"])
    examples = read_examples(options["data"], task=options["task"] or pool.task, limit=options["examples"])
    output = Path(options["output"])
    resumed = _checkpoint(output, options["resume"])
    output.mkdir(parents=True, exist_ok=True)
    main = os.environ.get("RANK", "0") == "0"
    if main:
        _note(pool.notes(), examples.notes())
    with log_on_stderr("sapo_peft", quiet=not main):
        callback = _train(pool, list(examples), config, options, output, resumed)
    if main:
        _report(callback, output)
    leave()
    return 0


def _checkpoint(output: Path, resume: bool) -> str | None:
    """The checkpoint to go on from; None for a new run, which must not mix its checkpoints with those of another."""
    from ..trainer.checkpoints import checkpoints_in, last_good_checkpoint

    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: wanted a folder, got a file")
    found = checkpoints_in(output)
    if not resume:
        if found:
            raise ValueError(
                f"--output {output}: wanted a folder without checkpoints, got one with {found[0][1].name}; "
                "continue that run with --resume, or choose another folder"
            )
        return None
    newest = last_good_checkpoint(output)
    if found and newest is None:
        raise ValueError(
            f"--resume: wanted a whole checkpoint in {output}, got {len(found)} that are not "
            f"({found[0][1].name}, ...); remove them to begin anew"
        )
    return newest


def _note(*lists: list[str]) -> None:
    for notes in lists:
        for note in notes:
            print(f"sapo: note: {plain(note)}", file=sys.stderr)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Every option by its long name: command line, else YAML, else default; those with a rule keep it."""
    given = {name: getattr(args, name.replace("-", "_")) for name, *_ in _OPTIONS}
    from_file = _read_config(args.config) if args.config else {}
    options = {
        name: given[name] if given[name] is not None else from_file.get(name, default)
        for name, _, default, _ in _OPTIONS
    }
    for name, (wanted, holds) in _RULES.items():
        if options[name] is not None and not holds(options[name]):
            raise ValueError(f"--{name}: wanted {wanted}, got {options[name]}")
    return options


def _read_config(path: str) -> dict[str, Any]:
    """The options in a YAML file; types as on the command line."""
    import yaml

    from sapo_kernels.files import DataError, excerpt, read_text

    try:
        text = read_text(path, max_bytes=MAX_CONFIG_BYTES)
        root, document = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path}: wanted YAML, got {excerpt(' '.join(str(error).split()), 200)}") from None
    if not isinstance(document, dict):
        raise DataError(f"{path}: wanted options by name, got {excerpt(document)}")
    # The loader keeps the last of two equal keys in silence.
    seen = [key.value.replace("_", "-") for key, _ in root.value if isinstance(key.value, str)]
    if len(set(seen)) < len(seen):
        twice = next(name for i, name in enumerate(seen) if name in seen[:i])
        raise DataError(f"{path}: wanted each option once, got {excerpt(twice)} again")
    kinds = {name: kind for name, kind, *_ in _OPTIONS}
    options = {}
    for key, value in document.items():
        name = str(key).replace("_", "-")
        if name not in kinds:
            raise DataError(f"{path}: wanted one of the options of sapo train --help, got {excerpt(key)}")
        kind = kinds[name]
        fits = type(value) is kind or (kind is float and type(value) is int)
        # YAML 1.1 reads 1e-4 as text.
        if kind is float and isinstance(value, str):
            try:
                value, fits = float(value), True
            except ValueError:
                fits = False
        if not fits or (name in _CHOICES and value not in _CHOICES[name]):
            wanted = f"one of {', '.join(_CHOICES[name])}" if name in _CHOICES else _KINDS[kind]
            raise DataError(f"{path}: {name}: wanted {wanted}, got {excerpt(value)}")
        options[name] = value
    return options


def _paraphrased(pool, options: dict[str, Any], output: Path, resumed: str | None):
    """The pool with paraphrases, kept in the output folder so that nothing is asked twice.

    A run that goes on has those that it began with, also if fewer had come than were asked for.
    """
    from ..paraphrase import EndpointSource, LocalModelSource, gather
    from ..paraphrase.source import resumed_from

    if resumed:
        if not (output / STORE).exists():
            raise ValueError(f"--paraphrase-with: wanted {STORE} in {output}, of the run that goes on, got none")
        return resumed_from(pool, output / STORE)
    where, known = options["paraphrase-with"], set(pool.notes())
    if "://" in where:
        source = EndpointSource(where, options["paraphrase-model"])
    else:
        from ..loading import load

        source = LocalModelSource(*load(where, None, options["dtype"], options["device"]), seed=options["seed"])
    pool = gather(pool, source, options["paraphrases"], store=output / STORE)
    # Its remarks are in the log.
    _note([note for note in pool.notes() if note not in known and note not in pool.remarks])
    return pool


def _train(pool, examples: list[dict[str, str]], config, options: dict[str, Any], output: Path, resumed: str | None):
    """Run the trainer and save the adapter; returns the SAPO callback."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, set_seed

    from ..data.prompt_pool import PromptPool
    from ..loading import load
    from ..trainer.attach import attach_sapo

    set_seed(options["seed"])
    # First: it says which of several processes this is, and sets its device.
    arguments = _arguments(options, output)
    main = arguments.process_index == 0
    if options["paraphrase-with"]:
        # One asks; the others wait for it (`ddp_timeout`, half an hour, at most) and read what it has written.
        with arguments.main_process_first(local=False):
            pool = _paraphrased(pool, options, output, resumed) if main else PromptPool.read(output / STORE)
    model, tokenizer = load(options["model"], None, options["dtype"], options["device"], options["tokenizer"])
    modules = options["target-modules"]
    lora = LoraConfig(
        r=options["lora-r"], lora_alpha=options["lora-alpha"], lora_dropout=options["lora-dropout"],
        target_modules=modules if modules == "all-linear" else modules.split(","), task_type="CAUSAL_LM",
    )  # fmt: skip
    trainer = Trainer(get_peft_model(model, lora), arguments, train_dataset=examples, processing_class=tokenizer)
    callback = attach_sapo(trainer, pool, config=config)
    if options["resume"] and main:
        print(f"Resuming from {plain(resumed)}." if resumed else "No checkpoint to resume from: a new run.")
    try:
        trainer.train(resume_from_checkpoint=resumed)
    except KeyboardInterrupt:
        if main:
            steps = f"stopped after step {trainer.state.global_step}"
            saved = any(output.glob("checkpoint-*"))
            then = "--resume continues from the last checkpoint" if saved else "nothing was saved yet (--save-steps)"
            print(f"\nsapo: {steps}; {then}", file=sys.stderr)
        raise
    trainer.save_model(str(output))
    return callback


def _arguments(options: dict[str, Any], output: Path):
    from transformers import TrainingArguments

    from ..loading import pick_device

    return TrainingArguments(
        output_dir=str(output), num_train_epochs=options["epochs"], max_steps=options["max-steps"] or -1,
        per_device_train_batch_size=options["batch-size"], learning_rate=options["lr"],
        gradient_accumulation_steps=options["gradient-accumulation"], lr_scheduler_type="cosine", warmup_steps=0.05,
        logging_steps=options["logging-steps"], save_steps=options["save-steps"], seed=options["seed"],
        bf16=options["bf16"], **({"gradient_checkpointing": True} if options["gradient-checkpointing"] else {}),
        dataloader_num_workers=options["workers"], use_cpu=pick_device(options["device"]).type == "cpu",
        report_to=[] if options["report-to"] == "none" else options["report-to"].split(","),
    )  # fmt: skip


def _report(callback, output: Path) -> None:
    for task, entry in callback.prompts()["tasks"].items():
        loss, original = entry["loss"], entry["original_loss"]
        losses = f" ({loss:.4f} nats per token, the original {original:.4f})" if isinstance(loss, float) else ""
        print(f"{plain(task)}: trained with prompt {entry['index']} of {entry['prompts']}{losses}:")
        print(f"  {plain(entry['prompt'])}")
    print(f"Adapter, sapo_prompts.json and model card are in {plain(os.fspath(output))}.")
