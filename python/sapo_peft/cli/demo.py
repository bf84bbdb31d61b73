"""`sapo demo`: three small tasks in a row, trained on the original prompts and on those SAPO chooses, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..terminal import cut, log_on_stderr, plain, table, terminal_width

TASKS = ("task04_active_to_passive", "task02_odd_one_out", "task01_product_note_polarity")
POLICIES = ("original", "sapo")
OPTIONS: dict[str, Any] = {
    "max_steps": 20,
    "batch_size": 8,
    "learning_rate": 6e-3,
    "train_examples": 160,
    "test_examples": 40,
    "probe_examples": 32,
    "lora_dropout": 0.0,
    "eval_batch_size": 40,
    "eval_loss": True,
}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the options of `sapo demo`."""
    parser = subparsers.add_parser(
        "demo", help="a sequence of three tasks on a model that ships with the package", description=__doc__,
        epilog="No network, no GPU; about two minutes on two CPU cores. The same command goes on where it was stopped.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="DIR", default="sapo_demo", help="folder for the runs (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run both policies, print what they did and where the report is."""
    from ..loading import spare_threads
    from ..report import write_report
    from ..sequence import SequenceConfig, run_sequence
    from ..tiny_base import sequence_tasks
    from .outputs import check_folder, naming

    Path(args.output).mkdir(parents=True, exist_ok=True)
    check_folder("--output", args.output)
    spare_threads("tiny-base")
    tasks = sequence_tasks(TASKS, args.seed)
    folders, results = [], {}
    for policy in POLICIES:
        folder = Path(args.output) / policy
        config = SequenceConfig(method="lora-inc", policy=policy, seed=args.seed, **OPTIONS)
        with log_on_stderr("sapo_peft", args.quiet), log_on_stderr("sapo_kernels", args.quiet), naming(folder):
            results[policy] = run_sequence("tiny-base", tasks, folder, config, order="demo", progress=not args.quiet)
        folders.append(folder)
    print(_comparison(results, terminal_width()))
    print("One seed of a model with a million parameters: docs/effect.md has the experiment with intervals.")
    print(f"Report: {plain(str(write_report(folders[::-1], Path(args.output) / 'report.html')))}")
    return 0


def _comparison(results: dict[str, Any], width: int) -> str:
    """The prompts that were chosen and the metrics of both runs."""
    lines = []
    for choice in results["sapo"].choices:
        before = f"{choice['loss']:.2f} nats a token before training, the original {choice['original_loss']:.2f}"
        lines.append(f"{choice['task']}: prompt {choice['index']} of {choice['prompts']}, {before}")
        lines.append(f"  {cut(choice['prompt'], width - 2)}")
    body = []
    for policy, result in results.items():
        percent = [f"{100 * result.metrics['rougeL'][name]:.1f}" for name in ("AP", "BWT", "FWT")]
        body.append([*percent, f"{result.metrics['loss']['AP']:.2f}", policy])
    return "\n".join([*lines, table(["AP", "BWT", "FWT", "loss", "prompts (ROUGE-L in percent)"], body, width)])
