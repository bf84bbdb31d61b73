"""One part of the GPU suite in this process: ``python -m benchmarks.gpu_parts NAME --out DIR``; see gpu_suite.py."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from . import PARTS, Job, run_part


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU, Triton in its interpreter")
    given = parser.parse_args(argv)
    if given.toy:
        # Before anything imports triton: kernels choose the interpreter when they are decorated.
        os.environ["TRITON_INTERPRET"] = "1"
    device = "cpu" if given.toy else "cuda"
    run_part(Job(device, given.toy, given.seconds, given.out, given.name, given.data))


if __name__ == "__main__":
    main()
