"""The kernels: each rounds where the modules of transformers round, so low precision gives the same bits.

The sum of squares is the exception: it is taken in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_tools import on_device

# Elements of one program's tile.
TILE = 4096
LARGEST_ROW = 16384
GATED_BLOCK = 2048


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROUNDED_FIRST: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m = (o_r < rows)[:, None] & (o_d < WIDTH)[None, :]
    place = o_r[:, None] * WIDTH + o_d[None, :]
    x = tl.load(x_ptr + place, mask=m, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + o_d, mask=o_d < WIDTH, other=0.0).to(tl.float32)
    if PLUS_ONE:
        weight += 1.0
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / WIDTH + epsilon)
    normed = x * scale[:, None]
    if ROUNDED_FIRST:
        normed = normed.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + place, (normed * weight[None, :]).to(out_ptr.dtype.element_ty), mask=m)


def norm_config(width: int) -> dict[str, int]:
    """Tile and warps for rows of that width."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_R": max(1, TILE // block), "BLOCK_D": block, "num_warps": 16 if block > 8192 else 8}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, rounded_first: bool, plus_one: bool, dtype):
    """``weight * x / sqrt(mean(x ** 2) + epsilon)`` over the last dimension of a dense x, as `dtype`.

    rounded_first: the normed row is rounded to x's dtype before the product; plus_one: the factor is 1 + weight.
    """
    width = x.shape[-1]
    out = torch.empty_like(x, dtype=dtype)
    rows = x.numel() // width
    config = norm_config(width)
    with on_device(x):
        _rms_norm_kernel[(triton.cdiv(rows, config["BLOCK_R"]),)](
            x, weight, out, rows, epsilon, width, ROUNDED_FIRST=rounded_first, PLUS_ONE=plus_one, **config
        )
    return out


@triton.jit
def _tanh(x):
    # Of a magnitude of exp's argument that never overflows.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _gated_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    width,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < width
    gate = tl.load(gate_ptr + row * stride_gate + o, mask=m, other=0.0)
    up = tl.load(up_ptr + row * stride_up + o, mask=m, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        x = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    x = x.to(gate.dtype).to(tl.float32) * up
    tl.store(out_ptr + row * width + o, x.to(out_ptr.dtype.element_ty), mask=m)


ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) * up``, both [..., F] of one dtype."""
    width = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    # Views wherever rows are dense and evenly spaced: halves of one matrix stay where they are.
    gate, up = (t if t.stride(-1) == 1 else t.contiguous() for t in (gate.flatten(0, -2), up.flatten(0, -2)))
    block = min(GATED_BLOCK, triton.next_power_of_2(width))
    with on_device(gate):
        _gated_kernel[(len(gate), triton.cdiv(width, block))](
            gate, up, out, width, gate.stride(0), up.stride(0), activation, block, num_warps=4
        )
    return out


@triton.jit
def _rotate_heads(
    x_ptr,
    out_ptr,
    t,
    stride_t,
    stride_h,
    cos_low,
    cos_high,
    sin_low,
    sin_high,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROTATED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    HALF: tl.constexpr = ROTATED // 2
    o_d = tl.arange(0, BLOCK_HALF)
    kind = out_ptr.dtype.element_ty
    for first in tl.static_range(0, HEADS, BLOCK_H):
        o_h = first + tl.arange(0, BLOCK_H)
        rows = t * stride_t + o_h[:, None] * stride_h
        m = (o_h < HEADS)[:, None] & (o_d < HALF)[None, :]
        place = rows + o_d[None, :]
        low = tl.load(x_ptr + place, mask=m, other=0.0).to(tl.float32)
        high = tl.load(x_ptr + place + HALF, mask=m, other=0.0).to(tl.float32)
        a, b, c, d = low * cos_low, high * sin_low, high * cos_high, low * sin_high
        if ROUNDED:
            a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)
            c, d = c.to(kind).to(tl.float32), d.to(kind).to(tl.float32)
        out = t * (HEADS * HEAD) + o_h[:, None] * HEAD
        tl.store(out_ptr + out + o_d[None, :], (a - b).to(kind), mask=m)
        tl.store(out_ptr + out + HALF + o_d[None, :], (c + d).to(kind), mask=m)
        if ROTATED < HEAD:
            o_rest = ROTATED + tl.arange(0, BLOCK_REST)
            m = (o_h < HEADS)[:, None] & (o_rest < HEAD)[None, :]
            rest = tl.load(x_ptr + rows + o_rest[None, :], mask=m, other=0.0)
            tl.store(out_ptr + out + o_rest[None, :], rest.to(kind), mask=m)


@triton.jit
def _rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_c,
    stride_s,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROTATED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_HALF)
    HALF: tl.constexpr = ROTATED // 2
    m = o_d < HALF
    cos_low = tl.load(cos_ptr + t * stride_c + o_d, mask=m, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos_ptr + t * stride_c + HALF + o_d, mask=m, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin_ptr + t * stride_s + o_d, mask=m, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin_ptr + t * stride_s + HALF + o_d, mask=m, other=0.0).to(tl.float32)[None, :]
    _rotate_heads(
        q_ptr, q_out_ptr, t, stride_qt, stride_qh, cos_low, cos_high, sin_low, sin_high,
        Q_HEADS, BLOCK_H, ROTATED, HEAD, BLOCK_HALF, BLOCK_REST, ROUNDED,
    )  # fmt: skip
    _rotate_heads(
        k_ptr, k_out_ptr, t, stride_kt, stride_kh, cos_low, cos_high, sin_low, sin_high,
        K_HEADS, BLOCK_H, ROTATED, HEAD, BLOCK_HALF, BLOCK_REST, ROUNDED,
    )  # fmt: skip


def rotary_config(q_heads: int, k_heads: int, head: int, rotated: int) -> dict[str, int]:
    """Shapes, tile and warps of a token's program."""
    half = triton.next_power_of_2(max(16, rotated // 2))
    return {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "BLOCK_H": max(1, min(TILE // 2 // half, triton.next_power_of_2(q_heads))),
        "ROTATED": rotated,
        "HEAD": head,
        "BLOCK_HALF": half,
        "BLOCK_REST": triton.next_power_of_2(max(16, head - rotated)),
        "num_warps": 4,
    }


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype):
    """q [1, Hq, T, D] and k [1, Hkv, T, D] as `dtype`, their first R dimensions turned by halves by cos, sin [1, T, R].

    The results lie in memory as [T, heads, D]. Products are rounded before they are added where all have one dtype.
    """
    tokens, head = q.shape[2], q.shape[3]
    outs = [torch.empty(1, tokens, t.shape[1], head, dtype=dtype, device=q.device) for t in (q, k)]
    with on_device(q):
        _rotary_kernel[(tokens,)](
            q, k, cos, sin, *outs, q.stride(2), q.stride(1), k.stride(2), k.stride(1), cos.stride(1), sin.stride(1),
            **rotary_config(q.shape[1], k.shape[1], head, cos.shape[-1]), ROUNDED=q.dtype == cos.dtype,
        )  # fmt: skip
    return tuple(out.transpose(1, 2) for out in outs)
