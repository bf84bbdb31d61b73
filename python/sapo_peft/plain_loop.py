"""The usual way to score prompts, kept plain as a check and as the other side of every time comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def plain_scores(model: Any, cache: Any, batch_size: int = 8) -> torch.Tensor:
    """Negative log-likelihood of every cell by padded batches, full logits and log-softmax.

    Shares no code with the packed path: cells are taken prompt by prompt in the given order, `batch_size` at
    a time, padded on the right, and run through the model's own forward. Equals, for every cell alone,
    ``-log_softmax(model(context + response).logits.float())`` summed over the response tokens.

    model: a causal LM of transformers or a PEFT wrapper; its training flags are put back afterwards.
    cache: a `ResponseCache`: ``contexts[k][m]`` and ``responses[k][m]``, lists of int token ids.
    Returns: [K, M] float64 on the CPU, nats, summed over the response tokens.
    Numerics: logits as the model gives them, log-softmax in float32, the sum over a response in float64.
    """
    # Taken out once: the cache may build these nested lists anew at every access.
    contexts, responses = cache.contexts, cache.responses
    num_prompts, num_examples = len(contexts), len(contexts[0])
    cells = [(k, m) for k in range(num_prompts) for m in range(num_examples)]
    nll = torch.full((num_prompts, num_examples), torch.nan, dtype=torch.float64)
    device = next(model.parameters()).device
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(cells), batch_size):
                batch = cells[start : start + batch_size]
                pairs = [(contexts[k][m], responses[k][m]) for k, m in batch]
                for (k, m), value in zip(batch, _batch(model, pairs, device), strict=True):
                    nll[k, m] = value
    finally:
        for module, was in training.items():
            module.training = was
    return nll


def _batch(model: Any, pairs: list[tuple[list[int], list[int]]], device: torch.device) -> list[float]:
    rows = [context + response for context, response in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logprobs = functional.log_softmax(logits.float(), dim=-1)
    # Position i predicts token i + 1.
    picked = logprobs[:, :-1].gather(2, ids[:, 1:, None])[..., 0].double().cpu()
    return [
        -float(picked[row, len(context) - 1 : len(context) + len(response) - 1].sum())
        for row, (context, response) in enumerate(pairs)
    ]
