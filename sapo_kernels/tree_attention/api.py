"""The public tree_attention: checks, then one call of the operator."""

from __future__ import annotations

import math

import torch

from ..trie.tiles import tile_tokens
from ..trie.trie import TokenTrie, TriePass

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    trie: TriePass | TokenTrie,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attention in which each token of a trie sees its ancestors and itself.

    ``s[i, h, j] = scale * q[i, h] . k[j, h // G]`` over the keys j on the path from the root to token i (with
    ``window``: those with ``position[i] - position[j] < window``), then ``softmax(s) @ v``. The same as running
    causal attention on every root-to-leaf sequence alone and keeping one copy of each shared row::

        for path in sequences:                      # token indices from root to leaf
            out[path] = causal_attention(q[path], k[path], v[path])

    Args:
        q: [Tq, Hq, Dk] float32, bfloat16, float16 or float64; Tq is the number of tokens of the pass.
        k: [Tk, Hkv, Dk], same dtype; ``Tk = num_past + Tq``, in the order that `TriePass` says. Hq = G * Hkv for an
            integer G, query head ``h * G + g`` reads kv head h.
        v: [Tk, Hkv, Dv], same dtype; Dv may differ from Dk.
        trie: the pass that says who sees whom (`TokenTrie.passes`), or a whole trie (then ``Tk == Tq``).
        scale: factor on the logits; default ``Dk ** -0.5``.
        window: sliding window in positions, at least 1; None is unlimited.
        softcap: ``s <- softcap * tanh(s / softcap)``, positive; None is off.
        sinks: [Hq] float, one extra logit per head that takes part in the softmax's denominator only.
        past: keys and values [num_past, Hkv, Dk] and [num_past, Hkv, Dv] in front of those of the pass; k and v are
            [Tq, Hkv, Dk] and [Tq, Hkv, Dv]. As if joined; Triton reads both where they are.
        impl: "auto", "triton", "sdpa" or "reference".

    Returns:
        [Tq, Hq, Dv] in q's dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was got; nothing was computed.
        RuntimeError: an explicit ``impl`` that cannot run here.

    Gradients flow to q, k, v and sinks; only the result and the log-sum-exp of each row are kept for them. The backward
    pass cannot be differentiated again. A NaN anywhere in a pass may reach every gradient of it, as the gradients of
    weights that all its tokens share would.

    Numerics: softmax and accumulation in float32 (float64 for float64 inputs); deterministic, gradients too.
    Source: SAPO, arXiv 2606.01967; online softmax as in FlashAttention, arXiv 2205.14135.
    """
    if isinstance(trie, TokenTrie):
        passes = trie.passes()
        if len(passes) != 1:
            raise ValueError("tree_attention: trie: expected at least one token, got an empty trie")
        trie = passes[0]
    _check(q, k, v, trie, scale, window, softcap, sinks, past)
    if trie.num_cached and impl == "reference":
        # It reads which token sees which from the order of the keys, and cached ones are out of it.
        raise ValueError("tree_attention: trie: expected a pass without cached tokens for impl='reference', got some")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    plan, group = trie.to(q.device), q.shape[1] // k.shape[1]
    inputs = [q, k, v, *(past or (None, None)), sinks]
    with_lse = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if past is not None and with_lse:
        inputs[1:5] = torch.cat([past[0], k]), torch.cat([past[1], v]), None, None
    q, k, v, past_k, past_v = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in inputs[:5])
    # Only Triton's kernels walk lists.
    listed = impl == "triton" or (impl == "auto" and q.device.type != "cpu" and q.dtype != torch.float64)
    return torch.ops.sapo_kernels.tree_attention(
        q, k, v, plan.position, plan.subtree_end, plan.block_start, plan.span_ptr, plan.span, sinks, scale, window,
        softcap, plan.block_tokens, impl, with_lse, plan.tiles(tile_tokens(group)) if listed else None,
        tile_tokens(group), past_k, past_v, plan.pieces(group) if listed and with_lse else None,
    )[0]  # fmt: skip


def _check(q, k, v, trie, scale, window, softcap, sinks, past) -> None:
    fresh, keys = len(trie.input_ids), len(trie.position)
    own = keys if past is None else fresh
    named = [("q", q, fresh), ("k", k, own), ("v", v, own)]
    named += [(f"past {name}", t, keys - fresh) for name, t in zip("kv", past or (), strict=False)]
    for name, t, tokens in named:
        if t.dim() != 3 or t.shape[0] != tokens:
            raise ValueError(
                f"tree_attention: {name}: expected [{tokens}, heads, head_dim] for this pass, got {list(t.shape)}"
            )
        if t.dtype not in DTYPES or t.dtype != q.dtype:
            raise TypeError(f"tree_attention: {name}: expected one of {DTYPES}, the same as q, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"tree_attention: {name}: expected q's device {q.device}, got {t.device}")
    if k.shape[1] != v.shape[1] or not k.shape[1] or not q.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"tree_attention: heads: expected q heads a multiple of kv heads and as many k as v heads, got "
            f"{q.shape[1]}, {k.shape[1]} and {v.shape[1]}"
        )
    if q.shape[2] != k.shape[2] or not q.shape[2] or not v.shape[2]:
        raise ValueError(f"tree_attention: head_dim: expected the same for q and k, got {q.shape[2]} and {k.shape[2]}")
    if past is not None and any(a.shape[1:] != b.shape[1:] for a, b in zip(past, (k, v), strict=True)):
        raise ValueError(
            f"tree_attention: past: expected heads and head_dim of k and v, got {[list(t.shape) for t in past]}"
        )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"tree_attention: scale: expected a finite number or None, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"tree_attention: window: expected at least 1 or None, got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"tree_attention: softcap: expected a positive number or None, got {softcap}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.device != q.device or sinks.dtype not in DTYPES):
        raise ValueError(
            f"tree_attention: sinks: expected a float tensor [{q.shape[1]}] on {q.device}, got {sinks.dtype} "
            f"{list(sinks.shape)} on {sinks.device}"
        )
