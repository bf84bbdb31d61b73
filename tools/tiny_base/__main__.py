"""``python -m tools.tiny_base --preset default --out DIR``: train a tiny base, as a folder for `--model`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.tiny_base.presets import PRESETS
from tools.tiny_base.store import make_base


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_base", description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="default")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True)
    make_base(PRESETS[args.preset], args.out, lambda line: print(line, file=sys.stderr, flush=True))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
