"""Tile sizes and launch options of the Triton kernels of tree_attention: plain functions, one answer per architecture.

Chosen from compiler reports, for no spilled register (tests/native/aot.py), not measured on a GPU yet.
"""

from __future__ import annotations

import torch
import triton

from .triton_common import INTERPRET


def config(head_dim: int, dtype: torch.dtype, capability: int, rows: int = 128) -> dict[str, int]:
    """Tile sizes and launch options. Chosen from compiler reports (no spills), not yet measured on a GPU.

    Args:
        head_dim: the larger of Dk and Dv, at most 512; padded to a power of two inside.
        dtype: float32, bfloat16 or float16.
        capability: 10 * major + minor of an NVIDIA GPU, 0 for AMD.
        rows: the largest number of (token, q head) rows of a plan block; small blocks get a smaller tile.
    """
    wide = triton.next_power_of_2(head_dim)
    if INTERPRET:
        # Small tiles, so that short test sequences cross tile borders.
        tile, warps, stages = (32, 16), 1, 1
    elif dtype == torch.float32:
        # IEEE products run on the plain FMA units with both operands in registers, so the tile must be small.
        tile, warps = {64: ((32, 32), 4), 128: ((32, 32), 8)}.get(max(wide, 64), ((16, 16), 8))
        stages = 1
    elif wide > 256:
        tile, warps, stages = (32, 16), 8, 1
    elif capability == 0:
        # CDNA3 has 64 KiB of shared memory a workgroup and 512 registers a thread at 4 waves.
        tile, warps, stages = {64: (128, 32), 128: (64, 32), 256: (64, 16)}[max(wide, 64)], 4, 2
    elif 90 <= capability < 120:
        # 227 KiB of shared memory; operands of wgmma / tcgen05 stay out of the registers.
        tile, warps, stages = {64: (128, 64), 128: (128, 64), 256: (128, 32)}[max(wide, 64)], 8, 2
        if wide == 256 and capability >= 100:
            tile = (64, 32)
    else:
        # mma.sync keeps Q in registers, and consumer parts have 99 KiB of shared memory: 128 rows spill from 128 on.
        tile, warps, stages = {64: (128, 64), 128: (64, 64), 256: (64, 32)}[max(wide, 64)], 8, 2
    chosen = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "num_warps": warps, "num_stages": stages}
    if rows <= 64:
        chosen["BLOCK_M"] = min(tile[0], 64)
    if dtype == torch.float32 and capability > 0:
        # Without it ptxas trades a few spills for a second block on the SM.
        chosen["maxnreg"] = 255
    return chosen


def careful_config(head_dim: int, dtype: torch.dtype, capability: int, sick_m: int) -> dict[str, int]:
    """Tile and options of the careful kernel, which nearly always has nothing to do: small, and spilling is avoided."""
    wide = head_dim > 128 or dtype == torch.float32
    chosen = {"BLOCK_M": min(sick_m, 16 if wide else 64), "BLOCK_N": 16, "num_warps": 4 if wide else 8, "num_stages": 1}
    if capability > 0:
        chosen["maxnreg"] = 255
    return chosen


def queries_config(head_dim: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Of the kernel for dQ; arguments as for `config`. BLOCK_M rows are owned, BLOCK_N keys pass by."""
    wide = max(64, triton.next_power_of_2(head_dim))
    if INTERPRET:
        tile = (32, 16, 1, 1)
    elif dtype == torch.float32:
        # Operands of IEEE products lie in registers whole.
        tile = {64: (32, 32, 8, 1) if capability else (16, 32, 4, 1)}.get(wide, (16, 16, 8 if capability else 4, 1))
    elif capability == 0:
        # 8 warps would leave a thread 256 registers, and q, grad and dq of a tile need more.
        tile = {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1), 512: (16, 16, 4, 1)}[wide]
    else:
        tile = {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2), 512: (16, 16, 8, 1)}[wide]
    # RELOAD: q and grad are read again in every turn. Kept, both would lie in the registers whole, and those spill.
    return {**_options(tile, capability), "RELOAD": dtype == torch.float32 and wide > 128}


def keys_config(head_dim: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Of the kernel for dK and dV; arguments as for `config`. BLOCK_N keys are owned, BLOCK_M rows pass by."""
    wide = max(64, triton.next_power_of_2(head_dim))
    if INTERPRET:
        tile = (32, 16, 1, 1)
    elif dtype == torch.float32:
        tile = {64: (32, 32, 8, 1), 128: (16, 32, 8, 1)}.get(wide, (16, 16, 8, 1))
        if capability == 0:
            tile = (16, 32, 4, 1) if wide <= 128 else (16, 16, 4, 1)
    elif capability == 0:
        tile = {64: (64, 32, 4, 1), 128: (32, 64, 4, 1), 256: (32, 16, 4, 1), 512: (16, 16, 4, 1)}[wide]
    else:
        tile = {64: (32, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2), 512: (16, 16, 8, 1)}[wide]
        if wide == 128 and 90 <= capability < 100:
            # wgmma's tiles of 64 keys spill with 32 rows or more.
            tile = (32, 32, 4, 2)
    return {**_options(tile, capability), "BLOCK_S": 64}


def _options(tile: tuple[int, int, int, int], capability: int) -> dict[str, int]:
    chosen = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile, strict=True))
    if capability > 0:
        # Without it ptxas trades a few spills for a second block on the SM.
        chosen["maxnreg"] = 255
    return chosen
