"""Plain transformers at its best: sorted by length with logits of response rows only, padded or packed.

Every function of this package takes ``(model, cache)`` and gives [K * M] float64 sums of negative log-likelihood in
nats, in the order of the cache's cells, unless it says otherwise.
"""

from __future__ import annotations

import torch


def cells_of(cache) -> list[tuple[list[int], list[int]]]:
    """(context ids, response ids) of every cell."""
    contexts, responses = cache.contexts, cache.responses
    return [(c, r) for row, answers in zip(contexts, responses, strict=True) for c, r in zip(row, answers, strict=True)]


def padded(cells, device):
    """Right-padded ids, attention mask and the mask of rows that predict a response token, each [B, L]."""
    contexts = torch.tensor([len(c) for c, _ in cells])[:, None]
    lengths = torch.tensor([len(c) + len(r) - 1 for c, r in cells])[:, None]
    width = int(lengths.max())
    ids = torch.tensor([c + r[:-1] + [0] * (width - len(c) - len(r) + 1) for c, r in cells])
    at = torch.arange(width)[None]
    mask, rows = at < lengths, (at >= contexts - 1) & (at < lengths)
    return ids.to(device), mask.long().to(device), rows.to(device)


def targets_of(cells, device) -> torch.Tensor:
    """[total response tokens] what the marked rows predict, in their order."""
    return torch.tensor([t for _, response in cells for t in response], device=device)


def row_logprob(logits, targets) -> torch.Tensor:
    """logits [R, V], targets [R] -> [R] log-probabilities in fp32."""
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0]


def logits_of_rows(model, rows, **inputs) -> torch.Tensor:
    """[R, V] logits of the marked rows [B, L]: `logits_to_keep` with a mask.

    Versions of transformers that know no mask there get the same by a hook in front of the head, which costs as much.
    """
    from transformers import modeling_utils

    if hasattr(modeling_utils, "slice_logits_to_keep"):
        output = model(**inputs, logits_to_keep=rows)
    else:
        hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0][rows], *given[1:]))
        try:
            output = model(**inputs)
        finally:
            hook.remove()
    return output.logits.view(-1, output.logits.shape[-1])


def sums(logprob_rows, cells) -> torch.Tensor:
    """Split [total response tokens] log-probabilities into one negative sum a cell, [B] float64 on the CPU."""
    counts = torch.tensor([len(r) for _, r in cells], device=logprob_rows.device)
    cell = torch.arange(len(cells), device=counts.device).repeat_interleave(counts, output_size=len(logprob_rows))
    made = torch.zeros(len(cells), dtype=torch.float64, device=counts.device)
    return made.index_add_(0, cell, -logprob_rows.double()).cpu()


@torch.no_grad()
def longest_first(cells, batch_size: int, score) -> torch.Tensor:
    """[len(cells)] float64 in the cells' order of ``score(part)``, [len(part)], on batches of similar length."""
    order = sorted(range(len(cells)), key=lambda c: -_length(cells[c]))
    out = torch.empty(len(cells), dtype=torch.float64)
    for i in range(0, len(order), batch_size):
        chosen = order[i : i + batch_size]
        out[chosen] = score([cells[c] for c in chosen])
    return out


def _length(cell) -> int:
    return len(cell[0]) + len(cell[1]) - 1


def tuned_plain(model, cache, batch_size: int = 8) -> torch.Tensor:
    """Plain transformers at its best: sorted by length, logits of the response rows only (`logits_to_keep` mask)."""

    def score(part):
        ids, mask, rows = padded(part, model.device)
        logits = logits_of_rows(model, rows, input_ids=ids, attention_mask=mask, use_cache=False)
        return sums(row_logprob(logits, targets_of(part, ids.device)), part)

    return longest_first(cells_of(cache), batch_size, score)


@torch.no_grad()
def packed(model, cache, tokens: int = 1024) -> torch.Tensor:
    """Flattened rows of about `tokens` tokens, longest cells first, logits of the response rows only.

    Position ids that begin anew tell transformers where a sequence begins; it makes a block-diagonal mask of them (or
    a block mask under ``flex_attention``).
    """
    cells = cells_of(cache)
    out = torch.empty(len(cells), dtype=torch.float64)
    waiting = sorted(range(len(cells)), key=lambda c: -_length(cells[c]))
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
