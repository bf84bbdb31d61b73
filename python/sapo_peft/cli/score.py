"""`sapo score`: rank the prompts of a task by their loss under a model as it is now."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..terminal import MODEL_HELP, log_on_stderr, plain, terminal_width

if TYPE_CHECKING:
    from sapo_kernels import PromptScores, ResponseCache

    from ..data.examples import Examples
    from ..data.prompt_pool import PromptPool

MAX_TEMPLATE_BYTES = 2**20
PLAIN_BATCH = 8
EXAMPLES = 250
# All bundled tasks on a CPU, with the plain loop beside them, should take a minute and not an hour.
BUNDLED_EXAMPLES = 8
# Largest difference to the plain loop that float32 rounding explains, nats per token.
TOLERANCE = 1e-4
_EPILOG = """\
Without --prompts and --data the bundled tasks are scored; with --model tiny (the default) nothing is
downloaded. The loss is the sum of the negative log-likelihoods of the response tokens over their number, in
nats. Its difference to the best prompt comes with a standard error that is paired over the examples: the loss
is a ratio of two sums, it is linearised, and the error is that of the mean difference of the residuals.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the options of `sapo score`."""
    parser = subparsers.add_parser(
        "score",
        help="rank prompts by their loss under a model",
        description=__doc__,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        default="tiny",
        metavar="DIR_OR_ID",
        help=MODEL_HELP,
    )
    add("--adapter", metavar="DIR_OR_ID", help="PEFT adapter to score with")
    add("--tokenizer", metavar="DIR_OR_ID", help="tokenizer, if it does not lie beside the model")
    add("--prompts", metavar="FILE", help="prompts: JSON, one per line in a .txt file, or a folder")
    add("--data", metavar="FILE_OR_DIR", help="examples: .json, .jsonl, .csv, .tsv or a task folder")
    add("--task", metavar="NAME", help="task, where the files hold several")
    counts = f"number of examples (default {EXAMPLES}, of the bundled tasks {BUNDLED_EXAMPLES} each)"
    add("--examples", type=_positive, metavar="N", help=counts)
    add("--input-column", metavar="NAME", help="field with the input text")
    add("--target-column", metavar="NAME", help="field with the label")
    add("--skip-empty", action="store_true", help="leave out rows with an empty label (default: an error)")
    add("--template", metavar="FILE_OR_STRING", help="user turn with {prompt} and {input}")
    add("--suffix", metavar="TEXT", help="answer-format line after the input (default: the task's own)")
    add("--text-word", metavar="WORD", help="word that heads the input (default: the task's own or Text)")
    add(
        "--max-source",
        type=_positive,
        default=1536,
        metavar="N",
        help="longest context in tokens (default 1536)",
    )
    add(
        "--max-target",
        type=_positive,
        default=128,
        metavar="N",
        help="longest response in tokens (default 128)",
    )
    add("--impl", default="auto", help="auto, tree, padded, or a backend of the tree")
    add("--max-tokens", type=_positive, metavar="N", help="new tokens per forward")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--compare", action="store_true", help="also run the plain loop and compare times and values")
    add("--out", metavar="FILE", help="write the scores as JSON")
    add("--quiet", action="store_true", help="no progress and no notes, the result only")
    return parser


def run(args: argparse.Namespace) -> int:
    """Score and print; every input is read and checked before the model is loaded."""
    import torch

    from sapo_kernels.scoring.score import ROADS

    if args.impl not in ROADS:
        raise ValueError(f"--impl: wanted one of {', '.join(ROADS)}, got {args.impl!r}")
    if args.template is not None and (args.suffix is not None or args.text_word is not None):
        raise ValueError("--template: wanted it alone, got --suffix or --text-word too; write them into it")
    _check_out(args.out)
    template = _template(args.template)
    jobs = _jobs(args)
    if args.out is not None and len(jobs) > 1:
        raise ValueError(f"--out: wanted one task, got {len(jobs)}; choose one with --task")
    if template is not None and any(prompts.suffix for prompts, _ in jobs):
        _note(args, "--template: the task's own suffix is not added; write it into the template if it is wanted")
    for prompts, examples in jobs:
        _note(args, *prompts.notes(), *examples.notes())

    from ..loading import load, spare_threads

    spare_threads(args.model)
    model, tokenizer = load(args.model, args.adapter, args.dtype, args.device, args.tokenizer)
    total = _Times()
    with log_on_stderr("sapo_kernels", args.quiet):
        for number, (prompts, examples) in enumerate(jobs):
            if number:
                print()
            total.add(_score(args, model, tokenizer, template, prompts, examples))
    if len(jobs) > 1:
        print("\n".join(["", f"All {len(jobs)} tasks together:", *total.lines()]))
    if total.difference > TOLERANCE and next(model.parameters()).dtype == torch.float32:
        print(f"sapo: error: more than {TOLERANCE} nats per token off the plain loop", file=sys.stderr)
        return 1
    return 0


@dataclass
class _Times:
    """Wall seconds of one or more tasks; the last two are of the plain loop, where it ran."""

    prepare: float = 0.0
    score: float = 0.0
    plain: float = 0.0
    difference: float = 0.0

    def add(self, other: _Times) -> None:
        self.prepare += other.prepare
        self.score += other.score
        self.plain += other.plain
        self.difference = max(self.difference, other.difference)

    def lines(self) -> list[str]:
        lines = [f"Time: {self.score:.2f} s to score, {self.prepare:.2f} s to render and tokenise before."]
        if self.plain:
            lines.append(
                f"Plain loop on the same token ids (padded batches of {PLAIN_BATCH}, full logits): "
                f"{self.plain:.2f} s, {self.plain / self.score:.2f} times the time; "
                f"largest difference of a cell {self.difference:.1e} nats per token."
            )
        return lines


def _score(args, model, tokenizer, template, prompts: PromptPool, examples: Examples) -> _Times:
    import sapo_kernels as sk

    from .ranking import ranked_table

    started = time.perf_counter()
    cache = sk.ResponseCache.build(
        tokenizer,
        prompts.prompts,
        examples,
        template=template,
        suffix=prompts.suffix if args.suffix is None else args.suffix,
        text_word=prompts.text_word if args.text_word is None else args.text_word,
        max_source=args.max_source,
        max_target=args.max_target,
    )
    times = _Times(prepare=time.perf_counter() - started)
    started = time.perf_counter()
    progress = False if args.quiet else None
    scores = sk.score_prompts(model, cache, impl=args.impl, max_tokens=args.max_tokens, progress=progress)
    times.score = time.perf_counter() - started
    if args.out is not None:
        # Before the comparison and the printing: neither may cost the result.
        scores.save(args.out)

    weight = next(model.parameters())
    where = f"{args.model}, {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    size = f"{len(prompts.prompts)} prompts x {len(examples)} of {examples.total} examples"
    print(plain(f"{prompts.task or args.data}: {size}, {where}"))
    print(ranked_table(scores, terminal_width()))
    print(_cost(scores))
    if args.compare:
        times.plain, times.difference = _compare(model, cache, scores)
    print("\n".join(times.lines()))
    print(_choice(scores, prompts))
    if args.out is not None:
        print(f"Scores written to {plain(args.out)}.")
    return times


def _cost(scores: PromptScores) -> str:
    dense, done = scores.stats["dense_tokens"], scores.stats["trie_tokens"]
    text = f"Tokens: {done} computed for {dense} in all sequences"
    if scores.stats["road"] == "tree":
        return f"{text} ({1 - done / dense:.0%} saved by shared prefixes: {dense / done:.2f}x)."
    return f"{text} (padded road, nothing is shared)."


def _compare(model: Any, cache: ResponseCache, scores: PromptScores) -> tuple[float, float]:
    """(seconds of the plain loop, largest difference of a cell in nats per token)."""
    import torch

    from ..plain_loop import plain_scores

    started = time.perf_counter()
    nll = plain_scores(model, cache, PLAIN_BATCH)
    seconds = time.perf_counter() - started
    # Cells that both find NaN, or both infinite, agree.
    same = (nll == scores.nll) | (nll.isnan() & scores.nll.isnan())
    difference = torch.where(same, 0.0, (nll - scores.nll).abs() / scores.tokens)
    return seconds, float(difference.nan_to_num(nan=torch.inf).max())


def _choice(scores: PromptScores, prompts: PromptPool) -> str:
    from .ranking import close_to_best, paired_difference

    best, others = scores.best, len(scores.prompts) - 1
    lines = [f"Train with prompt {best}: {plain(scores.prompts[best])}"]
    if best != 0:
        gain, error = paired_difference(scores.nll, scores.tokens, 0, best)
        lines.append(f"The original instruction (prompt 0) is {gain:.4f} +/- {error:.4f} nats per token worse.")
    else:
        lines.append("This is the original instruction.")
    if others:
        lines.append(f"{close_to_best(scores)} of {others} other prompts lie within two standard errors of it.")
    return "\n".join(lines)


def _jobs(args: argparse.Namespace) -> list[tuple[PromptPool, Examples]]:
    """The prompts and examples of every task to score, read and checked."""
    from ..data.tasks import read_task

    options = {
        "input_column": args.input_column,
        "target_column": args.target_column,
        "limit": args.examples or (BUNDLED_EXAMPLES if args.data is None else EXAMPLES),
        "skip_empty": args.skip_empty,
    }
    if (args.prompts is None) != (args.data is None):
        got = "--prompts" if args.data is None else "--data"
        raise ValueError(f"wanted --prompts and --data, or neither for the bundled tasks; got {got} only")
    if args.prompts is not None:
        return [read_task(args.prompts, args.data, args.task, **options)]

    from ..assets import BUNDLED_DIR, task_names

    tasks = task_names() if args.task is None else [args.task]
    _note(args, f"no --prompts and --data: scoring the bundled task{'s' * (len(tasks) > 1)}")
    return [read_task(BUNDLED_DIR, BUNDLED_DIR, task, **options) for task in tasks]


def _template(text: str | None) -> str | None:
    """A template as it is, or from the file it names (one final line end is not part of it)."""
    from sapo_kernels.files import read_text

    if text is None or "{prompt}" in text or "{input}" in text:
        return text
    if not os.path.exists(text):
        raise ValueError(f"--template: wanted a text with {{prompt}} and {{input}} or a file, got {text[:80]!r}")
    return read_text(text, max_bytes=MAX_TEMPLATE_BYTES).removesuffix("\n").removesuffix("\r")


def _check_out(path: str | None) -> None:
    """Find out now, not after an hour of scoring, that the result cannot be written."""
    if path is None:
        return
    folder = Path(path).resolve().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--out {path}: wanted a file in a folder that can be written to, got none")


def _note(args: argparse.Namespace, *notes: str) -> None:
    for note in notes:
        if not args.quiet:
            print(f"sapo: note: {plain(note)}", file=sys.stderr)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number of at least 1, got {text[:40]!r}")
    return value
