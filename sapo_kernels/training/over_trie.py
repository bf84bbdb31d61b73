"""OverTrie: a model as a trainer's ``compute_loss`` calls it, computed over the trie of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..scoring import model_support
from ..scoring.attention import NotTreeable
from .agreement import OwnLoss
from .tree_logprobs import logprobs_of, verify_model
from .trie_batch import IGNORED, TrieBatch

# What a model may be asked for over a trie beside the rows themselves.
_HARMLESS = {"use_cache": False, "return_dict": True, "output_router_logits": False}


class OverTrie:
    """Stands for `model` in the loss of a trainer of transformers or TRL: the same loss, over the trie of its batch.

    Called with input_ids, attention_mask and labels [B, L] it returns what the model returns as far as a loss needs it:
    "loss", the mean over the tokens of the loss (or their sum over ``num_items_in_batch``). With TRL's
    ``fused_lm_head=True`` also "label_mask", "log_probs" and the fields of its `FusedCausalLMOutput`, [B, L - 1], zero
    where there is no label. Everything else of the model is the model's own::

        class Trainer(DPOTrainer):
            def training_step(self, model, *args, **kwargs):
                with sk.use_tree_attention(model):
                    return super().training_step(model, *args, **kwargs)

            def compute_loss(self, model, *args, **kwargs):
                return super().compute_loss(sk.OverTrie(model), *args, **kwargs)

    Args:
        model: as in `tree_logprobs`.
        verify: as in `tree_logprobs`.

    Raises (when called):
        RuntimeError: see `tree_logprobs`; or its caller asks for something that a trie does not give.
    """

    def __init__(self, model: nn.Module, verify: bool = True):
        vars(self).update(_model=model, _verify=verify)

    # Whoever asks what the model is, or keeps something in it, means the model.
    __class__ = property(lambda self: type(self._model))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_model" not in vars(self):
            raise AttributeError(name)
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._model, name)

    def __dir__(self) -> list[str]:
        return dir(self._model)

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        fused_lm_head: bool = False,
        **others: Any,
    ) -> Outputs:
        for name, value in (("input_ids", input_ids), ("labels", labels)):
            if value is None:
                raise NotTreeable(f"it is called without {name}")
        for name, value in others.items():
            if value is not None and value is not _HARMLESS.get(name):
                raise NotTreeable(f"it is called with {name}={value!r}"[:200])
        try:
            batch = TrieBatch.of_padded({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
        except ValueError as error:
            raise NotTreeable(str(error)) from error
        if self._verify:
            self._compare(batch, num_items_in_batch, {"fused_lm_head": True, **others} if fused_lm_head else others)
        if not fused_lm_head:
            logprob = self._logprobs(batch)
            return Outputs(loss=self._mean(logprob, num_items_in_batch))
        logprob, statistics = self._logprobs(batch, statistics=True)
        mask = (labels[:, 1:] != IGNORED).to(logprob.device)
        rows = {
            name: torch.zeros(mask.shape, dtype=value.dtype, device=mask.device).masked_scatter(mask, value)
            for name, value in {"log_probs": logprob, **statistics}.items()
        }
        return Outputs(loss=self._mean(logprob, num_items_in_batch), label_mask=mask, **rows)

    def _mean(self, logprob: torch.Tensor, count: torch.Tensor | int | None) -> torch.Tensor:
        return -logprob.sum() / (len(logprob) if count is None else count)

    def _logprobs(self, batch: TrieBatch, statistics: bool = False):
        inner = model_support.unwrap(self._model)[1]
        batch.check_ids(model_support.vocabulary_size(inner))
        return logprobs_of(self._model, inner, batch, statistics)

    def _compare(self, batch: TrieBatch, count: torch.Tensor | int | None, options: dict[str, Any]) -> None:
        """Raise RuntimeError unless this call's loss is the model's own on padded rows."""
        outer, inner = model_support.unwrap(self._model)
        own = OwnLoss(outer, inner, lambda part: logprobs_of(outer, inner, part), options, count)
        key = count is None, *sorted(options)
        verify_model(self._model, batch, own.plain, own.packed, getattr(inner, "loss_function", None), key)


class Outputs(dict):
    """What a trie gives of a model's output; whatever else is read is an error, never a default."""

    def __missing__(self, name):
        raise NotTreeable(f"its caller reads {name!r} of its output")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name, value):
        self[name] = value

    def __contains__(self, name):
        return dict.__contains__(self, name) or self.__missing__(name)

    def get(self, name, default=None):
        return self[name]
