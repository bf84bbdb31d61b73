"""tree_attention and what else gives the same numbers: providers, inputs, the oracle, the operations needed."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

import sapo_kernels as sk
from sapo_kernels.trie.trie import TokenTrie, plan_trie

from .timing import Case, Provider
from .workload import Cells

FORMULA = "4*q heads*head_dim*sum(depth+1)"


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


def dense_mask(trie: TokenTrie, device: str) -> torch.Tensor:
    """[T, T] bool, true where a query sees a key."""
    at = torch.arange(len(trie), device=device)
    end = torch.from_numpy(trie.subtree_end).to(device)
    return (at[None, :] <= at[:, None]) & (at[:, None] < end[None, :])


def padded_sequences(trie: TokenTrie, device: str) -> torch.Tensor:
    """[C, L] trie tokens of every cell's sequence, padded on the right with its last one."""
    paths = [path_of(trie, cell) for cell in range(len(trie.leaf))]
    width = max(map(len, paths))
    return torch.from_numpy(np.stack([np.pad(p, (0, width - len(p)), mode="edge") for p in paths])).to(device)


def make_case(cells: Cells, name: str, heads=(8, 4, 64), dtype=torch.float32, device: str = "cpu", rounds: int = 5,
              flex: str = "auto", dense: bool = True, impl: str = "auto") -> Case:  # fmt: skip
    """One layer's attention over the whole trie of some made-up cells.

    heads: q heads, kv heads, head_dim. flex: "compiled" (needs a compiler), "eager" (writes the whole score matrix) or
    "off"; "auto" is compiled on a GPU and off elsewhere. The other providers' masks are made outside the timing, as our
    plan is. impl: of ours.
    """
    cache = cells.cache(50257)
    trie = plan_trie(cache.ids, cache.offsets, cache.context_lengths)
    plan = trie.make_pass(0, len(trie)).to(device)
    draw = torch.Generator().manual_seed(0)
    q_heads, kv_heads, width = heads
    q, k, v = (
        torch.randn(len(trie), n, width, generator=draw).to(device, dtype) for n in (q_heads, kv_heads, kv_heads)
    )
    exact = oracle(q, k, v, trie)

    def check(out: torch.Tensor) -> float:
        # In pieces, for a float64 copy of everything is as large as the oracle. Not Python's `max`: it passes NaN over.
        pieces = zip(out.reshape(exact.shape).split(2048), exact.split(2048), strict=True)
        return float(torch.stack([(got.double() - wanted).abs().max() for got, wanted in pieces]).max())

    # Heads-first copies that other implementations want, made outside the timing.
    batch = [t.transpose(0, 1)[None].contiguous() for t in (q, k, v)]
    wide = [batch[0], *(t.repeat_interleave(q_heads // kv_heads, 1) for t in batch[1:])]
    providers = {"ours": Provider(lambda: sk.tree_attention(q, k, v, plan, impl=impl), tokens=len(trie))}
    if dense:
        mask = dense_mask(trie, device)
        providers["sdpa_mask"] = Provider(
            lambda: F.scaled_dot_product_attention(*wide, attn_mask=mask)[0].transpose(0, 1), tokens=len(trie),
            note="[T, T] mask",
        )  # fmt: skip
    index, lengths = padded_sequences(trie, device), (trie.depth[trie.leaf] + 1).tolist()
    apart = [t[index].transpose(1, 2).contiguous() for t in (q, *(w[0].transpose(0, 1) for w in wide[1:]))]

    def check_apart(out: torch.Tensor) -> float:
        worst = []
        for got, row, length in zip(out, index, lengths, strict=True):
            wanted = exact[row[:length]]
            worst.append((got[:, :length].transpose(0, 1).double() - wanted).abs().max())
        return float(torch.stack(worst).max())

    providers["sdpa_sequences"] = Provider(
        lambda: F.scaled_dot_product_attention(*apart, is_causal=True), tokens=int(trie.dense_tokens),
        check=check_apart, note="each sequence apart, padded",
    )  # fmt: skip
    flex = ("compiled" if device == "cuda" else "off") if flex == "auto" else flex
    if flex != "off":
        from .peers.flex import block_mask, flex_tree_attention

        seen = block_mask(plan, q.device)
        providers["flex"] = Provider(
            lambda: flex_tree_attention(q, k, v, plan, mask=seen, compiled=flex == "compiled"), tokens=len(trie),
            note="" if flex == "compiled" else "not compiled",
        )  # fmt: skip
    needed = 4.0 * q_heads * width * float((trie.depth + 1).sum())
    name_of = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    tolerance = 2e-5 if dtype == torch.float32 else _low_precision(check_apart, apart)
    return Case(
        "tree_attention", name, providers, check, tolerance, dtype=name_of[dtype], work=needed, formula=FORMULA,
        rounds=rounds, shape=f"T={len(trie)} dense={trie.dense_tokens} Hq={q_heads} Hkv={kv_heads} D={width}",
    )  # fmt: skip


def _low_precision(check_apart, apart) -> float:
    """Twice the error of PyTorch's own attention in that dtype on the same sequences, plus 1e-4."""
    return 2 * check_apart(F.scaled_dot_product_attention(*apart, is_causal=True)) + 1e-4
