"""Kernel configurations worth trying on each architecture: the one in use first, then its neighbours.

The GPU suite measures them; `python -m benchmarks.aot` compiles them ahead of time and says what each takes of a part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
ATTENTION_NAMES = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
TOY_ATTENTION = ((32, 16, 1, 1), (16, 16, 1, 1))
TOY_LOGPROB = ((16, 32, 32, 1, 1), (16, 16, 32, 1, 1))


def label(options: dict[str, int]) -> str:
    """Such as ``128x64x64 w8 s4``."""
    tile = "x".join(str(value) for name, value in options.items() if name.startswith("BLOCK_"))
    return f"{tile} w{options['num_warps']} s{options['num_stages']}"


def attention(head_dim: int, dtype: torch.dtype, capability: int, toy: bool = False) -> list[dict[str, int]]:
    """Options of the tree_attention kernel, those of its `config` first."""
    from sapo_kernels.tree_attention import triton as module

    return _with_first(module.config(head_dim, dtype, capability), ATTENTION_NAMES, TOY_ATTENTION if toy else ATTENTION)


def queries(head_dim: int, dtype: torch.dtype, capability: int, toy: bool = False) -> list[dict[str, int]]:
    """Options of the kernel for dQ, those of its `queries_config` first."""
    from sapo_kernels.tree_attention import triton_backward as module

    first = module.queries_config(head_dim, dtype, capability)
    return _with_first(first, ATTENTION_NAMES, TOY_ATTENTION if toy else QUERIES)


def keys(head_dim: int, dtype: torch.dtype, capability: int, toy: bool = False) -> list[dict[str, int]]:
    """Options of the kernel for dK and dV, those of its `keys_config` first."""
    from sapo_kernels.tree_attention import triton_backward as module

    first = module.keys_config(head_dim, dtype, capability)
    return _with_first(first, ATTENTION_NAMES, TOY_ATTENTION if toy else KEYS)


def logprob(hidden: int, dtype: torch.dtype, capability: int, toy: bool = False) -> list[dict[str, int]]:
    """Options of the linear_logprob kernel, those of its `config` first."""
    from sapo_kernels.linear_logprob import triton as module

    names = ("BLOCK_M", "BLOCK_V", "BLOCK_K", "num_warps", "num_stages")
    described = 90 <= capability < 120 and dtype != torch.float32
    return _with_first(module.config(hidden, dtype, capability, described), names, TOY_LOGPROB if toy else LOGPROB)


CANDIDATES = {"tree_attention": attention, "linear_logprob": logprob}
# Where the function lies that chooses the configuration of each kernel.
CHOSEN_BY = {
    "tree_attention": ("tree_attention.triton", "config"),
    "tree_attention queries": ("tree_attention.triton_backward", "queries_config"),
    "tree_attention keys": ("tree_attention.triton_backward", "keys_config"),
    "linear_logprob": ("linear_logprob.triton", "config"),
}


def _with_first(first: dict[str, int], names: tuple[str, ...], others) -> list[dict[str, int]]:
    extra = {name: value for name, value in first.items() if name not in names}
    found = [first]
    for values in others:
        options = {**dict(zip(names, values, strict=True)), **extra}
        if options not in found:
            found.append(options)
    return found


@contextlib.contextmanager
def in_use(kernel: str, options: dict[str, int]) -> Iterator[None]:
    """The launcher of a kernel of `CHOSEN_BY` takes `options` for the block."""
    import importlib

    path, name = CHOSEN_BY[kernel]
    module = importlib.import_module(f"sapo_kernels.{path}")
    own = getattr(module, name)
    setattr(module, name, lambda *_, **__: dict(options))
    try:
        yield
    finally:
        setattr(module, name, own)
