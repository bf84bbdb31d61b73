"""``python -m benchmarks.effect``: does training on the prompt that SAPO chooses help?

    python -m benchmarks.effect run single --work DIR                  # single-task runs under every prompt
    python -m benchmarks.effect run sequences --work DIR               # sequences under every policy
    python -m benchmarks.effect run sequences --work DIR --backwards   # a second process, from the other end
    python -m benchmarks.effect table            # write the tables of docs/effect.md from the rows
    python -m benchmarks.effect table --check    # exit status 1 if they are not up to date

`run` goes on where it was, and writes benchmarks/effect/results/ from all rows that are there when it ends.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from . import rows, table

RUNS = ("single", "sequences")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.effect", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is missing")
    run.add_argument("kind", choices=RUNS)
    run.add_argument("--work", type=Path, required=True, help="folder with one file a finished run")
    run.add_argument("--backwards", action="store_true", help="begin with the last run")
    run.add_argument("--minutes", type=float, default=24 * 60.0, help="begin no run after so long")
    run.add_argument("--threads", type=int, default=1)
    tables = commands.add_parser("table", help="write the tables in the documents")
    tables.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    if args.command == "table":
        old = table.outdated(write=not args.check)
        print("\n".join(f"{path}: {'not up to date' if args.check else 'written'}" for path in old) or "up to date")
        return int(args.check and bool(old))

    from . import runner

    torch.set_num_threads(args.threads)
    until = time.time() + 60 * args.minutes
    work = runner.run_singles if args.kind == "single" else runner.run_sequences
    left = work(args.work, args.backwards, until)
    count = rows.collect(args.work, args.kind, runner.made_by())
    print(f"{count} rows of {args.kind} in {rows.RESULTS}; {left} runs left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
