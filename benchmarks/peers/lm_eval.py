"""lm-evaluation-harness: `HFLM` as its tasks use it, from the point where requests are token ids."""

from __future__ import annotations

import logging

import torch

from .plain import cells_of

logging.getLogger("lm_eval").setLevel(logging.ERROR)


def scorer(model, batch_size: int = 8) -> dict:
    """The harness around the model, built once. Log-softmax in fp32: in bf16 it alone would be off by 0.03 nats."""
    from lm_eval.models.huggingface import HFLM

    from sapo_peft.tiny_random import tiny_tokenizer

    # The tokenizer is never asked to tokenise here.
    made = HFLM(
        pretrained=model, tokenizer=tiny_tokenizer(), backend="causal", batch_size=batch_size, softmax_dtype="float32"
    )
    return {"scorer": made}


def lm_eval_harness(model, cache, batch_size: int, scorer) -> torch.Tensor:
    """``HFLM.loglikelihood`` without its tokenisation: sorted by length, right padding, full log-softmax.

    The ids are ours, so that every peer scores the same cells; what is left out (tokenising strings) only helps it.
    batch_size: the scorer's own.
    """
    requests = [(("", ""), context, response) for context, response in cells_of(cache)]
    found = scorer._loglikelihood_tokens(requests, disable_tqdm=True)
    return torch.tensor([-logprob for logprob, _ in found], dtype=torch.float64)
