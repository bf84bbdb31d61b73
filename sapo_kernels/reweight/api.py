"""The public reweight_: quick checks of the arguments of one call, then one call of the operator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .prompt_state import PromptState

_operator = torch.ops.sapo_kernels.reweight_.default


def reweight_(
    state: PromptState,
    nll: torch.Tensor,
    tokens: torch.Tensor,
    decay: float = 1.0,
    temperature: float = 0.0,
    floor: float = 0.0,
) -> None:
    """Fold newly scored losses into `state` and choose again: one launch for all pools, in place, no host sync.

    For every prompt that was scored (``tokens > 0``)::

        weight = decay * weight + tokens
        mean = mean + (nll - tokens * mean) / weight

    (one that was not only ages: ``weight = decay * weight``), and for every pool, over its live prompts with a finite
    mean, L of them::

        best = argmin(mean)                                            # ties to the lowest index
        probs = (1 - floor) * softmax(-mean / temperature) + floor / L
        effective = 1 / sum(probs ** 2)

    Temperature 0 puts all of the softmax on `best`, the paper's choice. ``decay=0`` keeps the newest losses only.

    Args:
        state: a `PromptState`; everything but ``live`` is written.
        nll: [pools, prompts] float64, nats, summed over the newly scored examples; [prompts] for a single pool.
        tokens: like `nll`, int64: the response tokens behind it, 0 where a prompt was not scored (its nll is ignored).
        decay: from 0 to 1, what the evidence so far still counts.
        temperature: nats per token, 0 or more.
        floor: from 0 to 1, the share of probability that is spread evenly.

    A loss that is not finite (or a negative count) makes the prompt's mean not finite and its weight 0: it is never
    selected or sampled until it is scored with a finite loss again, which then stands alone. A pool without any finite
    mean gets ``best = -1``; its probs and effective number stay as they are.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was got; nothing was written.
        RuntimeError: the state's own tensors do not fit together; nothing was written.

    Numerics: float64; the same bits again on the same device. Between devices, and compiled or not, a mean may differ
    in its last bits (relative 1e-13), probs by that over the temperature (1e-9 at 1e-4 nats): processes that must
    choose alike share the state of one. Safe under CUDA graphs (after one call outside; decay, temperature and floor
    are those of the capture) and torch.compile.
    Source: SAPO, arXiv 2606.01967, section 3; the weights are exponential weights over prompts.
    """
    shape = state.mean.shape
    if nll.dim() == 1 and shape[0] == 1:
        nll, tokens = nll[None], tokens[None]
    if nll.dtype != torch.float64 or tokens.dtype != torch.int64:
        raise TypeError(f"reweight_: expected nll float64 and tokens int64, got {nll.dtype} and {tokens.dtype}")
    if nll.shape != shape or tokens.shape != shape:
        raise ValueError(
            f"reweight_: nll, tokens: expected [pools, prompts] {list(shape)}, got {list(nll.shape)} and "
            f"{list(tokens.shape)}"
        )
    if nll.device != state.mean.device or tokens.device != state.mean.device:
        raise ValueError(
            f"reweight_: nll, tokens: expected the state's device {state.mean.device}, got {nll.device} and "
            f"{tokens.device}"
        )
    if not (0.0 <= decay <= 1.0 and 0.0 <= floor <= 1.0 and 0.0 <= temperature < math.inf):
        raise ValueError(
            f"reweight_: expected decay and floor from 0 to 1 and a finite temperature of 0 or more, got "
            f"decay={decay}, floor={floor}, temperature={temperature}"
        )
    if nll.requires_grad:
        nll = nll.detach()
    _operator(
        state.mean, state.weight, state.probs, state.best, state.effective, state.live,
        nll.contiguous(), tokens.contiguous(), decay, temperature, floor,
    )  # fmt: skip
