"""`sapo sequence`: train adapters on task after task with a prompt policy, and measure what each does to the others."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import fields
from typing import Any

from ..terminal import MODEL_HELP, cut, log_on_stderr, plain, table, terminal_width

HELP = "train on a sequence of tasks and measure forgetting"
_EPILOG = """\
The folder given with --output holds run.json, results.json and a folder a task (adapter, scores, metrics), with
manifests of every file. The same command resumes a run, however it was stopped; other options in the same folder are
refused, and so are files that have changed. A YAML file given with --config holds the same options by their long names;
options on the command line win.
"""
METRICS = ("AP", "BWT", "BWT_last", "FWT")
# What the run decides about its trainer.
_DECIDED = {
    "output_dir", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "disable_tqdm",
    "gradient_accumulation_steps", "warmup_steps", "save_strategy", "report_to", "data_seed", "use_cpu", "debug",
    "remove_unused_columns", "logging_nan_inf_filter", "resume_from_checkpoint", "load_best_model_at_end",
}  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run or continue the sequence; everything but the model is read and checked before the model is loaded."""
    args, config = _options(args.words)
    tasks, order = _tasks(args)
    from ..loading import spare_threads
    from ..sequence.runner import run_sequence
    from .outputs import check_folder, naming

    if os.path.isdir(args.output):
        check_folder("--output", args.output)
    spare_threads(args.model)
    with (
        log_on_stderr("sapo_peft", args.quiet),
        log_on_stderr("sapo_kernels", args.quiet),
        warnings.catch_warnings(),
        naming(args.output),
    ):
        # Of the libraries about each other.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            result = run_sequence(
                args.model, tasks, args.output, config, order=order, tokenizer=args.tokenizer, device=args.device,
                dtype=args.dtype, progress=not args.quiet,
            )  # fmt: skip
        except KeyboardInterrupt:
            if not args.quiet:
                print(f"\nsapo: stopped; the same command continues in {plain(args.output)}", file=sys.stderr)
            raise
    _report(result)
    return 0


def _options(words: list[str]) -> tuple[argparse.Namespace, Any]:
    """(options of the command, the configuration of the run)."""
    from transformers import TrainingArguments

    from ..sequence.config import SequenceConfig
    from .options import OptionParser, options_of

    own = options_of(
        SequenceConfig, "the run", {"trainer"}, {"target_modules": str}, target_modules="names with commas"
    )
    known = _DECIDED | {entry.name for entry in fields(SequenceConfig)}
    more = options_of(TrainingArguments, "training (more options of transformers' TrainingArguments)", known)
    usage = "sapo sequence --output DIR [--data DIR] [--order NAME | --tasks A,B,...] [--config YAML] [options]"
    parser = OptionParser([own, more], prog="sapo sequence", usage=usage, description=__doc__, epilog=_EPILOG)
    add = parser.add_argument
    add("--model", default="tiny", help=MODEL_HELP)
    add("--tokenizer", help="tokenizer, if it is not beside the model")
    add("--data", metavar="DIR", help="folder of task folders (default: the bundled tasks)")
    where = "in CL_configs/order, in DIR or beside it (default: bundled_a without --data)"
    add("--order", metavar="NAME", help=f"order {where}")
    add("--tasks", metavar="A,B,...", help="task folders in this order, instead of --order")
    add("--prompts", metavar="PATH", help="prompts, if they are not with the data: folder or JSON file")
    add("--output", metavar="DIR", help="folder of the run")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="dtype of the weights")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--quiet", action="store_true", help="no notes and no progress")
    options = parser.read(words)
    if options["output"] is None:
        raise ValueError("--output: expected a folder, got none")
    config = {entry.name: options.pop(entry.name) for entry in fields(own)}
    given, unsaid = {entry.name: options.pop(entry.name) for entry in fields(more)}, vars(parser.parse_args([]))
    config["trainer"] = {name: value for name, value in given.items() if value != unsaid[name]} or None
    if config["target_modules"] != "all-linear":
        config["target_modules"] = tuple(config["target_modules"].split(","))
    return argparse.Namespace(**options), SequenceConfig(**config)


def _tasks(args: argparse.Namespace) -> tuple[list, str]:
    """(tasks, name of the order)."""
    from ..sequence.tasks import read_order, read_tasks

    if args.order and args.tasks:
        raise ValueError("--order, --tasks: expected one of them, got both")
    if args.data is None:
        from ..assets import BUNDLED_DIR

        args.data = BUNDLED_DIR
        args.order = args.order or (None if args.tasks else "bundled_a")
    if args.tasks:
        return read_tasks(args.data, args.tasks.split(","), args.prompts), ""
    if args.order is None:
        raise ValueError("--order: expected the name of an order in CL_configs/order, or --tasks, got neither")
    return read_order(args.data, args.order, args.prompts), args.order


def _report(result: Any) -> None:
    from ..sequence.schema import MEASURES

    width = terminal_width()
    rows = []
    for number, choice in enumerate(result.choices, 1):
        losses = (choice["loss"], choice["original_loss"])
        loss, original = ("-" if value is None else f"{value:.4f}" for value in losses)
        rows.append((str(number), f"{choice['index']}/{choice['prompts']}", loss, original, choice["task"]))
    print(table(("task", "prompt", "loss", "original", "name"), rows, width), end="\n\n")
    for number, choice in enumerate(result.choices, 1):
        print(cut(f"task {number}: {choice['prompt']}", width))
    rows = []
    for name, found in result.metrics.items():
        measure = MEASURES[name]
        values = (found[key] if not measure.top or found[key] is None else 100 * found[key] for key in METRICS)
        rows.append((*("-" if v is None else f"{v:.2f}" for v in values), f"{measure.title}, {measure.unit}"))
    print("\n" + table((*METRICS, "score"), rows, width), end="\n\n")
    cost = result.cost
    print(
        f"scoring {cost['score_seconds']:.1f} s, training {cost['train_seconds']:.1f} s, evaluation "
        f"{cost['eval_seconds']:.1f} s; scoring is {cost['overhead_fraction']:.1%} of training"
    )
    folder = plain(os.fspath(result.folder))
    print(f"{folder}/tasks has a folder with the adapter of each task; sapo report {folder} shows all scores.")
