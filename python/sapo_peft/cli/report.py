"""`sapo report`: one HTML file about a run of `sapo sequence`, compared with others."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ..terminal import plain

HELP = "write an HTML report of sequence runs"
EPILOG = """\
The report is about the first run and compares it with the others; runs of another policy with the same method, order,
tasks, model and seed are its baselines. Of a folder that holds several runs the first is SAPO's of the lowest seed.
The file holds everything it needs: it can be mailed, printed and opened anywhere.
"""


def options(add: Callable) -> None:
    """Declare the options of `sapo report`."""
    add("runs", nargs="+", metavar="RUN_DIR", help="folder of a run, or one that holds several")
    add("--out", metavar="FILE", help="file to write (default: report.html in the first folder)")
    add("--overwrite", action="store_true", help="replace whatever file is there")


def run(args: argparse.Namespace) -> int:
    """Read, check, write, and say where."""
    from ..report import write_report
    from .outputs import naming

    with naming(args.out or args.runs[0]):
        written = write_report(args.runs, args.out, args.overwrite)
    print(f"Report written to {plain(str(written))}.")
    return 0
