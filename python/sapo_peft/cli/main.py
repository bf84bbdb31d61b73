"""The console script `sapo`. One module a subcommand: `HELP`, `options(add)` and `run(args) -> exit code`.

A module without `options`, whose options are those of transformers' dataclasses, reads its words itself in `run`, from
`args.words`: the parser here needs neither transformers nor torch.

Exit codes: 0 done, 1 done but a check failed, 2 a fault in the call or its data (one line on stderr, no
traceback unless ``--debug``), 130 interrupted, 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from .faults import Parser, describe

# A new subcommand is one file and one entry here. The modules import torch only when they run.
COMMANDS = ("score", "train", "sequence", "export", "try", "report", "paraphrase", "doctor", "demo")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; `args.run` is the function to call."""
    parser = Parser(
        prog="sapo",
        description="State-Adaptive Prompt Optimization: train with the prompt that hurts least.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for name in COMMANDS:
        command = importlib.import_module(f".{name}", __package__)
        late, epilog = not hasattr(command, "options"), getattr(command, "EPILOG", None)
        subparser = subparsers.add_parser(
            name, help=command.HELP, description=command.__doc__, epilog=epilog, add_help=not late, allow_abbrev=False
        )
        if not late:
            command.options(subparser.add_argument)
            subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.set_defaults(run=command.run, late=late)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code."""
    if argv is None:
        for stream in (sys.stdout, sys.stderr):
            # A terminal that cannot show a character gets its escape instead of an exception.
            stream.reconfigure(errors="backslashreplace")
    debug = False
    try:
        parser = build_parser()
        args, args.words = parser.parse_known_args(argv)
        if args.words and not getattr(args, "late", False):
            parser.error(f"unrecognized arguments: {' '.join(args.words)}")
        debug = getattr(args, "debug", False) or "--debug" in args.words
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except SystemExit as error:  # argparse, after --help or an error
        return error.code if isinstance(error.code, int) else 2
    except KeyboardInterrupt:
        print("\nsapo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except Exception as error:  # the last line of defence: whatever it is, the user gets one line
        if debug:
            raise
        print(f"sapo: error: {describe(error)}", file=sys.stderr)
        return 2


def _dispatch(args: argparse.Namespace) -> int:
    if args.version:
        from sapo_kernels import __version__

        print(f"sapo-kernels {__version__}")
        return 0
    if not hasattr(args, "run"):
        build_parser().print_help()
        return 0
    return args.run(args)


def _drop_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's own flush at exit does not fail again."""
    # A stand-in for stdout may have no file behind it.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
