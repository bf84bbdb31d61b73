"""Tile sizes and launch options of the Triton kernels of tree_attention: plain functions, one answer per architecture.

Chosen from compiler reports, for no spilled register (tests/native/aot.py), not measured on a GPU yet.
"""

from __future__ import annotations

import torch
import triton

from ..triton_tools import INTERPRET


def config(head_dim: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Of the forward kernel: BLOCK_M rows of a tile, BLOCK_N keys at once.

    Args:
        head_dim: the larger of Dk and Dv, at most 512; padded to a power of two inside.
        dtype: float32, bfloat16 or float16.
        capability: 10 * major + minor of an NVIDIA GPU, 0 for AMD.
    """
    wide = max(64, triton.next_power_of_2(head_dim))
    if INTERPRET:
        tile = (32, 16, 1, 1)
    elif dtype == torch.float32:
        # IEEE products run on the plain FMA units with both operands in registers, so the tile must be small.
        tile = {64: (32, 32, 4, 1), 128: (32, 32, 8 if capability else 4, 1)}.get(wide, (16, 16, 8, 1))
    elif wide > 256:
        tile = (32, 16, 8, 1)
    elif capability == 0:
        # CDNA3 has 64 KiB of shared memory a workgroup and 512 registers a thread at 4 waves.
        tile = {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 16, 4, 2)}[wide]
    else:
        # Tiles of 64 rows and few keys: most lists are short, and several programs share a multiprocessor.
        tile = {64: (64, 16, 4, 4), 128: (64, 32, 4, 3), 256: (64, 32, 8, 2)}[wide]
        if wide == 128 and not 90 <= capability < 120:
            tile = (64, 32, 8, 3)  # mma.sync keeps Q in registers, and 4 warps spill
    return _options(tile, capability if dtype == torch.float32 else 0)


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
        tile = {64: (32, 32, 8, 1) if capability else (16, 32, 4, 1)}.get(
            wide, (16, 16, 8 if capability and wide > 128 else 4, 1)
        )
    elif capability == 0:
        # 8 warps would leave a thread 256 registers, and q, grad and dq of a tile need more.
        tile = {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1), 512: (16, 16, 4, 1)}[wide]
    else:
        tile = {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 2), 512: (16, 16, 8, 1)}[wide]
    # RELOAD: q and grad are read again in every turn. Kept, both would lie in the registers whole, and those spill.
    chosen = {**_options(tile, capability), "RELOAD": dtype == torch.float32 and wide > 64}
    if chosen["RELOAD"]:
        chosen.pop("maxnreg", None)  # ptxas spills with the bound and does not without
    return chosen


def keys_config(head_dim: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Of the kernel for dK and dV; arguments as for `config`. BLOCK_N keys are owned, BLOCK_M rows pass by."""
    wide = max(64, triton.next_power_of_2(head_dim))
    if INTERPRET:
        tile = (32, 16, 1, 1)
    elif dtype == torch.float32:
        # 8 keys of 512 numbers: 97 KiB of shared memory, which consumer parts have.
        tile = {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1), 512: (16, 8, 8, 1)}[wide]
        if capability == 0:
            tile = (16, 32, 4, 1) if wide <= 128 else (16, 16, 4, 1)
    elif capability == 0:
        tile = {64: (64, 32, 4, 1), 128: (32, 64, 4, 1), 256: (32, 16, 4, 1), 512: (16, 16, 4, 1)}[wide]
    else:
        tile = {64: (32, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2), 512: (16, 16, 8, 1)}[wide]
        if wide == 128 and 90 <= capability < 100:
            # wgmma's tiles of 64 keys spill with 32 rows or more.
            tile = (32, 32, 4, 2)
    return _options(tile, capability)


def _options(tile: tuple[int, int, int, int], capability: int) -> dict[str, int]:
    chosen = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile, strict=True))
    if capability > 0:
        # Without it ptxas trades a few spills for a second block on the SM.
        chosen["maxnreg"] = 255
    return chosen
