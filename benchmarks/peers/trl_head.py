"""TRL's fused log-probability head on padded batches sorted by length."""

from __future__ import annotations

import contextlib

import torch

from .plain import cells_of, longest_first, padded


@contextlib.contextmanager
def _patched(model):
    """The head added for the block; `model.forward` is the class's own again afterwards."""
    from trl.trainer.utils import add_fused_lm_head

    own = vars(model).get("forward")
    add_fused_lm_head(model)
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@torch.no_grad()
def trl_fused_head(model, cache, batch_size: int = 8) -> torch.Tensor:
    """``model(..., labels=labels, fused_lm_head=True).log_probs``; on a CPU it projects every row, not only labels."""
    cells = cells_of(cache)
    order = longest_first(cells)
    out = torch.empty(len(cells), dtype=torch.float64)
    with _patched(model):
        for i in range(0, len(order), batch_size):
            chosen = order[i : i + batch_size]
            part = [cells[c] for c in chosen]
            # One token more than is needed elsewhere: the head shifts the labels itself.
            ids, mask, rows = padded([(c, [*r, 0]) for c, r in part], "cpu")
            labels = torch.where(rows.roll(1, 1) & mask.bool(), ids, -100)
            labels[:, 0] = -100
            given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            made = model(**{n: t.to(model.device) for n, t in given.items()}, fused_lm_head=True)
            out[chosen] = -made.log_probs.double().sum(1).cpu()
    return out
