"""lm-evaluation-harness: `HFLM` as its tasks use it, from the point where requests are token ids."""

from __future__ import annotations

import logging

import torch

from .plain import cells_of

logging.getLogger("lm_eval").setLevel(logging.ERROR)


def lm_eval_harness(model, cache, tokenizer=None, batch_size: int = 8) -> torch.Tensor:
    """``HFLM.loglikelihood`` without its tokenisation: sorted by length, right padding, full log-softmax.

    The ids are ours, so that every peer scores the same cells; what is left out (tokenising strings) only helps it.
    """
    from lm_eval.models.huggingface import HFLM

    if tokenizer is None:
        from sapo_peft.tiny import tiny_tokenizer

        tokenizer = tiny_tokenizer()  # never asked to tokenise here
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    requests = [(("", ""), context, response) for context, response in cells_of(cache)]
    found = scorer._loglikelihood_tokens(requests, disable_tqdm=True)
    return torch.tensor([-logprob for logprob, _ in found], dtype=torch.float64)
