"""Gradients of linear_logprob with Triton: logits of a chunk of rows from the library's matrix product, one kernel
that turns them into the gradient of that product, and the library's products again. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_tools import INTERPRET, on_device
from . import gradient


@triton.jit
def _coefficients_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    target_ptr_ptr,
    lse_ptr,
    a_ptr,
    g_ptr,
    d_ptr,
    vocab,
    stride_bias,
    logit_scale,
    softcap,
    d_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """d = d_scale * slope * (a * p + sum of g over targets), see gradient.py; d may be the logits' own memory."""
    i_row = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < vocab
    x = tl.load(logits_ptr + i_row * vocab + o_v, mask=m_v, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + o_v.to(tl.int64) * stride_bias, mask=m_v, other=0.0).to(tl.float32)
    x = x * logit_scale
    if HAS_SOFTCAP:
        # As in the forward kernel, which lse is from.
        capped = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * (x / softcap)))
        x = softcap * capped
    d = tl.load(a_ptr + i_row) * tl.exp(x - tl.load(lse_ptr + i_row))
    i_target = tl.load(target_ptr_ptr + i_row)
    last = tl.load(target_ptr_ptr + i_row + 1)
    while i_target < last:
        d += tl.where(o_v == tl.load(targets_ptr + i_target), tl.load(g_ptr + i_target), 0.0)
        i_target += 1
    if HAS_SOFTCAP:
        d = d * (1.0 - capped * capped)
    tl.store(d_ptr + i_row * vocab + o_v, (d * d_scale).to(d_ptr.dtype.element_ty), mask=m_v)


# 4 columns a thread: 8 spill a register on sm_90.
COEFFICIENTS = {"BLOCK_V": 64 if INTERPRET else 1024, "num_warps": 1 if INTERPRET else 8}
# Where a mean is computed in float16, probabilities of 1 / V would be subnormal. A power of two: nothing else changes.
MEAN_UNIT = 1024.0


def _product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows [n, D] @ weight.T in float32, not rounded to the dtype of the inputs."""
    if rows.dtype == torch.float32:
        return torch.mm(rows, weight.T)
    if rows.is_cuda and torch.version.hip is None:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    return torch.mm(rows.float(), weight.float().T)


def coefficients(weight, bias, scale: float, softcap: float | None, d_scale: float):
    """What `gradient.from_logits` asks for."""

    def of_chunk(rows, a, g, lse, targets, pointer):
        logits = _product(rows, weight)
        d = logits if rows.dtype == torch.float32 else torch.empty_like(logits, dtype=rows.dtype)
        grid = (len(rows), triton.cdiv(len(weight), COEFFICIENTS["BLOCK_V"]))
        with on_device(rows):
            _coefficients_kernel[grid](
                logits,
                bias,
                targets,
                pointer,
                lse,
                a,
                g,
                d,
                len(weight),
                bias.stride(0) if bias is not None else 0,
                scale,
                1.0 if softcap is None else softcap,
                d_scale,
                HAS_BIAS=bias is not None,
                HAS_SOFTCAP=softcap is not None,
                **COEFFICIENTS,
            )
        return d

    return of_chunk


def mean_weight(logprob, lse, hidden, weight, targets, target_ptr, bias, scale, softcap) -> torch.Tensor:
    """[R, D], the operator's `mean`."""
    row = gradient.row_of_target(target_ptr, targets)
    g = -MEAN_UNIT * gradient.target_share(logprob, targets, row, len(weight))
    turn = coefficients(weight, bias, scale, softcap, 1.0)
    a = torch.full_like(lse, MEAN_UNIT)
    output_mask = (True, False, False)
    return gradient.from_logits(turn, a, g, lse, hidden, weight, targets, target_ptr, bias, output_mask)[0].div_(
        MEAN_UNIT
    )


def linear_logprob_backward_triton(grad_logprob, grad_lse, logprob, lse, mean, hidden, weight, targets, target_ptr,
                                   bias, scale, softcap, output_mask):  # fmt: skip
    """Gradients of (hidden, weight, bias), None where not `output_mask`."""
    turn = coefficients(weight, bias, scale, softcap, scale)
    return gradient.gradients(turn, grad_logprob, grad_lse, logprob, lse, mean, hidden, weight, targets, target_ptr,
                              bias, scale, softcap, output_mask)  # fmt: skip
