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
    """q, k, v of a trie, [T, heads, head_dim]; other layouts are made when a provider asks, outside its time."""

    def __init__(self, setting: Setting, cells: Cells, heads: tuple[int, int, int]):
        cache = cells.cache(50257)
        self.setting, self.trie = setting, plan_trie(cache.ids, cache.offsets, cache.context_lengths)
        self.plan = self.trie.make_pass(0, len(self.trie)).to(setting.device)
        draw, (q_heads, kv_heads, width) = torch.Generator().manual_seed(0), heads
        self.groups = q_heads // kv_heads
        self.q, self.k, self.v = (
            torch.randn(len(self.trie), n, width, generator=draw).to(setting.device, setting.dtype)
            for n in (q_heads, kv_heads, kv_heads)
        )

    @cached_property
    def wide(self) -> list[torch.Tensor]:
        """[1, Hq, T, D] each, keys and values repeated."""
        repeated = [self.q, *(t.repeat_interleave(self.groups, 1) for t in (self.k, self.v))]
        return [t.transpose(0, 1)[None].contiguous() for t in repeated]

    @cached_property
    def sequences(self) -> torch.Tensor:
        """[C, L] trie tokens of every cell's sequence, padded on the right with its last one."""
        paths = [path_of(self.trie, cell) for cell in range(len(self.trie.leaf))]
        width = max(map(len, paths))
        padded = np.stack([np.pad(p, (0, width - len(p)), mode="edge") for p in paths])
        return torch.from_numpy(padded).to(self.q.device)

    @cached_property
    def apart(self) -> list[torch.Tensor]:
        """[C, Hq, L, D] each: every sequence alone, padded."""
        return [t[0].transpose(0, 1)[self.sequences].transpose(1, 2).contiguous() for t in self.wide]

    @cached_property
    def exact(self) -> torch.Tensor:
        return oracle(self.q, self.k, self.v, self.trie)

    def error(self, out: torch.Tensor) -> float:
        # In pieces, for a float64 copy of everything is as large as the oracle. Not Python's `max`: it passes NaN over.
        pieces = zip(out.reshape(self.exact.shape).split(2048), self.exact.split(2048), strict=True)
        return float(torch.stack([(got.double() - own).abs().max() for got, own in pieces]).max())

    def error_apart(self, out: torch.Tensor) -> float:
        lengths, worst = (self.trie.depth[self.trie.leaf] + 1).tolist(), []
        for got, row, length in zip(out, self.sequences, lengths, strict=True):
            worst.append((got[:, :length].transpose(0, 1).double() - self.exact[row[:length]]).abs().max())
        return float(torch.stack(worst).max())


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
        tolerance = 2 * x.error_apart(F.scaled_dot_product_attention(*x.apart, is_causal=True)) + 1e-4
    q_heads, kv_heads, width = heads
    case = Case(
        "tree_attention", name, check=x.error, tolerance=tolerance, dtype=DTYPE_NAMES[setting.dtype], rounds=7,
        tokens=len(x.trie), work=4.0 * q_heads * width * float((x.trie.depth + 1).sum()),
        formula="4*q heads*head_dim*sum(depth+1)",
        shape=f"T={len(x.trie)} dense={x.trie.dense_tokens} Hq={q_heads} Hkv={kv_heads} D={width}",
    )  # fmt: skip
    return case, x


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


@tree_attention.provider("ours")
def ours(x):
    return lambda: sk.tree_attention(x.q, x.k, x.v, x.plan, impl=x.setting.impl)


@tree_attention.provider("sdpa_mask")
def sdpa_mask(x):
    at = torch.arange(len(x.trie), device=x.q.device)
    end = torch.from_numpy(x.trie.subtree_end).to(x.q.device)
    mask = (at[None, :] <= at[:, None]) & (at[:, None] < end[None, :])

    def run():
        return F.scaled_dot_product_attention(*x.wide, attn_mask=mask)[0].transpose(0, 1)

    return Provider(run, note="[T, T] mask")


@tree_attention.provider("sdpa_sequences")
def sdpa_sequences(x):
    apart = x.apart
    return Provider(
        lambda: F.scaled_dot_product_attention(*apart, is_causal=True), tokens=int(x.trie.dense_tokens),
        check=x.error_apart, note="each sequence apart, padded",
    )  # fmt: skip


# On a CPU it needs a C++ compiler and would be no rival; its eager form writes the whole score matrix.
@tree_attention.provider("flex", on="cuda")
def flex(x):
    from ..peers.flex import block_mask, flex_tree_attention

    mask = block_mask(x.plan, x.q.device)
    return lambda: flex_tree_attention(x.q, x.k, x.v, x.plan, mask=mask)


class Backward(Inputs):
    """The same for a forward and backward pass: results are the gradients of q, k and v in one flat tensor."""

    def __init__(self, setting: Setting, cells: Cells, heads: tuple[int, int, int]):
        super().__init__(setting, cells, heads)
        draw = torch.Generator().manual_seed(1)
        self.upstream = torch.randn(self.q.shape, generator=draw).to(self.q)
        wide = [t.double().requires_grad_() for t in (self.q, self.k, self.v)]
        self.exact_gradients = torch.autograd.grad(oracle(*wide, self.trie), wide, self.upstream.double())
        # Each token's share of what its copies in several sequences are given.
        here = torch.arange(self.sequences.shape[1], device=self.q.device)[None] <= self.trie_depths[:, None]
        self.copies = torch.bincount(self.sequences[here], minlength=len(self.trie))
        self.share = (here / self.copies[self.sequences])[:, None, :, None].to(self.q.dtype)

    @cached_property
    def trie_depths(self) -> torch.Tensor:
        """[C] depth of each cell's leaf."""
        return torch.from_numpy(np.asarray(self.trie.depth[self.trie.leaf])).to(self.q.device)

    def error(self, out: torch.Tensor) -> float:
        """Of all three, each relative to its largest."""
        parts = out.split([t.numel() for t in self.exact_gradients])
        pairs = zip(parts, self.exact_gradients, strict=True)
        return float(torch.stack([(a.double() - b.flatten()).abs().max() / b.abs().max() for a, b in pairs]).max())

    def error_wide(self, out: torch.Tensor) -> float:
        """Of gradients [1, Hq, T, D] each."""
        return self.error(self._joined(part[0].transpose(0, 1) for part in out.view(3, *self.wide[0].shape)))

    def error_apart(self, out: torch.Tensor) -> float:
        """Of gradients [C, Hq, L, D] each; those of a token's copies are added up."""
        found = []
        for part in out.view(3, *self.apart[0].shape):
            rows = part.transpose(1, 2).flatten(0, 1).double()
            found.append(rows.new_zeros(len(self.trie), *rows.shape[1:]).index_add_(0, self.sequences.flatten(), rows))
        return self.error(self._joined(found))

    def _joined(self, found) -> torch.Tensor:
        q, *others = found
        groups = [t.reshape(len(t), -1, self.groups, t.shape[2]).sum(2) for t in others]
        return torch.cat([q.flatten(), *(t.flatten() for t in groups)])


def make_backward(setting: Setting, name: str, cells: Cells, heads: tuple[int, int, int]):
    case, _ = make(setting, name, cells, heads)
    x = Backward(setting, cells, heads)
    own = x.error_apart(_sequences_backward(x)())
    return dataclasses.replace(
        case, op="tree_attention_backward", check=x.error, tolerance=2 * own + 1e-5, work=3.5 * case.work,
        formula="14*q heads*head_dim*sum(depth+1)",
    ), x  # fmt: skip


def _sequences_backward(x: Backward):
    leaves = [t.clone().requires_grad_() for t in x.apart]
    upstream = x.upstream.transpose(0, 1)[:, x.sequences].transpose(0, 1) * x.share
    return gradients(lambda: F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, upstream)


tree_attention_backward = Op(
    "tree_attention_backward", make_backward, toy=tree_attention.toy, share=0.04,
    cpu={"16 rows": (Cells(1, 16), (8, 4, 64))},
    gpu={
        "8B 16 rows": (Cells(1, 16), (32, 8, 128)),
        "8B 64 rows": (Cells(1, 64), (32, 8, 128)),
        "8B 16k tokens": (Cells(21, 8, 100, 80), (32, 8, 128)),
    },
)  # fmt: skip


def _leaves(x: Backward) -> list[torch.Tensor]:
    return [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]


@tree_attention_backward.provider("ours")
def ours_backward(x):
    leaves = _leaves(x)
    return gradients(lambda: sk.tree_attention(*leaves, x.plan, impl=x.setting.impl), leaves, x.upstream)


@tree_attention_backward.provider("sdpa_mask")
def sdpa_mask_backward(x):
    at = torch.arange(len(x.trie), device=x.q.device)
    end = torch.from_numpy(x.trie.subtree_end).to(x.q.device)
    mask = (at[None, :] <= at[:, None]) & (at[:, None] < end[None, :])
    leaves = [t.clone().requires_grad_() for t in x.wide]
    run = gradients(
        lambda: F.scaled_dot_product_attention(*leaves, attn_mask=mask), leaves, x.upstream.transpose(0, 1)[None]
    )
    return Provider(run, check=x.error_wide, note="[T, T] mask")


@tree_attention_backward.provider("sdpa_sequences")
def sdpa_sequences_backward(x):
    return Provider(
        _sequences_backward(x), tokens=int(x.trie.dense_tokens), check=x.error_apart,
        note="each sequence apart, padded",
    )  # fmt: skip


@tree_attention_backward.provider("flex", on="cuda")
def flex_backward(x):
    from ..peers.flex import block_mask, flex_tree_attention

    mask, leaves = block_mask(x.plan, x.q.device), _leaves(x)
    return gradients(lambda: flex_tree_attention(*leaves, x.plan, mask=mask), leaves, x.upstream)
