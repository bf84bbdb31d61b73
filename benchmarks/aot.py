"""What every kernel configuration takes of each NVIDIA part, from the rows of `python -m tests.native.aot`.

Registers, spills and shared memory are the compiler's. "warps" is the bound that they put on the warps resident on a
multiprocessor, out of what it can hold: few warps are no fault of a kernel whose matrix instructions are asynchronous,
but a bound that falls without a reason is.
"""

from __future__ import annotations

import csv
import re

from .documents import table
from .rows import ROOT

PATH = ROOT / "tests" / "native" / "aot.csv"
# CUDA programming guide, "technical specifications": registers, shared KiB (1 KiB a block is the system's), warps and
# blocks of a multiprocessor.
PARTS = {
    "sm_80": (65536, 164, 64, 32),
    "sm_89": (65536, 100, 48, 24),
    "sm_90": (65536, 228, 64, 32),
    "sm_100": (65536, 228, 64, 32),
    "sm_120": (65536, 100, 48, 24),
}
# Registers are handed out to warps in units of 256.
REGISTER_UNIT = 256


def occupancy(target: str, registers: int, shared: int, warps: int) -> str:
    """``16 of 64``: resident warps at most and what one multiprocessor of the part can hold, for blocks of `warps`."""
    file, shared_kib, most_warps, most_blocks = PARTS[target]
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(file // (of_a_warp * warps), shared_kib * 1024 // (shared + 1024), most_warps // warps, most_blocks)
    return f"{blocks * warps} of {most_warps}"


def made_table() -> list[str]:
    """Registers, shared memory and the bound on resident warps of each configuration in use; then the candidates."""
    shapes: dict[str, dict[str, str]] = {}
    candidates: list[list[str]] = []
    with open(PATH, newline="") as file:
        uses = [row for row in csv.DictReader(file) if row["target"] in PARTS]
    for use in uses:
        registers, shared = int(use["registers"]), int(use["shared"])
        warps = occupancy(use["target"], registers, shared, int(re.search(r"w(\d+)", use["configuration"])[1]))
        name, kib = f"{use['kernel']} {use['shape']}".strip(), f"{shared / 1024:.0f}"
        if use["role"] == "in use":
            shapes.setdefault(name, {})[use["target"]] = f"{use['configuration']}: {registers} / {kib} / {warps}"
        else:
            candidates.append([name, use["configuration"], str(registers), use["spills"], kib, warps, use["complaint"]])
    targets = ("sm_80", "sm_90", "sm_100")
    lines = ["Tile, warps, stages: registers / shared KiB / warps resident at most.", ""]
    lines += table(
        ["kernel", *targets], [[n, *(of.get(target, "-") for target in targets)] for n, of in shapes.items()]
    )
    lines += ["", "Candidates that the GPU suite tries on sm_90:", ""]
    header = ["kernel", "configuration", "registers", "spills, B", "shared KiB", "warps", "unfit"]
    return [*lines, *table(header, candidates), "", f"{len(uses)} compilations, triton {uses[0]['triton']}."]
