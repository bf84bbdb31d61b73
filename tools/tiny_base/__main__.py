"""Train a tiny base.

python -m tools.tiny_base --preset default --out DIR   # the shipped one again
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sapo_peft.terminal import plain
from tools.tiny_base.presets import PRESETS
from tools.tiny_base.training import make_base


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_base", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="default")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True)
    except OSError as error:
        parser.error(f"--out {plain(str(args.out))}: expected a new folder, got: {error.strerror}")
    make_base(PRESETS[args.preset], args.out, lambda line: print(line, file=sys.stderr, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
