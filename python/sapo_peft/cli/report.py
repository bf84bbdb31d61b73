"""`sapo report`: one HTML file about a run of `sapo sequence`, or about several side by side."""

from __future__ import annotations

import argparse
from typing import Any

from ..terminal import plain

_EPILOG = """\
With the folder of one run first, the report is about that run and compares it with the others; runs of another
policy with the same method, order, tasks, model and seed are its baselines. With a folder that holds several runs,
the report is about all of them. The file holds everything it needs: it can be mailed, printed and opened anywhere.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the options of `sapo report`."""
    parser = subparsers.add_parser(
        "report",
        help="write an HTML report of sequence runs",
        description=__doc__,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder of a run, or one that holds several")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: report.html in the first folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace whatever file is there")
    return parser


def run(args: argparse.Namespace) -> int:
    """Read, check, write, and say where."""
    from ..report import write_report
    from .outputs import naming

    with naming(args.out or args.runs[0]):
        written = write_report(args.runs, args.out, args.overwrite)
    print(f"Report written to {plain(str(written))}.")
    return 0
