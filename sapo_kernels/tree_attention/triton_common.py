"""What the Triton kernels of tree_attention share: how rows are loaded, what their launchers check."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from packaging.version import Version

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MAX_HEAD = 512


@triton.jit
def load_rows(ptr, offset, m_row, HEAD: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """[R, BLOCK] of rows that begin at ptr + offset [R] int64; 0 where m_row is false and from HEAD on."""
    o_d = tl.arange(0, BLOCK)
    m = m_row[:, None]
    if HEAD != BLOCK:
        m = m & (o_d < HEAD)[None, :]
    rows = tl.load(ptr + offset[:, None] + o_d[None, :], mask=m, other=0.0)
    if UPCAST:
        rows = rows.to(tl.float32)
    return rows


@triton.jit
def store_rows(ptr, offset, rows, m_row, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """The counterpart of `load_rows`, rounded to the type that ptr points to."""
    o_d = tl.arange(0, BLOCK)
    m = m_row[:, None]
    if HEAD != BLOCK:
        m = m & (o_d < HEAD)[None, :]
    tl.store(ptr + offset[:, None] + o_d[None, :], rows.to(ptr.dtype.element_ty), mask=m)


INTERPRET = not isinstance(load_rows, triton.JITFunction)
# Interpreters before Triton 3.9 cannot run `range` with bounds known at run time only.
NEEDS_WHILE = INTERPRET and Version(triton.__version__) < Version("3.9")


def specialise(head_k: int, head_v: int, group: int, window, softcap) -> dict[str, object]:
    """The compile-time arguments that follow from shapes and options."""
    return {
        "GROUP": group,
        "HEAD_K": head_k,
        "HEAD_V": head_v,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK_K": max(16, triton.next_power_of_2(head_k)),
        "BLOCK_V": max(16, triton.next_power_of_2(head_v)),
        # The interpreter computes garbage on bfloat16 without an error; a cast right after the load is exact.
        "UPCAST": INTERPRET,
        "WHILE": NEEDS_WHILE,
    }


def scalars(scale: float, window: int | None, softcap: float | None) -> tuple[float, float, int]:
    """logit_scale, cap_scale and window as the kernels take them. Logits are kept in units of log 2."""
    log2e = LOG2E.value
    return (
        scale * log2e if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * log2e,
        0 if window is None else min(window, 2**31 - 1),
    )


def check(q, k, v) -> None:
    if q.dtype not in DTYPES:
        raise TypeError(f"tree_attention: impl='triton': expected one of {DTYPES}, got {q.dtype}")
    wide = max(q.shape[2], v.shape[2])
    if wide > MAX_HEAD:
        raise ValueError(f"tree_attention: impl='triton': expected head_dim up to {MAX_HEAD}, got {wide}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(-1) != 1:
            raise ValueError(f"tree_attention: {name}: expected stride 1 in the last dimension, got {t.stride(-1)}")


def capability(device: torch.device) -> int:
    """10 * major + minor of an NVIDIA GPU, else 0."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_device(t: torch.Tensor):
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def stored_as(q: torch.Tensor) -> torch.dtype:
    """The dtype that kernels store: the interpreter truncates to bfloat16, so there it stores float32."""
    return torch.float32 if INTERPRET else q.dtype
