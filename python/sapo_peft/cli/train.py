"""`sapo train`: fine-tune a LoRA adapter on the prompt that hurts least, chosen again as the model changes."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..locks import alone
from ..terminal import log_on_stderr, plain, say_notes

HELP = "fine-tune a LoRA adapter on the chosen prompt"
_EPILOG = """\
A YAML file given with --config holds the same options by their long names (max-steps: 100); options on the
command line win. With --resume the newest whole checkpoint in the output folder is continued; where there is none at
all the run starts over. The adapter, sapo_prompts.json and the model card are written to the output folder.
With several processes: torchrun --nproc-per-node N -m sapo_peft.cli train ...
"""


def run(args: argparse.Namespace) -> int:
    """Train; all inputs are read and checked before the model is loaded."""
    options = _options(args.words)
    from sapo_kernels import Race
    from sapo_kernels.manifest import TEMPORARY

    from ..data.examples import read_examples
    from ..data.tasks import read_task
    from ..trainer.config import SapoConfig
    from ..trainer.ranks import leave
    from .outputs import check_folder, naming
    from .train_options import SapoArguments

    chosen = {name: options[name] for name in SapoArguments.__dataclass_fields__}
    config = SapoConfig(**{**chosen, "race": Race() if chosen["race"] else None, "seed": options["seed"]})
    pool, examples = read_task(options["prompts"], options["data"], options["task"], limit=options["examples"])
    notes, held_out = [*pool.notes(), *examples.notes()], []
    if options["eval_data"] is not None:
        held_out = read_examples(options["eval_data"], task=options["task"] or pool.task)
        notes += held_out.notes()
    output, main = Path(options["output_dir"]), os.environ.get("RANK", "0") == "0"
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: expected a folder, got a file")
    output.mkdir(parents=True, exist_ok=True)
    check_folder("--output", output)
    with (
        alone(output / ".lock", output) if main else nullcontext(),
        log_on_stderr("sapo_peft", quiet=not main),
        warnings.catch_warnings(),
        naming(output),
    ):
        # Of the libraries about each other.
        warnings.simplefilter("ignore", FutureWarning)
        for left in output.glob(TEMPORARY) if main else ():
            # Of a run that was killed.
            left.unlink()
        resumed = options["resume_from_checkpoint"] or _checkpoint(output, options["resume"], main)
        say_notes(notes, quiet=not main)
        callback = _train(pool, list(examples), list(held_out), config, options, resumed)
    if main:
        _report(callback, output)
    leave()
    return 0


def _options(words: list[str]) -> dict[str, Any]:
    """Every option by its name."""
    from .options import OptionParser
    from .train_options import DataArguments, LoraArguments, ModelArguments, SapoArguments, TrainArguments

    kinds = [ModelArguments, DataArguments, SapoArguments, LoraArguments, TrainArguments]
    usage = "sapo train --data DATA --prompts PROMPTS --output DIR [--config YAML] [options]"
    parser = OptionParser(kinds, prog="sapo train", usage=usage, description=__doc__, epilog=_EPILOG)
    options = parser.read(words)
    for name, needed in (("data", "one"), ("output_dir", "a folder"),
                         ("prompts", "a file with at least the original instruction")):  # fmt: skip
        if options[name] is None:
            raise ValueError(f"--{name.removesuffix('_dir')}: expected {needed}, got none")
    if options["early_stopping_patience"] is not None and options["eval_data"] is None:
        raise ValueError("--early-stopping-patience: expected --eval-data too, got none")
    return options


def _checkpoint(output: Path, resume: bool, main: bool) -> str | None:
    """The checkpoint to resume from; None for a new run, which must not mix its checkpoints with those of another."""
    from sapo_kernels.manifest import MANIFEST

    from ..trainer.checkpoints import checkpoints_in, last_good_checkpoint

    found = [path for _, path in checkpoints_in(output)]
    if not resume:
        if found:
            raise ValueError(
                f"--output {output}: expected a folder without checkpoints, got one with {found[0].name}; "
                "continue that run with --resume, or choose another folder"
            )
        return None
    newest = last_good_checkpoint(output)
    damaged = [path for path in found if (path / MANIFEST).exists()]
    if damaged and newest is None:
        raise ValueError(
            f"--resume: expected a whole checkpoint in {output}, got {len(damaged)} that have changed since they were "
            f"written ({damaged[0].name}, ...); remove them to start over"
        )
    for path in found:
        # Of a run that was killed while it wrote: nothing in it can be used.
        if main and path not in damaged:
            shutil.rmtree(path)
    return newest


def _train(pool, examples: list, held_out: list, config, options: dict[str, Any], resumed: str | None):
    """Run the trainer and save the adapter; returns the SAPO callback."""
    from peft import LoraConfig, get_peft_model
    from transformers import EarlyStoppingCallback, Trainer, set_seed

    from ..loading import load
    from ..trainer.attach import attach_sapo
    from ..trainer.checkpoints import seal_adapter

    set_seed(options["seed"])
    # First: it says which of several processes this is, and sets its device.
    arguments = _arguments(options, bool(held_out))
    main, output = arguments.process_index == 0, Path(arguments.output_dir)
    model, tokenizer = load(options["model"], None, options["dtype"], options["device"], options["tokenizer"])
    modules = options["target_modules"]
    lora = LoraConfig(
        r=options["lora_r"], lora_alpha=options["lora_alpha"], lora_dropout=options["lora_dropout"],
        target_modules=modules if modules == "all-linear" else modules.split(","), task_type="CAUSAL_LM",
    )  # fmt: skip
    patience = options["early_stopping_patience"]
    trainer = Trainer(
        get_peft_model(model, lora), arguments, train_dataset=examples, eval_dataset=held_out or None,
        processing_class=tokenizer, callbacks=None if patience is None else [EarlyStoppingCallback(patience)],
    )  # fmt: skip
    callback = attach_sapo(trainer, pool, config=config)
    if main and not sys.stderr.isatty():
        _say_lines(trainer, callback)
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
    _save(trainer, output, main)
    if main:
        seal_adapter(output)
    return callback


def _save(trainer, output: Path, main: bool) -> None:
    """Save the model in a folder of its own, and give each file its place when all are whole.

    PEFT extends the model card that it finds: one that a full disk has cut would not be noticed.
    """
    from ..trainer.ranks import wait

    staging = output / ".saving.part"
    if main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        if (output / "README.md").is_file():
            shutil.copyfile(output / "README.md", staging / "README.md")
    wait()
    try:
        trainer.save_model(str(staging))
        wait()
        for path in sorted(staging.iterdir()) if main else ():
            if path.is_dir():
                shutil.rmtree(output / path.name, ignore_errors=True)
            os.replace(path, output / path.name)
    finally:
        if main:
            shutil.rmtree(staging, ignore_errors=True)


def _arguments(options: dict[str, Any], evaluated: bool):
    """The trainer's own options. What is evaluated is evaluated when it is saved, unless the options say otherwise."""
    from transformers import TrainingArguments

    from ..loading import pick_device

    kept = {name: options[name] for name, entry in TrainingArguments.__dataclass_fields__.items() if entry.init}
    kept["use_cpu"] |= pick_device(options["device"]).type == "cpu"
    # A bar in a file is a thousand of them.
    kept["disable_tqdm"] = not sys.stderr.isatty() if kept["disable_tqdm"] is None else kept["disable_tqdm"]
    kept["report_to"] = [] if kept["report_to"] == "none" else kept["report_to"].split(",")
    if evaluated and kept["eval_strategy"] == "no":
        kept.update(eval_strategy=kept["save_strategy"], eval_steps=kept["eval_steps"] or kept["save_steps"])
    if options["early_stopping_patience"] is not None:
        kept["load_best_model_at_end"] = True
        kept["metric_for_best_model"] = kept["metric_for_best_model"] or "eval_loss"
    return TrainingArguments(**kept)


def _say_lines(trainer, callback) -> None:
    """Off a terminal: how far scoring and training are, a line every half minute."""
    from transformers import TrainerCallback

    from sapo_kernels.scoring.progress import Lines

    class Said(TrainerCallback):
        lines = None

        def on_step_end(self, args, state, control, **kwargs):
            self.lines = self.lines or Lines("training", "step", state.max_steps, state.global_step - 1)
            self.lines.update(state.global_step)

    trainer.add_callback(Said())
    if callback.rescorer is not None:
        callback.rescorer.progress = lambda what, cells: Lines(what, "cell", cells)


def _report(callback, output: Path) -> None:
    for task, entry in callback.prompts()["tasks"].items():
        loss, original = entry["loss"], entry["original_loss"]
        losses = f" ({loss:.4f} nats per token, the original {original:.4f})" if isinstance(loss, float) else ""
        print(f"{plain(task)}: trained with prompt {entry['index']} of {entry['prompts']}{losses}:")
        print(f"  {plain(entry['prompt'])}")
    print(f"Adapter, sapo_prompts.json and model card are in {plain(os.fspath(output))}.")
