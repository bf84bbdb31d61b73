"""One small checked call of every kernel, for compute-sanitizer: ``python -m benchmarks.gpu_parts.sanitized cuda``."""

from __future__ import annotations

import os
import sys


def main(device: str) -> None:
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"

    from .. import ops  # noqa: F401
    from ..registry import OPS, Setting
    from ..timing import Turns
    from ..workload import Cells

    cells, setting = Cells(2, 2, 4, 6, 1), Setting(device, impl="triton")
    shapes = {
        "tree_attention": (cells, (4, 2, 64)), "linear_logprob": (40, 300, 64), "accumulate": (cells,),
        "reweight": (4, 21),
    }  # fmt: skip
    for op, shape in shapes.items():
        case = OPS[op].build("sanitized", setting, only=("ours",), shape=shape)
        case.calls = 1
        Turns(case, device).turn()
    print(f"{len(shapes)} operators ran and agreed")


if __name__ == "__main__":
    main(sys.argv[1])
