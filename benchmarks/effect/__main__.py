"""``python -m benchmarks.effect``: does training on the prompt that SAPO chooses help?

    python -m benchmarks.effect run single --base smollm2 --data DIR --work DIR       # single-task runs, every prompt
    python -m benchmarks.effect run single --base smollm2 --rate 5e-4 --data DIR --work DIR
    python -m benchmarks.effect run sequences --base smollm2 --data DIR --work DIR    # sequences under every policy
    python -m benchmarks.effect run single --base gemma3-270m --data DIR --work DIR --device cuda --minutes 9 --part 0/4
    python -m benchmarks.effect table            # write the tables of docs/effect.md from the rows
    python -m benchmarks.effect table --check    # exit status 1 if they are not up to date

`run` goes on where it was, and writes benchmarks/effect/results/ from all rows that are there when it ends. The runs on
the tiny base are done: commit aa0c360 has their code.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from ..documents import outdated
from . import rows, table
from .pretrained_design import BASES


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.effect", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is missing")
    run.add_argument("kind", choices=("single", "sequences"))
    run.add_argument("--base", choices=BASES, required=True)
    run.add_argument("--data", type=Path, required=True, help="folder with SUPERNI/ and paraphrases.json")
    run.add_argument("--work", type=Path, required=True, help="folder with one file a finished run")
    run.add_argument("--minutes", type=float, default=24 * 60.0, help="begin no run after so long")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--part", type=part, default=(0, 1), help="I/N: for N processes side by side")
    run.add_argument("--rate", type=float, help="learning rate of single-task runs, kept as rows of their own")
    run.add_argument("--threads", type=int, default=1)
    tables = commands.add_parser("table", help="write the tables in the documents")
    tables.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    if args.command == "table":
        old = outdated("effect", table.made_table, write=not args.check)
        print("\n".join(f"{path}: {'not up to date' if args.check else 'written'}" for path in old) or "up to date")
        return int(args.check and bool(old))

    from . import pretrained

    torch.set_num_threads(args.threads)
    setting = pretrained.Setting(args.base, args.data, args.device, args.part, args.rate)
    work = pretrained.run_singles if args.kind == "single" else pretrained.run_sequences
    left, kind = work(setting, args.work, time.time() + 60 * args.minutes), setting.kind(args.kind)
    count = rows.collect(args.work, kind, setting.made_by())
    print(f"{count} rows of {kind} in {rows.RESULTS}; {left} runs left")
    return 0


def part(text: str) -> tuple[int, int]:
    """I/N."""
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I below N, got {text}")
    return int(first), int(count)


if __name__ == "__main__":
    sys.exit(main())
