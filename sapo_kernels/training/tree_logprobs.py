"""tree_logprobs: log-probabilities with gradients of many sequences that share beginnings, in one packed forward."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..scoring import model_support
from ..scoring.attention import TrieAttention, is_installed, mask_of
from ..scoring.fingerprint import configurations, fingerprint
from ..scoring.head import Batch, HeadReader
from ..scoring.model_state import claimed
from ..scoring.response_cache import ResponseCache
from .agreement import differs, plain_losses, reach, refusal
from .trie_batch import TrieBatch

# Of each use of a model the longest sequence that was verified, the shortest that was refused, and why.
_Verified = tuple[int, float, str | None]
_verified: weakref.WeakKeyDictionary[nn.Module, dict[int, _Verified]] = weakref.WeakKeyDictionary()
_REMEMBERED = 16


@contextlib.contextmanager
def use_tree_attention(model: nn.Module) -> Iterator[None]:
    """Run the model's attention over tries for the block: forward *and* backward of a step that checkpoints.

    Gradient checkpointing runs layers again while gradients are computed, and they must find the same attention.
    `tree_logprobs` installs it for its own forward otherwise.
    """
    inner = model_support.unwrap(model)[1]
    if is_installed(inner):
        yield
        return
    with TrieAttention(inner).installed():
        yield


def tree_logprobs(
    model: nn.Module, batch: TrieBatch | ResponseCache | Mapping[str, torch.Tensor], *, verify: bool = True
) -> torch.Tensor:
    """Log-probability of every response token, with gradient; tokens that sequences share are computed once.

    The same as one plain forward for each sequence::

        for context, response in sequences:
            logits = model(input_ids=context + response).logits
            logprob = log_softmax(logits, -1)[len(context) - 1 : -1].gather(-1, response)

    so ``-tree_logprobs(model, batch).mean()`` is the loss of a fine-tuning step over the response tokens.

    Args:
        model: a transformers causal LM or a PeftModel of one, in the mode that it is in. Dropout draws one mask for a
            token that several sequences share. Wrapped by DDP or sharded by FSDP2 it may be.
        batch: a `TrieBatch`; or what one is made of: a `ResponseCache`, or a collator's padded batch.
        verify: compare log-probabilities and gradients with the plain model's, once for a model as it is used (its
            `fingerprint`) and again for longer sequences, on up to four. False: whoever calls has done so.

    Returns:
        [N] float32, nats, on the device of the model's head: the tokens of the sequences in order.
        ``logprob.split(batch.sequence_ptr.diff().tolist())`` has one tensor for each sequence.

    Raises:
        RuntimeError: the model cannot be run over a trie, or gives other values there; the message says why.
        ValueError, TypeError: see `TrieBatch`.

    Numerics: deterministic; log-softmax in float32. Second derivatives are refused.
    Source: sharing as in SAPO's scoring (arXiv 2606.01967).
    """
    if isinstance(batch, ResponseCache):
        batch = TrieBatch.of_cache(batch)
    elif isinstance(batch, Mapping):
        batch = TrieBatch.of_padded(batch)
    elif not isinstance(batch, TrieBatch):
        raise TypeError(f"batch: expected a TrieBatch, a ResponseCache or a padded batch, got {type(batch).__name__}")
    outer, inner = model_support.unwrap(model)
    batch.check_ids(model_support.vocabulary_size(inner))
    if verify:
        verify_model(
            model,
            batch,
            lambda rows: plain_losses(outer, inner, rows),
            lambda part, _: -logprobs_of(outer, inner, part),
        )
    return logprobs_of(model, inner, batch)


def verify_model(
    model: nn.Module, batch: TrieBatch, plain: Callable, packed: Callable, loss: Any = None, key: Hashable = None
) -> None:
    """Raise RuntimeError unless the model may take this batch.

    plain, packed: as in `differs`, known by `key`. loss: the model's function that they call, if they do.
    """
    if reason := _refused(*model_support.unwrap(model), batch, plain, packed, loss, key):
        raise RuntimeError(f"model: expected one that can be run over a trie: {reason}")


def _refused(model: nn.Module, inner: nn.Module, batch: TrieBatch, plain, packed, loss, key) -> str | None:
    device = model_support.input_device(inner)
    if reason := refusal(model, inner, batch.longest, loss):
        return reason
    known = _verified.setdefault(inner, {})
    key = hash((fingerprint(model, device, configurations(model), "train"), torch.is_grad_enabled(), id(loss), key))
    verified, differing, why = known.get(key, (0, math.inf, None))
    longest = _longest_of_all(inner, batch.longest)
    if verified < longest < differing:
        while len(known) >= _REMEMBERED and key not in known:
            known.pop(next(iter(known)))
        further = reach(inner, longest)
        why = differs(model, inner, batch.lengthened(further), plain, packed)
        verified, differing = (verified, longest) if why else (further, math.inf)
        known[key] = verified, differing, why
    return why if longest >= differing else None


def _longest_of_all(inner: nn.Module, longest: int) -> int:
    """The longest sequence of all ranks where these wait for each other in every forward, else of this one."""
    if not any(hasattr(p, "to_local") for p in inner.parameters()) or not torch.distributed.is_initialized():
        return longest
    found = torch.tensor(longest, device=model_support.input_device(inner))
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def logprobs_of(model: nn.Module, inner: nn.Module, batch: TrieBatch, statistics: bool = False):
    """`tree_logprobs` without checks; with `statistics` a pair of them and those of `HeadReader` for each token."""
    device = model_support.input_device(inner)
    batch = batch.to(device)
    trie = batch.trie
    reader = HeadReader(inner, "auto", statistics=statistics)
    installed = is_installed(inner)
    if torch.is_grad_enabled() and not installed and _checkpoints(inner):
        raise RuntimeError(
            "model: gradient checkpointing runs its layers again during backward(): expected forward and backward "
            "inside `with use_tree_attention(model):`, got the forward alone"
        )
    with (
        contextlib.nullcontext() if installed else TrieAttention(inner).installed(),
        claimed(inner),
        reader.installed(),
        reader.reading(Batch.of_pass(trie)),
    ):
        rest = model(
            input_ids=trie.input_ids[None],
            position_ids=trie.position[None].long(),
            attention_mask=mask_of(trie, device),
            **reader.options,
        ).logits
        logprob = reader.logprob_of(rest)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Parallel wrappers begin the backward pass at the model's output, of which nothing is left.
        logprob = logprob + rest[:, :0].sum().to(logprob.device)
    index = batch.target_of.to(logprob.device)
    # The gradient of an embedding adds rows up in a fixed order; that of an index does not, on a GPU.
    logprob = nn.functional.embedding(index, logprob[:, None])[:, 0]
    if not statistics:
        return logprob
    return logprob, {name: value[index] for name, value in reader.statistics.items()}


def _checkpoints(inner: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in inner.modules())
