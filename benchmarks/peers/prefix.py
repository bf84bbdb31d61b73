"""Tuned transformers with a prefix cache: what the cells of a prompt (or of an example) share is computed once.

The keys and values of a group's longest common prefix come from one forward; batches of what is left attend to copies
of them. Grouping by prompt suits an instruction that comes first, by example one that comes last; whichever leaves
fewer tokens is taken.
"""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch

from .plain import cells_of, logits_of_rows, longest_first, padded, row_logprob, sums, targets_of


@torch.no_grad()
def prefix_cache(model, cache, batch_size: int = 8) -> torch.Tensor:
    """Groups one after the other, suffixes longest first, logits of the response rows only."""
    cells = cells_of(cache)
    out = torch.empty(len(cells), dtype=torch.float64)
    for group, shared in _groups(cells, cache.num_prompts, cache.num_examples):
        past = None
        if shared:
            ids = torch.tensor([cells[group[0]][0][:shared]], device=model.device)
            past = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        suffixes = [(cells[c][0][shared:], cells[c][1]) for c in group]
        out[group] = longest_first(suffixes, batch_size, functools.partial(_score, model, past, shared))
    return out


def _score(model, past, shared: int, part) -> torch.Tensor:
    ids, mask, rows = padded(part, model.device)
    options = {"use_cache": False}
    if past is not None:
        # The forward adds to the cache it is given.
        copies = copy.deepcopy(past)
        copies.batch_repeat_interleave(len(part))
        mask = torch.cat([mask.new_ones(len(part), shared), mask], 1)
        positions = torch.arange(shared, shared + ids.shape[1], device=ids.device)[None].expand(len(part), -1)
        options = {"use_cache": True, "past_key_values": copies, "position_ids": positions}
    logits = logits_of_rows(model, rows, input_ids=ids, attention_mask=mask, **options)
    return sums(row_logprob(logits, targets_of(part, ids.device)), part)


def _groups(cells, prompts: int, examples: int) -> list[tuple[list[int], int]]:
    """(cells, tokens of their common prefix) of every group; the last context token is never in the prefix."""
    number = np.arange(prompts * examples).reshape(prompts, examples)
    ways = [
        [(group, _common([cells[c][0] for c in group])) for group in way]
        for way in (number.tolist(), number.T.tolist())
    ]
    return max(ways, key=lambda groups: sum(shared * (len(group) - 1) for group, shared in groups))


def _common(contexts: list[list[int]]) -> int:
    low, high = min(contexts), max(contexts)
    shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return min(shared, min(map(len, contexts)) - 1)
