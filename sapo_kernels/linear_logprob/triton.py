"""Triton backend of linear_logprob: the head's matrix product, log-sum-exp and target logits in one pass.

The vocabulary is cut into chunks whose size depends on the vocabulary alone. A program owns a tile of rows and some
consecutive chunks; for each chunk it stores the (max, sum of exp) of its rows, and it writes the raw logit of every
target that falls into its columns, so each target has exactly one writer. A second kernel merges the chunks in
ascending order. How many chunks a program owns is scheduling only: a row's bits do not depend on the other rows, on
their number or on the GPU's size.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..triton_tools import DTYPES, INTERPRET, capability, on_device
from .triton_backward import linear_logprob_backward_triton, mean_weight  # noqa: F401 (the first for ops.py)


@triton.jit
def _base(m):
    """What to subtract from logits with maximum m: m, or 0 where m is infinite (inf - inf would be NaN)."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def _targets_of(target_ptr_ptr, o_m, m_m):
    """(first target, number of targets) of rows, int32: 64 bits would not fit beside the logits."""
    first = tl.load(target_ptr_ptr + o_m, mask=m_m, other=0).to(tl.int32)
    return first, tl.load(target_ptr_ptr + o_m + 1, mask=m_m, other=0).to(tl.int32) - first


@triton.jit(do_not_specialize=["rows", "vocab", "chunk", "splits", "chunks_per_split"])
def _linear_logprob_kernel(
    hidden,
    weight,
    bias_ptr,
    targets_ptr,
    target_ptr_ptr,
    max_ptr,
    sum_ptr,
    logit_ptr,
    rows,
    vocab,
    chunk,
    splits,
    chunks_per_split,
    stride_hidden_row,
    stride_weight_row,
    stride_bias,
    logit_scale,
    softcap,
    HIDDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIBED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """hidden, weight: pointers, or if DESCRIBED descriptors of [rows, HIDDEN] in tiles of BLOCK_M x BLOCK_K and of
    [vocab, HIDDEN] in tiles of BLOCK_V x BLOCK_K, which the hardware copies whole, zeros from their ends on.
    """
    # Neighbouring programs hold the same rows and different chunks; see chunks_per_split() for why.
    i_tile = tl.program_id(0) // splits
    i_split = tl.program_id(0) % splits
    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    o_k = tl.arange(0, BLOCK_K)
    o_c = tl.arange(0, BLOCK_V)
    most = tl.max(_targets_of(target_ptr_ptr, o_m, m_m)[1], 0)
    if not DESCRIBED:
        p_hidden = hidden + o_m.to(tl.int64)[:, None] * stride_hidden_row + o_k[None, :]

    i_chunk = i_split * chunks_per_split
    last_chunk = tl.minimum(i_chunk + chunks_per_split, (vocab + chunk - 1) // chunk)
    while i_chunk < last_chunk:
        m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
        begin = i_chunk * chunk
        end = tl.minimum(begin + chunk, vocab)
        while begin < end:
            # Columns are compared relative to the tile: absolute ids would hold a register for each logit.
            o_v = (begin + o_c).to(tl.int64)
            m_v = o_c < vocab - begin
            if not DESCRIBED:
                p_weight = weight + o_v[:, None] * stride_weight_row + o_k[None, :]
            acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
            if HAS_BIAS:
                # Starting from the bias keeps it out of the registers when the logits are in them.
                acc += tl.load(bias_ptr + o_v * stride_bias, mask=m_v, other=0.0).to(tl.float32)[None, :]
            for k in range(0, HIDDEN, BLOCK_K):
                if DESCRIBED:
                    h = hidden.load([i_tile * BLOCK_M, k])
                    w = weight.load([begin, k])
                else:
                    m_h = m_m[:, None]
                    m_w = m_v[:, None]
                    if HIDDEN % BLOCK_K != 0:
                        m_h = m_h & (k + o_k < HIDDEN)[None, :]
                        m_w = m_w & (k + o_k < HIDDEN)[None, :]
                    h = tl.load(p_hidden + k, mask=m_h, other=0.0)
                    w = tl.load(p_weight + k, mask=m_w, other=0.0)
                if UPCAST:
                    h = h.to(tl.float32)
                    w = w.to(tl.float32)
                acc = tl.dot(h, tl.trans(w), acc, input_precision="ieee")
            logits = acc * logit_scale
            if HAS_SOFTCAP:
                # tanh(x) = 1 - 2 / (1 + exp(2 x)): exp runs to inf or to 0, both with the right limit.
                logits = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * (logits / softcap))))

            logits = tl.where(m_v[None, :], logits, float("-inf"))

            # Read again for each tile: kept, they would hold registers while the products run.
            first, count = _targets_of(target_ptr_ptr, o_m, m_m)
            i_target = 0
            while i_target < most:
                m_t = m_m & (i_target < count)
                target = tl.load(targets_ptr + first + i_target, mask=m_t, other=-1)
                column = target - begin
                m_t = m_t & (column >= 0) & (column < tl.minimum(BLOCK_V, vocab - begin))
                # Few tiles hold a target; the others skip the reduction.
                if tl.max(m_t.to(tl.int32), 0) > 0:
                    picked = tl.where(column.to(tl.int32)[:, None] == o_c[None, :], logits, 0.0)
                    tl.store(logit_ptr + first + i_target, tl.sum(picked, 1), mask=m_t)
                i_target += 1

            m_new = tl.maximum(m_i, tl.max(logits, 1))
            base = _base(m_new)
            # A NaN logit makes the sum NaN whatever the maximum is.
            l_i = l_i * tl.exp(m_i - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
            m_i = m_new
            begin += BLOCK_V
        o_part = i_chunk.to(tl.int64) * rows + o_m
        tl.store(max_ptr + o_part, m_i, mask=m_m)
        tl.store(sum_ptr + o_part, l_i, mask=m_m)
        i_chunk += 1


@triton.jit(do_not_specialize=["rows", "vocab", "chunks"])
def _merge_kernel(
    max_ptr,
    sum_ptr,
    targets_ptr,
    target_ptr_ptr,
    logprob_ptr,
    lse_ptr,
    rows,
    vocab,
    chunks,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """lse of each row from its chunks; logprob_ptr holds logits and gets log-probabilities."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    m_i = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK_R], dtype=tl.float32)
    i_chunk = 0
    while i_chunk < chunks:
        o_c = i_chunk + tl.arange(0, BLOCK_C)
        o_part = o_c.to(tl.int64)[:, None] * rows + o_r[None, :]
        m_part = (o_c < chunks)[:, None] & m_r[None, :]
        m_c = tl.load(max_ptr + o_part, mask=m_part, other=float("-inf"))
        l_c = tl.load(sum_ptr + o_part, mask=m_part, other=0.0)
        m_new = tl.maximum(m_i, tl.max(m_c, 0))
        base = _base(m_new)
        l_i = l_i * tl.exp(m_i - base) + tl.sum(l_c * tl.exp(m_c - base[None, :]), 0)
        m_i = m_new
        i_chunk += BLOCK_C
    base = _base(m_i)
    log_l = tl.log(l_i)
    tl.store(lse_ptr + o_r, base + log_l, mask=m_r)

    first = tl.load(target_ptr_ptr + o_r, mask=m_r, other=0)
    count = tl.load(target_ptr_ptr + o_r + 1, mask=m_r, other=0) - first
    most = tl.max(count, 0)
    i_target = 0
    while i_target < most:
        m_t = m_r & (i_target < count)
        target = tl.load(targets_ptr + first + i_target, mask=m_t, other=-1)
        p_t = logprob_ptr + first + i_target
        logit = tl.load(p_t, mask=m_t, other=0.0)
        # (logit - max) - log(sum) keeps the digits of a log-probability near 0 that logit - lse would lose.
        value = (logit - base) - log_l
        # No program owns an id outside the vocabulary, so its slot was never written: say NaN.
        value = tl.where((target >= 0) & (target < vocab), value, float("nan"))
        tl.store(p_t, value, mask=m_t)
        i_target += 1


# Chunks of a vocabulary at most: two for each SM of the largest GPUs, so that even one tile of rows fills one.
MAX_CHUNKS = 264
# Rows of one launch; more rows go in slabs that share the scratch memory.
SLAB_ROWS = 16384
# Hidden rows that running programs read again and again should stay in about half of a 50 MiB L2 cache.
HIDDEN_CACHE_BYTES = 24 << 20
MERGE_BLOCKS = {"BLOCK_R": 16, "BLOCK_C": 64}


def describes(hidden: torch.Tensor, weight: torch.Tensor, capability: int) -> bool:
    """Whether the operands go through tensor descriptors (TMA): where the hardware has them and can take these."""
    known = 90 <= capability < 120 and hidden.dtype != torch.float32
    return known and all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.stride(0) >= t.shape[1] > 0
        for t in (hidden, weight)
    )


def config(hidden: int, dtype: torch.dtype, capability: int, described: bool = False) -> dict[str, int]:
    """Tile sizes and launch options. Chosen from compiler reports (no spills) and a prototype on an H200 (described).

    They do not depend on the number of rows, so neither do a row's bits.

    Args:
        hidden: D, the length of a row; tiles of D are padded.
        dtype: float32, bfloat16 or float16.
        capability: 10 * major + minor of an NVIDIA GPU, 0 for AMD.
        described: the operands go through descriptors.
    """
    if INTERPRET:
        tile, warps, stages = (16, 32, 32), 1, 1
    elif dtype == torch.float32:
        # IEEE products run on the plain FMA units with both operands in registers, so the tile must be small.
        tile, warps, stages = (32, 64, 16), 8, 2
    elif described and capability < 100:
        tile, warps, stages = (256, 128, 64), 8, 3
    elif capability == 0:
        tile, warps, stages = (128, 128, 64), 8, 2
    elif 90 <= capability < 120:
        # One block an SM: 4 stages of 32 KiB hide the loads, 128 x 256 spills. On sm_100 256 x 128 does with a softcap.
        tile, warps, stages = (128, 128, 64), 8, 4
    else:
        # 48 KiB in all fits consumer parts too; BLOCK_K 64 spills with Triton 3.6.
        tile, warps, stages = (128, 128, 32), 8, 4
    chosen = {"BLOCK_M": tile[0], "BLOCK_V": tile[1], "BLOCK_K": min(tile[2], max(16, triton.next_power_of_2(hidden)))}
    chosen |= {"num_warps": warps, "num_stages": stages}
    if dtype == torch.float32 and capability > 0:
        # Without it ptxas trades a few spills for a second block on the SM.
        chosen["maxnreg"] = 255
    return chosen


def specialise(hidden: int, bias, softcap) -> dict[str, object]:
    """The kernel's compile-time arguments that follow from shapes and options."""
    return {
        "HIDDEN": hidden,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "UPCAST": INTERPRET,
    }


def chunk_columns(vocab: int, block_v: int) -> int:
    """Columns of one chunk, whole tiles: a function of the vocabulary alone, so that it cannot move a row's bits."""
    return block_v * triton.cdiv(triton.cdiv(vocab, block_v), MAX_CHUNKS)


@functools.lru_cache(maxsize=256)
def chunks_per_split(row_tiles: int, chunks: int, tile_bytes: int, processors: int) -> int:
    """How many chunks one program takes. Scheduling only: the result's bits do not depend on it.

    A program reads its hidden tile (`tile_bytes`) again for every vocabulary tile. So the programs that run together
    should hold few enough row tiles for the L2 cache, and beyond that few splits, because each split streams its own
    weight tile from memory while all row tiles share it.
    """
    resident = min(row_tiles, max(1, HIDDEN_CACHE_BYTES // tile_bytes))
    most = max(1, chunks // triton.cdiv(processors, resident))

    def cost(each: int) -> tuple[int, int]:
        waves = triton.cdiv(row_tiles * triton.cdiv(chunks, each), processors)
        return waves * each, -each

    return min(range(max(1, most // 2), most + 1), key=cost)


def linear_logprob_triton(hidden, weight, targets, target_ptr, bias, scale, softcap, with_mean=False):
    """Same arguments and result as the reference; float32, bfloat16 or float16.

    A target id outside ``[0, V)`` gives NaN.
    """
    rows, width = hidden.shape
    vocab = weight.shape[0]
    if hidden.dtype not in DTYPES:
        raise TypeError(f"linear_logprob: impl='triton': expected one of {DTYPES}, got {hidden.dtype}")
    for name, t in (("hidden", hidden), ("weight", weight)):
        if t.stride(-1) != 1:
            raise ValueError(f"linear_logprob: {name}: expected stride 1 in the last dimension, got {t.stride(-1)}")
    logprob = torch.empty(targets.shape[0], dtype=torch.float32, device=hidden.device)
    lse = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return logprob, lse, hidden.new_empty(0, width)

    part = capability(hidden.device)
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 4
    described = describes(hidden, weight, part)
    options = config(width, hidden.dtype, part, described)
    block_m = options["BLOCK_M"]
    chunk = chunk_columns(vocab, options["BLOCK_V"])
    chunks = triton.cdiv(vocab, chunk)
    slab = min(rows, SLAB_ROWS)
    scratch = torch.empty(2, chunks * slab, dtype=torch.float32, device=hidden.device)
    each = chunks_per_split(triton.cdiv(slab, block_m), chunks, block_m * width * hidden.element_size(), processors)
    splits = triton.cdiv(chunks, each)
    with on_device(hidden):
        for start in range(0, rows, slab):
            count = min(slab, rows - start)
            ptr = target_ptr[start : start + count + 1]
            operands = hidden[start : start + count], weight
            if described:
                blocks = (block_m, options["BLOCK_V"])
                operands = [
                    TensorDescriptor(t, list(t.shape), list(t.stride()), [size, options["BLOCK_K"]])
                    for t, size in zip(operands, blocks, strict=True)
                ]
            _linear_logprob_kernel[(triton.cdiv(count, block_m) * splits,)](
                *operands,
                bias,
                targets,
                ptr,
                scratch[0],
                scratch[1],
                logprob,
                count,
                vocab,
                chunk,
                splits,
                each,
                hidden.stride(0),
                weight.stride(0),
                bias.stride(0) if bias is not None else 0,
                scale,
                1.0 if softcap is None else softcap,
                **specialise(width, bias, softcap),
                DESCRIBED=described,
                **options,
                enable_fp_fusion=True,
            )
            _merge_kernel[(triton.cdiv(count, MERGE_BLOCKS["BLOCK_R"]),)](
                scratch[0],
                scratch[1],
                targets,
                ptr,
                logprob,
                lse[start:],
                count,
                vocab,
                chunks,
                **MERGE_BLOCKS,
                num_warps=4,
                enable_fp_fusion=True,
            )
    if not with_mean:
        return logprob, lse, hidden.new_empty(0, width)
    return logprob, lse, mean_weight(logprob, lse, hidden, weight, targets, target_ptr, bias, scale, softcap)
