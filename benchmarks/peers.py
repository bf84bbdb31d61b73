"""What people use today to score prompts, written for plain transformers and nothing of ours.

Both give [K * M] sums of negative log-likelihood in nats (float64), in the order of the cache's cells.
"""

from __future__ import annotations

import torch


def _cells(cache):
    contexts, responses = cache.contexts, cache.responses
    return [(c, r) for row, answers in zip(contexts, responses, strict=True) for c, r in zip(row, answers, strict=True)]


def _batch(cells, device):
    """Right-padded ids, attention mask and the mask of rows that predict a response token, each [B, L]."""
    width = max(len(c) + len(r) - 1 for c, r in cells)
    ids = torch.zeros(len(cells), width, dtype=torch.int64)
    mask, rows = torch.zeros_like(ids), torch.zeros(len(cells), width, dtype=torch.bool)
    for b, (context, response) in enumerate(cells):
        length = len(context) + len(response) - 1
        ids[b, :length] = torch.tensor(context + response[:-1])
        mask[b, :length] = 1
        rows[b, len(context) - 1 : length] = True
    return ids.to(device), mask.to(device), rows.to(device)


def _sums(logprob_rows, cells):
    """Split [total response tokens] log-probabilities into one sum a cell."""
    return [-part.sum() for part in logprob_rows.double().split([len(r) for _, r in cells])]


@torch.no_grad()
def padded_loop(model, cache, batch_size: int = 8) -> torch.Tensor:
    """The usual loop: cells in order, padded batches, logits of every position."""
    cells, out = _cells(cache), []
    for i in range(0, len(cells), batch_size):
        part = cells[i : i + batch_size]
        ids, mask, rows = _batch(part, model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        targets = torch.tensor([t for _, r in part for t in r], device=model.device)
        logprob = torch.log_softmax(logits.float(), -1)[rows].gather(-1, targets[:, None])[:, 0]
        out += _sums(logprob, part)
    return torch.stack(out).cpu()


@torch.no_grad()
def tuned_plain(model, cache, batch_size: int = 8) -> torch.Tensor:
    """Plain transformers at its best: sorted by length, logits of the response rows only (`logits_to_keep` mask)."""
    cells = _cells(cache)
    order = sorted(range(len(cells)), key=lambda c: -len(cells[c][0]) - len(cells[c][1]))
    out = torch.empty(len(cells), dtype=torch.float64)
    for i in range(0, len(order), batch_size):
        chosen = order[i : i + batch_size]
        part = [cells[c] for c in chosen]
        ids, mask, rows = _batch(part, model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=rows).logits
        targets = torch.tensor([t for _, r in part for t in r], device=model.device)
        logprob = torch.log_softmax(logits.view(-1, logits.shape[-1]).float(), -1).gather(-1, targets[:, None])[:, 0]
        out[chosen] = torch.stack(_sums(logprob, part)).cpu()
    return out
