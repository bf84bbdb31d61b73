"""One small checked call of every kernel, for compute-sanitizer: ``python -m benchmarks.gpu_parts.sanitized cuda``."""

from __future__ import annotations

import os
import sys


def main(device: str) -> None:
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    import sapo_kernels as sk

    from .. import attention, heads, in_place
    from ..timing import Turns
    from ..workload import Cells

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    cases = [
        attention.make_case(Cells(2, 2, 4, 6, 1), "sanitized", (4, 2, 64), dtype, device, flex="off", impl="triton"),
        heads.make_case("sanitized", 40, 300, 64, dtype, device, impl="triton"),
        in_place.accumulate_case("sanitized", Cells(2, 2, 4, 6, 1), device),
    ]
    for case in cases:
        case.providers = {"ours": case.providers["ours"]}
        case.providers["ours"].calls = 1
        Turns(case, device).turn()
    state = sk.PromptState(4, 21, device=device)
    nll = torch.rand(4, 21, dtype=torch.float64).to(device)
    sk.reweight_(state, nll, torch.ones(4, 21, dtype=torch.int64, device=device))
    wanted = nll.argmin(1)
    if not torch.equal(state.best, wanted):
        raise SystemExit(f"reweight_: expected best {wanted.tolist()}, got {state.best.tolist()}")
    print(f"{len(cases) + 1} operators ran and agreed")


if __name__ == "__main__":
    main(sys.argv[1])
