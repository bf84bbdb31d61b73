"""Which road a model takes: a few tokens through both, once per model, before anything is trusted.

The plain forward of each short sequence alone is the judge. The static rules of `support` close the road to whole
classes; the probe finds the rest, such as layers that pass state along without saying so, or a head with a transform
that no table knows.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import nn

from . import model_support as support
from .decoder import NotTreeable, TreeRunner, run_padded, trie_attention_installed
from .head import OP_IMPL, HeadReader, padded_batch
from .model_state import is_out_of_memory
from .response_cache import ResponseCache

# Lengths (context, response) of the probe's cells and how many first tokens each shares with the one before.
_SHAPES = ((6, 3, 0), (6, 4, 7), (7, 2, 3), (3, 2, 0))
_PASS_TOKENS = 5  # several passes, so that carried keys are probed too


@dataclass(frozen=True)
class Verdict:
    """How to score a model.

    Attributes:
        tree_reason: why the tree road is closed, None if it is open.
        through_model: read the model's own logits, because its head does more than the table knows.
        alone: no padding; only sequences of one length share a batch.
        windowed: attention calls in one forward that got a sliding window.
    """

    tree_reason: str | None
    through_model: bool = False
    alone: bool = False
    windowed: int = 0


_verdicts: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def verdict_for(model: nn.Module, inner: nn.Module, impl: str, device: torch.device) -> Verdict:
    """The verdict on a model, remembered for as long as it lives and is used the same way."""
    weight = inner.get_input_embeddings().weight
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    key = (
        impl, device, weight.dtype, autocast, type(inner.get_output_embeddings()), inner.config._attn_implementation,
        id(vars(inner).get("forward")),  # trainers replace it
        tuple((name, str(config.peft_type)) for name, config in getattr(model, "peft_config", {}).items()),
    )  # fmt: skip
    known = _verdicts.setdefault(inner, {})
    if key in known:
        return known[key]
    verdict, final = _probe(model, inner, impl, device)
    if final:
        known[key] = verdict
    return verdict


def _probe(model, inner, impl, device) -> tuple[Verdict, bool]:
    """(verdict, whether it may be remembered)."""
    cache = _probe_cache(support.vocabulary_size(inner))
    plain = _plain_logprobs(model, cache, device)
    if not plain.isfinite().all():
        # NaN weights, say: nothing can be compared, so the plain road it is, and ask again next time.
        return Verdict("the probe's plain log-probabilities are not finite", alone=True), False

    choices = ((False, False), (False, True), (True, False), (True, True))
    for alone, through in choices[2:] if support.padding_matters(inner) else choices:
        try:
            got, dtype = _padded_logprobs(model, inner, cache, device, impl, alone, through)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            continue
        if close(got, plain, dtype):
            break
    else:
        raise RuntimeError(
            f"model: {type(inner).__name__}: reading its response rows does not give its own log-probabilities; "
            "it cannot be scored"
        )
    noise = float((got - plain).abs().mean())
    reason, windowed, final = support.tree_refusal(inner, longest=0), 0, True
    if reason is None:
        try:
            got, windowed = _tree_logprobs(model, inner, cache, device, impl, through)
        except NotTreeable as error:
            reason = f"{type(inner).__name__}: {error}"
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"{type(inner).__name__} failed on a token tree: {type(error).__name__}: {str(error)[:200]}"
            final = False  # it may have been a passing fault
        else:
            if not close(got, plain, dtype, noise):
                worst = float((got - plain).abs().max())
                reason = f"{type(inner).__name__}: tree and plain forward differ by {worst:.3g} nats on the probe"
    return Verdict(reason, through, alone, windowed), final


def close(got: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype, noise: float | None = None) -> bool:
    """Whether per-token log-probabilities agree up to the rounding of `dtype`; a wrong road is off by whole nats.

    `noise` is the mean distance of the padded road, which is right, from the plain forward: in bfloat16 the tree may
    be a few times as far off, and no further.
    """
    distance = (got - plain).abs()
    worst, mean = float(distance.max()), float(distance.mean())
    if dtype == torch.float16:
        return worst <= 0.1 and mean <= 0.02
    if dtype == torch.bfloat16:
        return worst <= 0.5 and mean <= (0.1 if noise is None else min(0.1, max(0.04, 4 * noise)))
    return worst <= (0.05 if plain.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else 1e-3)


def _probe_cache(vocabulary: int) -> ResponseCache:
    usable = max(1, min(vocabulary - 5, 900))
    low = min(5, vocabulary - 1)
    contexts, responses, previous, fresh = [], [], [], 0
    for context, response, shared in _SHAPES:
        sequence = previous[:shared]
        while len(sequence) < context + response:
            sequence.append(low + 37 * fresh % usable)
            fresh += 1
        contexts.append([sequence[:context]])
        responses.append([sequence[context:]])
        previous = sequence
    return ResponseCache.from_token_ids(contexts, responses)


def _plain_logprobs(model, cache: ResponseCache, device) -> torch.Tensor:
    """[sum of responses] by the unmodified model, each sequence alone."""
    parts = []
    for (context,), (response,) in zip(cache.contexts, cache.responses, strict=True):
        ids = torch.tensor([context + response[:-1]], device=device)
        logits = model(input_ids=ids, use_cache=False, return_dict=True).logits[0, len(context) - 1 :]
        logprob = torch.log_softmax(logits.float(), -1)
        parts.append(logprob.gather(-1, torch.tensor(response, device=logprob.device)[:, None])[:, 0])
    return torch.cat(parts)


def _padded_logprobs(model, inner, cache, device, impl, alone, through):
    lengths = cache.lengths
    groups = [[c] for c in range(len(lengths))] if alone else [list(range(len(lengths)))]
    with HeadReader(inner, OP_IMPL[impl], through).installed() as reader:
        parts = [run_padded(model, reader, padded_batch(cache, group), device) for group in groups]
        if not reader.agrees():
            raise RuntimeError("the head's transform is not the model's")
    return torch.cat(parts), reader.dtype


def _tree_logprobs(model, inner, cache, device, impl, through):
    plan = cache.plan(_PASS_TOKENS)
    with trie_attention_installed(inner), HeadReader(inner, OP_IMPL[impl], through).installed() as reader:
        runner = TreeRunner(model, reader, impl if impl in OP_IMPL else "auto", device)
        values = torch.cat([runner.run(p).to(device) for p in plan.passes])
    return values[torch.from_numpy(plan.trie.cell_target).to(device)], runner.windowed
