"""Kernel configurations worth trying on each architecture: the one in use first, then its neighbours.

The GPU suite measures them; `python -m tests.native.aot` compiles them ahead of time: what does each take of a part?
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch

# (rows of a tile, keys at once, warps, stages). At most trie.tiles.TILE_ROWS rows and CHUNK keys.
ATTENTION = (
    (64, 32, 4, 2),
    (64, 32, 4, 3),
    (64, 32, 4, 4),
    (64, 16, 4, 3),
    (64, 16, 4, 4),
    (64, 32, 8, 3),
    (32, 32, 4, 3),
)
# The same of the backward kernels: of dQ, and of dK and dV (rows at once, at most KEY_TILE keys of a piece).
QUERIES = ((64, 32, 4, 2), (64, 32, 4, 3), (64, 16, 4, 3), (64, 32, 8, 2), (32, 32, 4, 2))
KEYS = ((32, 32, 4, 2), (32, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 3), (32, 32, 4, 3), (64, 32, 4, 2))
# (rows, columns, hidden of a tile, warps, stages), likewise.
LOGPROB = ((128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (64, 256, 64, 8, 3), (64, 128, 64, 4, 4), (128, 128, 32, 8, 4),
           (128, 64, 64, 4, 4), (256, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 4))  # fmt: skip
TOY = {"attention": ((32, 16, 1, 1), (16, 16, 1, 1)), "logprob": ((16, 32, 32, 1, 1), (16, 16, 32, 1, 1))}
ATTENTION_NAMES, LOGPROB_NAMES = ("BLOCK_M", "BLOCK_N"), ("BLOCK_M", "BLOCK_V", "BLOCK_K")
# Where a kernel is not the operation that is timed.
TIMED = {kernel: "tree_attention_backward" for kernel in ("tree_attention queries", "tree_attention keys")}
# Kernel: (module and function that chooses its configuration, names of a tile's sides, what is tried, at toy size).
KERNELS = {
    "tree_attention": ("tree_attention.triton.config", ATTENTION_NAMES, ATTENTION, TOY["attention"]),
    "tree_attention queries": (
        "tree_attention.triton_backward.queries_config", ATTENTION_NAMES, QUERIES, TOY["attention"]
    ),
    "tree_attention keys": ("tree_attention.triton_backward.keys_config", ATTENTION_NAMES, KEYS, TOY["attention"]),
    "linear_logprob": ("linear_logprob.triton.config", LOGPROB_NAMES, LOGPROB, TOY["logprob"]),
}  # fmt: skip


def label(options: dict[str, int]) -> str:
    """Such as ``128x64x64 w8 s4``."""
    tile = "x".join(str(value) for name, value in options.items() if name.startswith("BLOCK_"))
    return f"{tile} w{options['num_warps']} s{options['num_stages']}".strip()


def _chooser(kernel: str) -> tuple[ModuleType, str]:
    module, _, name = KERNELS[kernel][0].rpartition(".")
    return importlib.import_module(f"sapo_kernels.{module}"), name


def candidates(kernel: str, width: int, dtype: torch.dtype, capability: int, toy: bool = False) -> list[dict[str, int]]:
    """Options of a kernel, those in use first. width: of a head, for linear_logprob of the hidden rows."""
    module, name = _chooser(kernel)
    # The head's kernel has another one with tensor descriptors.
    described = (90 <= capability < 120 and dtype != torch.float32,) if kernel == "linear_logprob" else ()
    first = getattr(module, name)(width, dtype, capability, *described)
    names = (*KERNELS[kernel][1], "num_warps", "num_stages")
    extra = {name: value for name, value in first.items() if name not in names}
    found = [first]
    for values in KERNELS[kernel][3 if toy else 2]:
        options = {**dict(zip(names, values, strict=True)), **extra}
        if options not in found:
            found.append(options)
    return found


@contextlib.contextmanager
def in_use(kernel: str, options: dict[str, int]) -> Iterator[None]:
    """The launcher of a kernel of `KERNELS` takes `options` for the block."""
    module, name = _chooser(kernel)
    own = getattr(module, name)
    setattr(module, name, lambda *_, **__: dict(options))
    try:
        yield
    finally:
        setattr(module, name, own)
