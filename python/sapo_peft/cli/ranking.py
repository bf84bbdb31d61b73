"""What `sapo score` prints about its scores: the ranked table with standard errors, and what may be concluded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..terminal import cut, plain, table

if TYPE_CHECKING:
    import torch

    from sapo_kernels import PromptScores

# Below so many examples neither the losses nor their standard errors say which prompt to train with.
FEW = 30
_SHOWN = 3


def paired_difference(nll: torch.Tensor, tokens: torch.Tensor, a: int, b: int) -> tuple[float, float]:
    """(loss of prompt `a` minus loss of prompt `b`, its standard error), both in nats per token.

    The loss ``L = sum(nll) / sum(tokens)`` is a ratio of two sums over M examples, so it is linearised:
    ``L_hat - L = mean(r)``, ``r[m] = (nll[m] - L * tokens[m]) * M / sum(tokens)``. Both prompts see the
    same examples, so their residuals are subtracted example by example:
    ``se = sqrt(sum((r_a - r_b)**2) / (M - 1) / M)``; the mean of the residuals is zero.

    nll: [K, M] float64, nats. tokens: [K, M] int64, 0 where a race scored nothing; the examples that both prompts have
    are compared. The error is NaN for fewer than two of them.
    """
    both = (tokens[a] > 0) & (tokens[b] > 0)
    losses, residuals, size = [], [], int(both.sum())
    for k in (a, b):
        total = float(tokens[k][both].sum())
        losses.append(float(nll[k][both].sum()) / total if size else math.nan)
        residuals.append((nll[k][both] - losses[-1] * tokens[k][both]) * (size / max(total, 1.0)))
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
            difference = f"{loss[k] - loss[order[0]]:+.4f}"
            spread = paired_difference(scores.nll, scores.tokens, k, order[0])[1]
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


def best_texts(scores: PromptScores) -> list[str]:
    """The best prompts in full, a line each."""
    order, loss = scores.ranking()[:_SHOWN], scores.loss.tolist()
    return [f"prompt {k} ({loss[k]:.4f}): {plain(scores.prompts[k])}" for k in order]


def rendered_example(tokenizer: Any, cache: Any, prompt: int, width: int) -> list[str]:
    """One cell as the model reads it, special tokens and all."""
    context, response = cache.contexts[prompt][0], cache.responses[prompt][0]
    return [
        f"Example 0 with prompt {prompt}, as the model reads it:",
        f"  {cut(tokenizer.decode(context), width)}",
        f"  the {len(response)} response tokens that are scored: {cut(tokenizer.decode(response), width)}",
    ]


def conclusion(scores: PromptScores, random: bool) -> list[str]:
    """Which prompt to train with, or why these scores do not say."""
    best, others, size = scores.best, len(scores.prompts) - 1, scores.nll.shape[1]
    sure = size >= FEW and not random
    lines = [f"{'Train with' if sure else 'Lowest loss:'} prompt {best}: {plain(scores.prompts[best])}"]
    if random:
        return [*lines, "The weights are random: this shows what scoring costs, not which prompt is better."]
    if not sure:
        return [*lines, f"{size} examples are too few to choose by: take {FEW} or more."]
    if best == 0:
        lines.append("This is the original instruction.")
    else:
        gain, error = paired_difference(scores.nll, scores.tokens, 0, best)
        lines.append(f"The original instruction (prompt 0) is {gain:.4f} +/- {error:.4f} nats per token worse.")
    if others:
        lines.append(f"{close_to_best(scores)} of {others} other prompts lie within two standard errors of it.")
    return lines
