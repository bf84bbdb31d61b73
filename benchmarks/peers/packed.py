"""Tuned transformers without padding: sequences end to end in one row, each attending to itself only."""

from __future__ import annotations

import torch

from .plain import cells_of, logits_of_rows, longest_first, row_logprob, sums, targets_of


@torch.no_grad()
def packed(model, cache, tokens: int = 1024) -> torch.Tensor:
    """Flattened rows of about `tokens` tokens, longest cells first, logits of the response rows only.

    Position ids that begin anew tell transformers where a sequence begins; it makes a block-diagonal mask of them (or
    a block mask under ``flex_attention``).
    """
    cells = cells_of(cache)
    out = torch.empty(len(cells), dtype=torch.float64)
    waiting = longest_first(cells)
    while waiting:
        chosen, size = [], 0
        while waiting and (not chosen or size + _length(cells[waiting[0]]) <= tokens):
            size += _length(cells[waiting[0]])
            chosen.append(waiting.pop(0))
        part = [cells[c] for c in chosen]
        ids = torch.tensor([[t for c, r in part for t in c + r[:-1]]], device=model.device)
        positions = torch.cat([torch.arange(_length(cell)) for cell in part])[None].to(model.device)
        rows = torch.cat([torch.arange(_length((c, r))) >= len(c) - 1 for c, r in part])[None].to(model.device)
        logits = logits_of_rows(model, rows, input_ids=ids, position_ids=positions, use_cache=False)
        out[chosen] = sums(row_logprob(logits, targets_of(part, ids.device)), part)
    return out


def _length(cell) -> int:
    return len(cell[0]) + len(cell[1]) - 1
