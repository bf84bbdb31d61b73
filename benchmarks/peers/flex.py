"""FlexAttention with the same trie as its block mask, in the place of `tree_attention`; everything else is ours."""

from __future__ import annotations

import contextlib
import functools
import weakref

import torch

# Cache of token ids -> block masks of its passes by the plan's id.
_MASKS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@functools.cache
def _compiled():
    import torch._dynamo
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Past the limit it would fall back to writing the whole score matrix, without a word.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=True), create_block_mask


def block_mask(plan, device: torch.device):
    """The pass's visibility as a BlockMask: key j is seen by query i iff ``j <= i < subtree_end[j]``."""
    _, create = _compiled()
    # A tensor, because a number in the mask would compile it again for every pass.
    num_past, end = torch.tensor(plan.num_past, device=device), plan.to(device).subtree_end

    def visible(batch, head, query, key):
        at = query + num_past
        return (key <= at) & (at < end[key])

    return create(visible, None, None, len(plan.input_ids), len(plan.position), device=device)


def flex_tree_attention(q, k, v, plan, *, scale=None, mask=None, compiled: bool = True) -> torch.Tensor:
    """q [T, Hq, D], k and v [Tk, Hkv, D] as for `tree_attention` without window, softcap and sinks -> [T, Hq, D]."""
    from torch.nn.attention.flex_attention import flex_attention

    run = _compiled()[0] if compiled else flex_attention
    mask = block_mask(plan, q.device) if mask is None else mask
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return run(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)


@contextlib.contextmanager
def _in_place(masks: dict[int, tuple], compiled: bool):
    """`score_prompts` attends by FlexAttention for the block; a pass's mask is made once and used in every layer."""
    from sapo_kernels.scoring import attention

    def flex(q, k, v, plan, *, scale, window, softcap, sinks, past, impl):
        if window is not None or softcap is not None or sinks is not None:
            raise ValueError("flex_trie: expected plain attention, got a window, a soft cap or sinks")
        if past is not None:
            k, v = (torch.cat(pair) for pair in zip(past, (k, v), strict=True))
        if id(plan) not in masks:
            # The plan is kept beside its mask: a freed plan's id could come back.
            masks[id(plan)] = (plan, block_mask(plan, q.device))
        # score_prompts keeps compiled models from running; this one operator is nothing without its compiler.
        with torch.compiler.set_stance("default"):
            return flex_tree_attention(q, k, v, plan, scale=scale, mask=masks[id(plan)][1], compiled=compiled)

    own, attention.tree_attention = attention.tree_attention, flex
    try:
        yield
    finally:
        attention.tree_attention = own


def flex_trie(model, cache, compiled: bool = True, **options) -> torch.Tensor:
    """`score_prompts` with FlexAttention; block masks are kept with the cache, as our plans are."""
    import sapo_kernels as sk

    with _in_place(_MASKS.setdefault(cache, {}), compiled):
        return sk.score_prompts(model, cache, impl="tree", progress=False, **options).nll.flatten()
