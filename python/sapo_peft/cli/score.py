"""`sapo score`: rank the prompts of a task by their loss under a model as it is now."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..terminal import MODEL_HELP, log_on_stderr, plain, say_notes, terminal_width

if TYPE_CHECKING:
    from sapo_kernels import PromptScores, ResponseCache

    from ..data.examples import Examples
    from ..data.prompt_pool import PromptPool
    from .parts import Parts

HELP = "rank prompts by their loss under a model"
PLAIN_BATCH = 8
EXAMPLES = 250
# Of the bundled task, on a CPU and with the plain loop beside it: a few seconds.
BUNDLED_EXAMPLES = 32
# Largest difference to the plain loop that float32 rounding explains, nats per token.
TOLERANCE = 1e-4
IMPLS = ("auto", "tree", "padded", "alone", "triton", "sdpa", "reference")
# How a file of scores begins.
OURS = b'"sapo_kernels.PromptScores/'
EPILOG = """\
Without --prompts and --data a bundled task is scored; with --model tiny (the default) nothing is
downloaded. The loss is the sum of the negative log-likelihoods of the response tokens over their number, in
nats. Its difference to the best prompt comes with a standard error that is paired over the examples: the loss
is a ratio of two sums, it is linearised, and the error is that of the mean difference of the residuals.
With --out, what is scored is kept in FILE.part until all is done: after Ctrl-C --resume continues.
"""


def options(add: Callable) -> None:
    """Declare the options of `sapo score`."""
    add("--model", default="tiny", metavar="DIR_OR_ID", help=MODEL_HELP)
    add("--adapter", metavar="DIR_OR_ID", help="PEFT adapter to score with")
    add("--tokenizer", metavar="DIR_OR_ID", help="tokenizer, if it is not beside the model")
    add("--prompts", metavar="FILE", help="prompts: JSON, one per line in a .txt file, a saved pool, or a folder")
    data = "examples: .json, .jsonl, .csv, .tsv, .parquet, a task folder, or a dataset of the hub (owner/name)"
    add("--data", metavar="FILE_OR_DIR", help=data)
    add("--task", metavar="NAME", help="which task, if the files have several")
    counts = f"number of examples (default {EXAMPLES}, of the bundled task {BUNDLED_EXAMPLES})"
    add("--examples", type=int, metavar="N", help=counts)
    add("--input-column", metavar="NAME", help="field with the input text")
    add("--target-column", metavar="NAME", help="field with the label")
    add("--skip-empty", action="store_true", help="leave out rows with an empty label (default: an error)")
    add("--instruction-role", default="user", choices=("user", "system"), help="turn that the instruction is in")
    for option, most, what in (("--max-source", 1536, "context"), ("--max-target", 128, "response")):
        add(option, type=int, default=most, metavar="N", help=f"longest {what} in tokens (default {most})")
    add("--race", action="store_true", help="score only the cells that it takes to find the best prompt")
    add("--impl", default="auto", choices=IMPLS, help="how to score; auto finds the fastest way that is right")
    add("--max-tokens", type=int, metavar="N", help="new tokens per forward")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--compare", action="store_true", help="also run the plain loop and compare times and values")
    add("--out", metavar="FILE", help="write the scores as JSON")
    add("--resume", action="store_true", help="continue a stopped call with the same --out")
    add("--overwrite", action="store_true", help="replace any file at --out")
    add("--full", action="store_true", help="the full text of every prompt")
    add("--quiet", action="store_true", help="no progress and no notes, the result only")


def run(args: argparse.Namespace) -> int:
    """Score and print; every input is read and checked before the model is loaded."""
    from ..locks import only_writer
    from .outputs import check_file
    from .parts import Parts

    if args.resume and (args.race or args.out is None):
        raise ValueError("--resume: expected it with --out, and without --race, whose rounds are not kept")
    pool, examples = _task(args)
    check_file("--out", args.out, (args.prompts, args.data, examples.source), OURS, args.overwrite)
    say_notes([*pool.notes(), *examples.notes()], args.quiet)
    with only_writer(args.out), log_on_stderr("sapo_kernels", args.quiet):
        parts = Parts(args.out, _record(args, pool, examples), resume=args.resume, overwrite=args.overwrite)
        return _score(args, pool, examples, parts)


def _score(args: argparse.Namespace, pool: PromptPool, examples: Examples, parts: Parts) -> int:
    import torch

    import sapo_kernels as sk
    from sapo_kernels.scoring.render import reads_clock

    from ..loading import load, spare_threads
    from .ranking import best_texts, conclusion, ranked_table, rendered_example

    spare_threads(args.model)
    model, tokenizer = load(args.model, args.adapter, args.dtype, args.device, args.tokenizer)
    started = time.perf_counter()
    cache = sk.ResponseCache.build(
        tokenizer, pool.prompts, examples, suffix=pool.suffix, text_word=pool.text_word, max_source=args.max_source,
        max_target=args.max_target, instruction_role=args.instruction_role,
        now=parts.moment() if reads_clock(tokenizer) else None,
    )  # fmt: skip
    prepared = time.perf_counter()
    scores = _scores(args, model, cache, parts)
    seconds = time.perf_counter() - prepared

    weight = next(model.parameters())
    where = f"{args.model}, {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    width = 10**9 if args.full else terminal_width()
    print(plain(f"{pool.task}: {len(pool.prompts)} prompts x {len(examples)} of {examples.total} examples, {where}"))
    print(ranked_table(scores, width))
    if not args.full:
        print("\n".join(best_texts(scores)))
    if not args.quiet:
        print("\n".join(rendered_example(tokenizer, cache, scores.ranking()[0], 6 * width)))
    print(_cost(scores))
    # Before the comparison, which takes long, and after the table: neither may cost the other.
    if args.out is not None:
        _save(args.out, scores, parts)
    print(f"Time: {seconds:.2f} s to score, {prepared - started:.2f} s to render and tokenise before.")
    difference = 0.0
    if args.compare:
        usual, difference = _compare(model, cache, scores)
        print(
            f"Plain loop on the same token ids (padded batches of {PLAIN_BATCH}, full logits): {usual:.2f} s, "
            f"{usual / seconds:.2f} times the time; largest difference of a cell {difference:.1e} nats per token."
        )
    print("\n".join(conclusion(scores, random=args.model == "tiny" and args.adapter is None)))
    if args.out is not None:
        print(f"Scores written to {plain(args.out)}.")
    if difference > TOLERANCE and weight.dtype == torch.float32:
        print(f"sapo: error: more than {TOLERANCE} nats per token off the plain loop", file=sys.stderr)
        return 1
    return 0


def _scores(args: argparse.Namespace, model: Any, cache: ResponseCache, parts: Parts) -> PromptScores:
    """In parts where they are kept, else at once; off a terminal lines say how far it is."""
    import sapo_kernels as sk
    from sapo_kernels.scoring.progress import Lines

    lines = not args.quiet and not sys.stderr.isatty()
    options = {"impl": args.impl, "max_tokens": args.max_tokens, "progress": False if args.quiet else None}
    if args.race or parts.path is None:
        if lines:
            what = "race, at most" if args.race else "scoring"
            options["progress"] = Lines(what, "cell", cache.num_prompts * cache.num_examples)
        return sk.score_prompts(model, cache, race=sk.Race() if args.race else None, **options)
    try:
        return parts.score(model, cache, lines, **options)
    except KeyboardInterrupt:
        if parts.kept:
            said = f"{parts.kept} scored cells are kept in {parts.path}; the same command with --resume continues"
            print(f"\nsapo: {plain(said)}", file=sys.stderr)
        raise


def _save(out: str, scores: PromptScores, parts: Parts) -> None:
    from sapo_kernels.files import write_json

    from .outputs import naming

    with naming(out):
        write_json(out, {**scores.to_dict(), **parts.record, "ranking": scores.ranking()})
    parts.done()


def _cost(scores: PromptScores) -> str:
    dense, done = scores.stats["dense_tokens"], scores.stats["trie_tokens"]
    text = f"Tokens: {done} computed for {dense} in all sequences"
    saved = f"{1 - done / dense:.0%} saved: {dense / done:.2f}x" if done < dense else "nothing is shared"
    cells = int((scores.tokens > 0).sum())
    race = f" The race scored {cells} of {scores.tokens.numel()} cells." if cells < scores.tokens.numel() else ""
    return f"{text} ({saved}).{race}"


def _compare(model: Any, cache: ResponseCache, scores: PromptScores) -> tuple[float, float]:
    """(seconds of the plain loop, largest difference of a scored cell in nats per token)."""
    import torch

    from ..plain_loop import plain_scores

    started = time.perf_counter()
    nll = plain_scores(model, cache, PLAIN_BATCH)
    seconds = time.perf_counter() - started
    # Cells that both find NaN, or both infinite, agree.
    same = (nll == scores.nll) | (nll.isnan() & scores.nll.isnan()) | (scores.tokens == 0)
    difference = torch.where(same, 0.0, (nll - scores.nll).abs() / scores.tokens)
    return seconds, float(difference.nan_to_num(nan=torch.inf).max())


def _task(args: argparse.Namespace) -> tuple[PromptPool, Examples]:
    """The prompts and examples to score, read and checked."""
    from ..data.tasks import read_task

    if (args.prompts is None) != (args.data is None):
        got = "--prompts" if args.data is None else "--data"
        raise ValueError(f"expected --prompts and --data, or neither for a bundled task; got {got} only")
    prompts, data, task, most = args.prompts, args.data, args.task, EXAMPLES
    if prompts is None:
        from ..assets import BUNDLED_DIR, task_names

        prompts, data, task, most = BUNDLED_DIR, BUNDLED_DIR, task or task_names()[0], BUNDLED_EXAMPLES
        say_notes(["no --prompts and --data: scoring a bundled task"], args.quiet)
    return read_task(
        prompts, data, task, input_column=args.input_column, target_column=args.target_column,
        limit=most if args.examples is None else args.examples, skip_empty=args.skip_empty,
    )  # fmt: skip


def _record(args: argparse.Namespace, pool: PromptPool, examples: Examples) -> dict[str, Any]:
    """What the scores of a job depend on, beside the cells themselves; written with them."""
    return {
        "model": args.model, "adapter": args.adapter, "tokenizer": args.tokenizer, "dtype": args.dtype,
        "task": pool.task, "data": examples.source, "columns": list(examples.columns), "suffix": pool.suffix,
        "text_word": pool.text_word, "max_source": args.max_source, "max_target": args.max_target,
        "instruction_role": args.instruction_role, "impl": args.impl,
    }  # fmt: skip
