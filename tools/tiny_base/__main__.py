"""``python -m tools.tiny_base``: where a tiny base lies, trained first if need be.

python -m tools.tiny_base --preset large           # a folder in the cache, for --model
python -m tools.tiny_base --preset default --out DIR   # train the shipped one again
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sapo_peft.terminal import plain
from tools.tiny_base.presets import PRESETS
from tools.tiny_base.store import make_base, tiny_base_folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_base", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="default")
    parser.add_argument("--out", type=Path, help="train in any case and write to this new folder")
    args = parser.parse_args(argv)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.out is not None:
        try:
            args.out.mkdir(parents=True)
        except OSError as error:
            parser.error(f"--out {plain(str(args.out))}: expected a new folder, got: {error.strerror}")
        make_base(PRESETS[args.preset], args.out, say)
        print(args.out)
    else:
        print(tiny_base_folder(args.preset, make=lambda preset, folder: make_base(preset, folder, say)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
