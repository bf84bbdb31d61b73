"""The ranked table of `sapo score`, and the standard errors in it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..terminal import table

if TYPE_CHECKING:
    import torch

    from sapo_kernels import PromptScores


def paired_difference(nll: torch.Tensor, tokens: torch.Tensor, a: int, b: int) -> tuple[float, float]:
    """(loss of prompt `a` minus loss of prompt `b`, its standard error), both in nats per token.

    The loss ``L = sum(nll) / sum(tokens)`` is a ratio of two sums over M examples, so it is linearised:
    ``L_hat - L = mean(r)``, ``r[m] = (nll[m] - L * tokens[m]) * M / sum(tokens)``. Both prompts see the
    same examples, so their residuals are subtracted example by example:
    ``se = sqrt(sum((r_a - r_b)**2) / (M - 1) / M)``; the mean of the residuals is zero.

    nll: [K, M] float64, nats. tokens: [K, M] int64. The error is NaN for fewer than two examples.
    """
    losses, residuals = [], []
    for k in (a, b):
        total = float(tokens[k].sum())
        losses.append(float(nll[k].sum()) / total)
        residuals.append((nll[k] - losses[-1] * tokens[k]) * (nll.shape[1] / total))
    size = nll.shape[1]
    if size < 2:
        return losses[0] - losses[1], math.nan
    squares = float(((residuals[0] - residuals[1]) ** 2).sum())
    return losses[0] - losses[1], math.sqrt(squares / (size - 1) / size)


def ranked_table(scores: PromptScores, width: int) -> str:
    """One line a prompt, best first: rank, index, loss, difference to the best, its error, tokens, text."""
    head = ("rank", "prompt", "nats/token", "to best", "+/-", "tokens", "text")
    order, loss = scores.ranking(), scores.loss.tolist()
    rows = []
    for rank, k in enumerate(order, 1):
        difference, error = "-", "-"
        if k != order[0] and math.isfinite(loss[k]):
            value, spread = paired_difference(scores.nll, scores.tokens, k, order[0])
            difference = f"{value:+.4f}"
            error = f"{spread:.4f}" if math.isfinite(spread) else "-"
        count = str(int(scores.tokens[k].sum()))
        rows.append((str(rank), str(k), f"{loss[k]:.4f}", difference, error, count, scores.prompts[k]))
    return table(head, rows, width)


def close_to_best(scores: PromptScores) -> int:
    """How many other prompts lie within two standard errors of the best one."""
    best, loss = scores.best, scores.loss.tolist()
    others = [k for k in range(len(loss)) if k != best and math.isfinite(loss[k])]
    pairs = [paired_difference(scores.nll, scores.tokens, k, best) for k in others]
    return sum(difference <= 2 * error for difference, error in pairs)
