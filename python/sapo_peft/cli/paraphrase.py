"""`sapo paraphrase`: fill a pool with checked paraphrases of a task's instruction."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..terminal import log_on_stderr, plain, table, terminal_width

if TYPE_CHECKING:
    from ..data.prompt_pool import PromptPool
    from ..paraphrase import ParaphraseSource

HELP = "get paraphrases of an instruction and check them"
COUNT = 20
_SHOWN_REJECTED = 20
EPILOG = """\
The pool is written to --out as the answers arrive. Run the same command again after an interruption or an
outage: it resumes and asks only for what is missing. The key of an endpoint is taken from the environment
 (OPENAI_API_KEY, or the variable that --key-variable names) and is written nowhere.
"""


def options(add: Callable) -> None:
    """Declare the options of `sapo paraphrase`."""
    add("--prompts", required=True, metavar="FILE", help="the instruction, as for `sapo score` (the first one)")
    add("--task", metavar="NAME", help="which task, if the file has several")
    add("--paraphrase-with", metavar="URL_OR_DIR", help="OpenAI-compatible endpoint, or folder or hub name of a model")
    add("--model", metavar="NAME", help="the model to ask for at the endpoint")
    add("--from", dest="from_file", metavar="FILE", help="take the paraphrases from a file")
    add("--count", type=int, metavar="N", help=f"paraphrases to add (default {COUNT}; of a file all)")
    add("--minimum", type=int, default=1, metavar="N", help="fewer than this are an error (default 1)")
    add("--out", required=True, metavar="FILE", help="the pool, a .json file; an existing one is continued")
    add("--overwrite", action="store_true", help="start over, replacing any file at --out")
    add("--deadline", type=float, default=600.0, metavar="S", help="longest time in seconds (default 600)")
    add("--request-seconds", type=float, default=58.0, metavar="S", help="longest time for one request (default 58)")
    add("--seed", type=int, default=0, metavar="N", help="seed of a local model's sampling")
    add("--key-variable", metavar="NAME", help="environment variable with the key (default OPENAI_API_KEY)")
    add("--marker", action="append", default=[], metavar="TEXT", help="text that every prompt must contain; repeatable")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--quiet", action="store_true", help="no notes, the result only")


def run(args: argparse.Namespace) -> int:
    """Ask, check, write and print; the original and the arguments are checked before anything is asked."""
    from ..data.prompt_files import MAX_PROMPTS
    from ..data.prompt_pool import PromptPool
    from ..paraphrase import gather
    from .outputs import naming

    _check(args)
    pool = PromptPool.read(args.prompts, args.task)
    if args.marker:
        pool = pool.checked(markers=args.marker)
    count = args.count
    if count is None:
        count = COUNT if args.from_file is None else MAX_PROMPTS - len(pool.prompts)
    with log_on_stderr("sapo_peft.paraphrase", args.quiet, logging.INFO):
        source = _source(args)
        # A file simply holds what it holds: to ask it for all is not to ask for too many.
        logger = logging.getLogger("sapo_peft.paraphrase")
        if args.from_file is not None and args.count is None:
            logger.setLevel(logging.ERROR)
        with naming(args.out):
            pool = gather(pool, source, count, args.minimum, args.deadline, args.out, overwrite=args.overwrite)
    _print(pool, args.out)
    if spent := getattr(source, "spent", ""):
        print(f"Usage, as the endpoint counts it: {spent}.")
    return 0


def _check(args: argparse.Namespace) -> None:
    if (args.from_file is None) == (args.paraphrase_with is None):
        got = "neither" if args.from_file is None else "both"
        raise ValueError(f"expected --paraphrase-with or --from, got {got}")
    url = args.paraphrase_with is not None and "://" in args.paraphrase_with
    for option, value in (("--model", args.model), ("--key-variable", args.key_variable)):
        if value is not None and not url:
            raise ValueError(f"{option}: expected it with --paraphrase-with URL only, got no URL")
    if url and args.model is None:
        raise ValueError("--paraphrase-with URL: expected the name of a model too (--model), got none")
    for option, path in (("--prompts", args.prompts), ("--from", args.from_file)):
        both = path is not None and os.path.exists(path) and os.path.exists(args.out)
        if both and os.path.samefile(path, args.out) and not args.overwrite:
            raise ValueError(f"--out {args.out}: expected another file than {option}, got the same (see --overwrite)")


def _source(args: argparse.Namespace) -> ParaphraseSource:
    from ..paraphrase import EndpointSource, FileSource, LocalModelSource
    from ..paraphrase.endpoint import KEY_VARIABLE

    if args.from_file is not None:
        return FileSource(args.from_file, args.task)
    if "://" in args.paraphrase_with:
        key, seconds = args.key_variable or KEY_VARIABLE, args.request_seconds
        return EndpointSource(args.paraphrase_with, args.model, key, request_seconds=seconds)
    from ..loading import load

    pair = load(args.paraphrase_with, None, args.dtype, args.device, option="--paraphrase-with")
    return LocalModelSource(*pair, seed=args.seed)


def _print(pool: PromptPool, out: str) -> None:
    width = terminal_width()
    counts = f"{len(pool.prompts) - 1} kept, {len(pool.rejected)} rejected"
    print(plain(f"{pool.task}: the original and its paraphrases: {counts}"))
    pairs = zip(pool.prompts, pool.provenance, strict=True)
    rows = [(str(index), plain(source)[:40], text) for index, (text, source) in enumerate(pairs)]
    print(table(("prompt", "from", "text"), rows, width))
    if pool.rejected:
        shown = [("", plain(r.source)[:40], f"{r.reason}: {r.text}") for r in pool.rejected[:_SHOWN_REJECTED]]
        print(table(("", "from", "rejected, and why"), shown, width))
        if len(pool.rejected) > _SHOWN_REJECTED:
            print(f"and {len(pool.rejected) - _SHOWN_REJECTED} more rejected ones, all of them in the file")
    print(f"Pool written to {plain(out)}.")
