"""`sapo sequence`: train adapters on task after task with a prompt policy, and measure what each does to the others."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import fields
from typing import Any

from ..sequence.config import EVALUATE, METHODS, POLICIES, SequenceConfig
from ..terminal import MODEL_HELP, cut, log_on_stderr, plain, table, terminal_width

_EPILOG = """\
The folder given with --output holds run.json, results.json and a folder a task (adapter, scores, metrics). The same
command goes on where a run was stopped, however it was; other options in the same folder are refused.
"""
_DEFAULTS = {field.name: field.default for field in fields(SequenceConfig)}
# Option, field of SequenceConfig, help; "%s" is the default.
_NUMBERS: tuple[tuple[str, str, type, str], ...] = (
    ("train-examples", "train_examples", int, "train on the first so many examples of each task (default %s)"),
    ("test-examples", "test_examples", int, "evaluate on the first so many of each task (default: all)"),
    ("probe-examples", "probe_examples", int, "examples to score prompts on (default %s)"),
    ("epochs", "epochs", float, "passes over the examples of a task (default %s)"),
    ("max-steps", "max_steps", int, "optimizer steps a task, instead of epochs"),
    ("batch-size", "batch_size", int, "(default %s)"),
    ("gradient-accumulation", "gradient_accumulation", int, "batches per optimizer step (default %s)"),
    ("lr", "learning_rate", float, "peak learning rate, cosine after a warm-up (default %s)"),
    ("warmup", "warmup", float, "share of the steps (default %s)"),
    ("weight-decay", "weight_decay", float, "(default %s)"),
    ("max-grad-norm", "max_grad_norm", float, "(default %s)"),
    ("lora-r", "lora_r", int, "rank (default %s)"),
    ("lora-alpha", "lora_alpha", int, "scale (default %s)"),
    ("lora-dropout", "lora_dropout", float, "(default %s)"),
    ("lambda-1", "lambda_1", float, "weight of the orthogonality of o-lora (default %s)"),
    ("max-source", "max_source", int, "longest context in tokens (default %s)"),
    ("max-target", "max_target", int, "longest response in tokens (default %s)"),
    ("max-new-tokens", "max_new_tokens", int, "longest answer (default: the longest target of a task's test examples)"),
    ("eval-batch-size", "eval_batch_size", int, "answers generated together (default %s)"),
    ("every-steps", "every_steps", int, "with sapo, score again after that many steps of a task"),
    ("drift", "drift", float, "with sapo, score again when the loss is that many standard errors off the prediction"),
    ("logging-steps", "logging_steps", int, "steps that one reported loss is the mean of (default %s)"),
    ("seed", "seed", int, "(default %s)"),
)
_SWITCHES: tuple[tuple[str, str, str], ...] = (
    ("each-epoch", "each_epoch", "with sapo, score again at each epoch of a task"),
    ("eval-loss", "eval_loss", "measure the loss of the targets too"),
    ("score-always", "score_always", "score every pool before its task under any policy"),
    ("bf16", "bf16", "train in bfloat16 autocast"),
    ("gradient-checkpointing", "gradient_checkpointing", "recompute activations"),
)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the options of `sapo sequence`."""
    parser = subparsers.add_parser(
        "sequence", help="train on a sequence of tasks and measure forgetting", description=__doc__, epilog=_EPILOG,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", default="tiny", help=MODEL_HELP)
    add("--tokenizer", help="tokenizer, if it does not lie beside the model")
    add("--data", metavar="DIR", help="folder of task folders (default: the bundled tasks)")
    add(
        "--order",
        metavar="NAME",
        help="order in CL_configs/order, in DIR or beside it (default: bundled_a without --data)",
    )
    add("--tasks", metavar="A,B,...", help="task folders in this order, instead of --order")
    add("--prompts", metavar="PATH", help="prompts, if they are not with the data: folder or JSON file")
    add("--output", metavar="DIR", required=True, help="folder of the run")
    add("--method", choices=METHODS, default=_DEFAULTS["method"], help="(default %(default)s)")
    add("--policy", choices=POLICIES, default=_DEFAULTS["policy"], help="(default %(default)s)")
    text = "all tasks after each; those seen; or each when learned and all at the end (default %(default)s)"
    add("--evaluate", choices=EVALUATE, default=_DEFAULTS["evaluate"], help=text)
    add("--target-modules", default=_DEFAULTS["target_modules"], help="module names with commas (default %(default)s)")
    for option, name, kind, text in _NUMBERS:
        default = _DEFAULTS[name]
        add(f"--{option}", dest=name, type=kind, default=default, metavar=kind.__name__.upper(),
            help=text % f"{default:g}" if "%s" in text else text)  # fmt: skip
    for option, name, text in _SWITCHES:
        add(f"--{option}", dest=name, action="store_true", help=text)
    add("--no-generate", dest="generate", action="store_false", help="no answers: with --eval-loss the loss alone")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default %(default)s)")
    add("--quiet", action="store_true", help="no notes and no progress")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run or continue the sequence; everything but the model is read and checked before the model is loaded."""
    modules = args.target_modules
    options = {name: getattr(args, name) for name in _DEFAULTS if name != "target_modules"}
    config = SequenceConfig(**options, target_modules=modules if modules == "all-linear" else tuple(modules.split(",")))
    tasks, order = _tasks(args)
    from ..loading import spare_threads
    from ..sequence.runner import run_sequence

    spare_threads(args.model)
    with log_on_stderr("sapo_peft", args.quiet), log_on_stderr("sapo_kernels", args.quiet), warnings.catch_warnings():
        # Of the libraries about each other.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            result = run_sequence(
                args.model, tasks, args.output, config, order=order, tokenizer=args.tokenizer, device=args.device,
                dtype=args.dtype, progress=not args.quiet,
            )  # fmt: skip
        except KeyboardInterrupt:
            if not args.quiet:
                print(f"\nsapo: stopped; the same command goes on in {plain(args.output)}", file=sys.stderr)
            raise
    _report(result)
    return 0


def _tasks(args: argparse.Namespace) -> tuple[list, str]:
    """(tasks, name of the order)."""
    from ..sequence.tasks import read_order, read_tasks

    if args.order and args.tasks:
        raise ValueError("--order, --tasks: wanted one of them, got both")
    if args.data is None:
        from ..assets import BUNDLED_DIR

        args.data = BUNDLED_DIR
        args.order = args.order or (None if args.tasks else "bundled_a")
    if args.tasks:
        return read_tasks(args.data, args.tasks.split(","), args.prompts), ""
    if args.order is None:
        raise ValueError("--order: wanted the name of an order in CL_configs/order, or --tasks, got neither")
    return read_order(args.data, args.order, args.prompts), args.order


def _report(result: Any) -> None:
    width = terminal_width()
    rows = []
    for number, choice in enumerate(result.choices, 1):
        losses = (choice["loss"], choice["original_loss"])
        loss, original = ("-" if value is None else f"{value:.4f}" for value in losses)
        rows.append((str(number), f"{choice['index']}/{choice['prompts']}", loss, original, choice["task"]))
    print(table(("task", "prompt", "loss", "original", "name"), rows, width), end="\n\n")
    for number, choice in enumerate(result.choices, 1):
        print(cut(f"task {number}: {choice['prompt']}", width))
    print(f"\n{result.table()}\n")
    cost = result.cost
    print(
        f"scoring {cost['score_seconds']:.1f} s, training {cost['train_seconds']:.1f} s, evaluation "
        f"{cost['eval_seconds']:.1f} s; scoring is {cost['overhead_fraction']:.1%} of training"
    )
    folder = plain(os.fspath(result.folder))
    print(f"{folder}/results.json has the matrices, {folder}/tasks a folder with the adapter of each task.")
