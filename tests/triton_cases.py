"""What the Triton tests share: small tries, poisoned buffers, the oracle of attention."""

from __future__ import annotations

import numpy as np
import torch

from sapo_kernels.tree_attention.reference import tree_attention_reference
from sapo_kernels.trie.trie import TokenTrie, plan_trie


def chain(length: int) -> TokenTrie:
    """One sequence without a branch that makes `length` trie tokens."""
    return plan_trie(np.arange(length + 1), np.array([0, length + 1]), np.array([1]))


def branches(seed: int = 0, prompts: int = 3, examples: int = 4) -> TokenTrie:
    """Prompts that share a head, each continued by the same examples: sibling leaves, nested nodes, short answers."""
    rng = np.random.default_rng(seed)
    head = rng.integers(0, 9, 5)
    instructions = [rng.integers(0, 9, rng.integers(3, 12)) for _ in range(prompts)]
    texts = [rng.integers(0, 9, rng.integers(1, 30)) for _ in range(examples)]
    sequences = [np.concatenate([head, i, t, rng.integers(0, 2, 3)]) for i in instructions for t in texts]
    lengths = np.array([len(s) for s in sequences])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return plan_trie(np.concatenate(sequences), offsets, lengths - 3)


def poisoned(t: torch.Tensor, strides: str) -> torch.Tensor:
    """`t` [tokens, heads, dim] as a view into a larger buffer that is NaN everywhere else.

    `strides` says how it lies there: "rows" (gaps in every dimension) or "heads" (head-major, as [heads, tokens, dim]).
    """
    tokens, heads, dim = t.shape
    if strides == "heads":
        buffer = torch.full((heads + 1, tokens + 3, dim + 5), float("nan"), dtype=t.dtype)
        view = buffer.transpose(0, 1)[2 : 2 + tokens, :heads, 3 : 3 + dim]
    else:
        buffer = torch.full((tokens + 3, heads + 2, dim + 5), float("nan"), dtype=t.dtype)
        view = buffer[1 : 1 + tokens, 1 : 1 + heads, 2 : 2 + dim]
    view.copy_(t)
    return view


def layout(part) -> tuple:
    """The index tensors of a pass in the order of the operator's arguments."""
    return part.position, part.subtree_end, part.block_start, part.span_ptr, part.span


def attention_oracle(q, k, v, part, sinks, scale, window, softcap) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference in float64: result and log-sum-exp."""
    sinks = None if sinks is None else sinks.double()
    return tree_attention_reference(
        q.double(), k.double(), v.double(), *layout(part), sinks, scale, window, softcap, part.block_tokens, True
    )
