"""tree_attention over one layer's trie against SDPA with a dense mask, SDPA on every sequence apart, FlexAttention."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

import sapo_kernels as sk
from sapo_kernels.trie.trie import TokenTrie, plan_trie

from ..registry import DTYPE_NAMES, Op, Setting, gradients
from ..timing import Case, Provider
from ..workload import Cells


class Inputs:
    """q, k, v of a trie, [T, heads, head_dim], in three layouts, and how far an output in each is from the oracle's."""

    def __init__(self, setting: Setting, cells: Cells, heads: tuple[int, int, int]):
        cache = cells.cache(50257)
        self.setting, self.trie = setting, plan_trie(cache.ids, cache.offsets, cache.context_lengths)
        self.plan = self.trie.make_pass(0, len(self.trie)).to(setting.device)
        draw, (q_heads, kv_heads, width) = torch.Generator().manual_seed(0), heads
        self.groups = q_heads // kv_heads
        self.flat = [
            torch.randn(len(self.trie), n, width, generator=draw).to(setting.device, setting.dtype)
            for n in (q_heads, kv_heads, kv_heads)
        ]
        self.device = self.flat[0].device
        self.upstream = torch.randn(self.flat[0].shape, generator=torch.Generator().manual_seed(1)).to(self.flat[0])

    @cached_property
    def wide(self) -> list[torch.Tensor]:
        """[1, Hq, T, D] each, keys and values repeated."""
        q, *others = self.flat
        repeated = [q, *(t.repeat_interleave(self.groups, 1) for t in others)]
        return [t.transpose(0, 1)[None].contiguous() for t in repeated]

    @cached_property
    def apart(self) -> list[torch.Tensor]:
        """[C, Hq, L, D] each: every sequence alone, padded."""
        return [t[0].transpose(0, 1)[self.sequences].transpose(1, 2).contiguous() for t in self.wide]

    @cached_property
    def sequences(self) -> torch.Tensor:
        """[C, L] trie tokens of every cell's sequence, padded on the right with its last one."""
        paths = [path_of(self.trie, cell) for cell in range(len(self.trie.leaf))]
        width = max(map(len, paths))
        padded = np.stack([np.pad(p, (0, width - len(p)), mode="edge") for p in paths])
        return torch.from_numpy(padded).to(self.device)

    @cached_property
    def there(self) -> torch.Tensor:
        """[C, L] which of them are no padding."""
        depths = torch.from_numpy(np.asarray(self.trie.depth[self.trie.leaf])).to(self.device)
        return torch.arange(self.sequences.shape[1], device=self.device)[None] <= depths[:, None]

    @cached_property
    def mask(self) -> torch.Tensor:
        """[T, T] which keys a token sees."""
        at, end = torch.arange(len(self.trie), device=self.device), torch.from_numpy(self.trie.subtree_end)
        return (at[None, :] <= at[:, None]) & (at[:, None] < end.to(self.device)[None, :])

    @cached_property
    def exact(self) -> torch.Tensor:
        return oracle(*self.flat, self.trie)

    def error(self, out: torch.Tensor, layout: str = "flat") -> float:
        """The largest difference. In pieces, for a float64 copy of everything is as large as the oracle."""
        if layout == "apart":
            rows = zip(out, self.sequences, self.there.sum(1).tolist(), strict=True)
            pieces = [(own[:, :length].transpose(0, 1), self.exact[row[:length]]) for own, row, length in rows]
        else:
            out = out[0].transpose(0, 1) if layout == "wide" else out
            pieces = zip(out.split(2048), self.exact.split(2048), strict=True)
        # Not Python's `max`: it passes NaN over.
        return float(torch.stack([(got.double() - own).abs().max() for got, own in pieces]).max())

    def upstream_of(self, layout: str) -> torch.Tensor:
        """The gradient of the output; of a token's copies in several sequences each has its share."""
        if layout == "flat":
            return self.upstream
        if layout == "wide":
            return self.upstream.transpose(0, 1)[None]
        copies = torch.bincount(self.sequences[self.there], minlength=len(self.trie))
        share = (self.there / copies[self.sequences])[:, None, :, None].to(self.upstream.dtype)
        return self.upstream.transpose(0, 1)[:, self.sequences].transpose(0, 1) * share

    @cached_property
    def exact_gradients(self) -> tuple[torch.Tensor, ...]:
        wide = [t.double().requires_grad_() for t in self.flat]
        return torch.autograd.grad(oracle(*wide, self.trie), wide, self.upstream.double())

    def gradient_error(self, out: torch.Tensor, layout: str = "flat") -> float:
        """Of the gradients of q, k and v in one flat tensor, each relative to its largest."""
        parts = out.split([t.numel() for t in getattr(self, layout)])
        parts = [part.view(t.shape) for part, t in zip(parts, getattr(self, layout), strict=True)]
        if layout == "wide":
            parts = [part[0].transpose(0, 1) for part in parts]
        if layout == "apart":  # the copies of a token are added up
            rows = [part.transpose(1, 2).flatten(0, 1).double() for part in parts]
            parts = [r.new_zeros(len(self.trie), *r.shape[1:]).index_add_(0, self.sequences.flatten(), r) for r in rows]
        pairs = [
            (part.double().reshape(*own.shape[:2], -1, own.shape[2]).sum(2), own)
            for part, own in zip(parts, self.exact_gradients, strict=True)
        ]
        return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())


def path_of(trie: TokenTrie, cell: int) -> np.ndarray:
    """The trie tokens of one cell's sequence, from the root on."""
    leaf = int(trie.leaf[cell])
    return np.concatenate([*(np.arange(a, b) for a, b in trie.path_spans(leaf)), [leaf]]).astype(np.int64)


def oracle(q, k, v, trie: TokenTrie) -> torch.Tensor:
    """[T, Hq, D] float64 on their device: causal attention of every token on the path of a cell that it belongs to.

    A path's tokens that the cells before it have are left out: they see the same there.
    """
    groups, out = q.shape[1] // k.shape[1], torch.full(q.shape, torch.nan, dtype=torch.float64, device=q.device)
    done = np.zeros(len(trie), dtype=bool)
    for cell in range(len(trie.leaf)):
        path = path_of(trie, cell)
        new = path[~done[path]]
        if not len(new):
            continue
        done[new] = True
        at = torch.from_numpy(np.searchsorted(path, new)).to(q.device)
        path = torch.from_numpy(path).to(q.device)
        key, value = (t[path].double().repeat_interleave(groups, 1).transpose(0, 1) for t in (k, v))
        hidden = torch.arange(len(path), device=q.device)[None] > at[:, None]
        logits = q[path[at]].double().transpose(0, 1) @ key.transpose(1, 2) * q.shape[2] ** -0.5
        out[path[at]] = (torch.softmax(logits.masked_fill(hidden, -torch.inf), -1) @ value).transpose(0, 1)
    return out


def make(setting: Setting, name: str, cells: Cells, heads: tuple[int, int, int]):
    """heads: q heads, kv heads, head_dim."""
    x = Inputs(setting, cells, heads)
    if setting.dtype == torch.float32:
        tolerance = 2e-5
    else:
        # Twice the error of PyTorch's own attention in that dtype on the same sequences.
        tolerance = 2 * x.error(causal(*x.apart), "apart") + 1e-4
    q_heads, kv_heads, width = heads
    case = Case(
        "tree_attention", name, check=x.error, tolerance=tolerance, dtype=DTYPE_NAMES[setting.dtype], rounds=7,
        tokens=len(x.trie), work=4.0 * q_heads * width * float((x.trie.depth + 1).sum()),
        formula="4*q heads*head_dim*sum(depth+1)",
        shape=f"T={len(x.trie)} dense={x.trie.dense_tokens} Hq={q_heads} Hkv={kv_heads} D={width}",
    )  # fmt: skip
    return case, x


def make_backward(setting: Setting, name: str, cells: Cells, heads: tuple[int, int, int]):
    """The same for a forward and backward pass: results are the gradients of q, k and v in one flat tensor."""
    case, x = make(setting, name, cells, heads)
    own = x.gradient_error(_gradients(x, "apart", causal)(), "apart")
    return dataclasses.replace(
        case, op="tree_attention_backward", check=x.gradient_error, tolerance=2 * own + 1e-5, work=3.5 * case.work,
        formula="14*q heads*head_dim*sum(depth+1)",
    ), x  # fmt: skip


def causal(q, k, v) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _gradients(x: Inputs, layout: str, attend):
    leaves = [t.clone().requires_grad_() for t in getattr(x, layout)]
    return gradients(lambda: attend(*leaves), leaves, x.upstream_of(layout))


tree_attention = Op(
    "tree_attention", make, toy=(Cells(2, 2, 4, 6, 2), (2, 1, 16)), share=0.04,
    cpu={
        "4x8 prompts first": (Cells(4, 8, 60, 80), (8, 4, 64)),
        "4x8 prompts last": (Cells(4, 8, 60, 80, last=True), (8, 4, 64)),
        "4x4 long inputs": (Cells(4, 4, 60, 400), (8, 4, 64)),
        "4x8 head 128": (Cells(4, 8, 60, 80), (16, 8, 128)),
    },
    gpu={
        "0.6B 16k tokens": (Cells(21, 8, 100, 80), (16, 8, 128)),
        "8B 16k tokens": (Cells(21, 8, 100, 80), (32, 8, 128)),
        "8B prompts last": (Cells(21, 24, 30, 300, last=True), (32, 8, 128)),
        "8B long inputs": (Cells(21, 4, 60, 400), (32, 8, 128)),
    },
)  # fmt: skip


tree_attention_backward = Op(
    "tree_attention_backward", make_backward, toy=tree_attention.toy, share=0.04,
    cpu={"16 rows": (Cells(1, 16), (8, 4, 64))},
    gpu={
        "8B 16 rows": (Cells(1, 16), (32, 8, 128)),
        "8B 64 rows": (Cells(1, 64), (32, 8, 128)),
        "8B 16k tokens": (Cells(21, 8, 100, 80), (32, 8, 128)),
    },
)  # fmt: skip


def both_ways(name: str, layout: str = "flat", note: str = "", on: str | None = None):
    """Decorator of ``prepare(x)``, which gives an attention of q, k, v in a layout: a provider of both operations."""

    def register(prepare):
        def forward(x: Inputs) -> Provider:
            attend, given = prepare(x), getattr(x, layout)
            return made(x, lambda: attend(*given), x.error)

        def backward(x: Inputs) -> Provider:
            return made(x, _gradients(x, layout, prepare(x)), x.gradient_error)

        def made(x: Inputs, run, check) -> Provider:
            tokens = int(x.trie.dense_tokens) if layout == "apart" else 0
            return Provider(run, tokens=tokens, check=lambda out: check(out, layout), note=note)

        tree_attention.provider(name, on=on)(forward)
        tree_attention_backward.provider(name, on=on)(backward)
        return prepare

    return register


@both_ways("ours")
def ours(x):
    return lambda q, k, v: sk.tree_attention(q, k, v, x.plan, impl=x.setting.impl)


@both_ways("sdpa_mask", "wide", "[T, T] mask")
def sdpa_mask(x):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=x.mask)


@both_ways("sdpa_sequences", "apart", "each sequence apart, padded")
def sdpa_sequences(x):
    return causal


# On a CPU it needs a C++ compiler and would be no rival; its eager form writes the whole score matrix.
@both_ways("flex", on="cuda")
def flex(x):
    from ..peers.flex import block_mask, flex_tree_attention

    mask = block_mask(x.plan, x.device)
    return lambda q, k, v: flex_tree_attention(q, k, v, x.plan, mask=mask)
