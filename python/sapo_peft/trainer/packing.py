"""Training over a trie: a trainer's own loss, computed with the tokens that the rows of a batch share once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from sapo_kernels.scoring import model_support
from sapo_kernels.scoring.attention import NotTreeable
from sapo_kernels.training.agreement import disagreement, refusal
from sapo_kernels.training.over_trie import OverTrie
from sapo_kernels.training.tree_logprobs import logprobs_of, use_tree_attention
from sapo_kernels.training.trie_batch import TrieBatch

from . import ranks as _ranks
from .collator import PACKED
from .config import PADDED, TRIE

logger = logging.getLogger("sapo_peft")


class Packing:
    """Whether the batches of one trainer go over a trie, and the batch that does so now.

    mode: as in `SapoConfig`. max_tokens: of one forward; a batch with more goes in parts.
    """

    def __init__(self, mode: str, max_tokens: int | None):
        self.mode, self.max_tokens = mode, max_tokens
        self._now: tuple[TrieBatch, int] | None = None
        self.begin_anew()

    def begin_anew(self) -> None:
        """Nothing is known of the model."""
        self.agreed: bool | None = False if self.mode == PADDED else None
        self.longest = 0
        # Of this run: computed over tries, and in padded rows.
        self.tokens, self.padded_tokens = 0, 0

    def train(self, trainer: Any, step, model, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        """`step` (the trainer's own ``training_step``) over the trie of the batch, or over its rows as they are."""
        inputs = dict(inputs)
        batch: TrieBatch | None = inputs.pop(PACKED, None)
        if batch is None or self.agreed is False:
            return step(trainer, model, inputs, *args, **kwargs)
        try:
            inner = model_support.unwrap(model)[1]
        except (TypeError, ValueError) as error:  # virtual tokens, a model that is none of transformers'
            self._settle(trainer, str(error))
            return step(trainer, model, inputs, *args, **kwargs)
        first = self.agreed is None
        if first:
            self._settle(trainer, self._reason(trainer, model, inner, batch))
        if self.agreed and batch.longest > self.longest:
            self._allow(inner, batch.longest)
        if not self.agreed or batch.longest > self.longest:
            return step(trainer, model, inputs, *args, **kwargs)
        try:
            total = self._over_parts(trainer, step, model, inputs, batch, inner, *args, **kwargs)
        except NotTreeable as error:
            # Its ``compute_loss`` wants more than a loss: known before anything went backward.
            if not first:
                raise
            self._settle(trainer, str(error))
            return step(trainer, model, inputs, *args, **kwargs)
        self.padded_tokens += inputs["input_ids"].numel()
        return total

    def _over_parts(self, trainer, step, model, inputs, batch: TrieBatch, inner, *args, **kwargs) -> torch.Tensor:
        losses, parts = [], self._parts(inputs, batch, inner)
        with use_tree_attention(inner):
            for i, (rows, part) in enumerate(parts):
                # Gradients of all parts but the last stay on their rank.
                waits = i + 1 < len(parts)
                together = trainer.accelerator.no_sync(model) if waits else contextlib.nullcontext()
                with together, self._run(part, len(batch.target_of)):
                    losses.append(step(trainer, model, rows, *args, **kwargs))
                self.tokens += part.num_tokens
        return torch.stack(losses).sum()

    def evaluate(self, trainer: Any, step, model, inputs: dict[str, Any], loss_only: bool, *args, **kwargs):
        """`step` (the trainer's own ``prediction_step``), over the trie if no more than the loss is asked for."""
        inputs = dict(inputs)
        batch: TrieBatch | None = inputs.pop(PACKED, None)
        if batch is None or not self.agreed or not loss_only or batch.longest > self.longest:
            return step(trainer, model, inputs, loss_only, *args, **kwargs)
        with use_tree_attention(model_support.unwrap(model)[1]), self._run(batch, len(batch.target_of)):
            return step(trainer, model, inputs, loss_only, *args, **kwargs)

    def saved(self) -> str:
        """What the trie saved so far, to be put behind a sentence; nothing where it was not taken."""
        if not self.tokens:
            return ""
        return f"; trained on {self.tokens:,} tokens of tries for {self.padded_tokens:,} of padded rows"

    def over(self, model: Any, labels: torch.Tensor | None) -> Any:
        """What a trainer's ``compute_loss`` is to call in the place of `model`, for the batch with these labels."""
        if self._now is None:
            return model
        batch, count = self._now
        return OverTrie(model, batch, labels, count, verify=False)

    @contextlib.contextmanager
    def _run(self, batch: TrieBatch, count: int) -> Iterator[None]:
        self._now = batch, count
        try:
            yield
        finally:
            self._now = None

    def _reason(self, trainer: Any, model, inner, batch: TrieBatch) -> str | None:
        """Why the trainer's batches cannot go over a trie, or None."""
        args = trainer.args
        for name in ("label_smoothing_factor", "neftune_noise_alpha"):
            if getattr(args, name, None):
                return f"{name} looks at whole batches"
        if getattr(args, "n_gpu", 0) > 1:
            return "nn.DataParallel cuts batches into rows"
        if trainer.compute_loss_func is not None:
            return "compute_loss_func wants the logits of whole batches"
        outer = model_support.unwrap(model)[0]
        model.train()
        with torch.enable_grad():
            found = refusal(outer, inner, batch.longest)
            # Each rank runs the same forwards, whatever it finds.
            return found or disagreement(outer, inner, batch, lambda part: logprobs_of(outer, inner, part))

    def _allow(self, inner, longest: int) -> None:
        """Take sequences of that length too, if the model does nothing else with them."""
        if not (model_support.length_dependent(inner, longest) or model_support.too_long(inner, longest)):
            self.longest = longest

    def _settle(self, trainer: Any, reason: str | None) -> None:
        """Take the trie if every rank can; said once."""
        (others,), _ = _ranks.summed([float(reason is not None)], trainer.args.device)
        if reason is None and others:
            reason = "another rank cannot take it"
        self.agreed = reason is None
        if reason is not None and self.mode == TRIE:
            raise RuntimeError(f"packing='trie': {reason}")
        if reason is not None and trainer.is_world_process_zero():
            logger.warning("batches are padded, not packed into a trie: %s", reason)

    def _parts(self, inputs, batch: TrieBatch, inner) -> list[tuple[dict[str, Any], TrieBatch]]:
        """The batch in pieces of at most `max_tokens`, each with its rows; whole where ranks wait for each forward."""
        whole = self.max_tokens is None or batch.num_tokens <= self.max_tokens
        if whole or any(hasattr(p, "to_local") for p in inner.parameters()):
            return [(inputs, batch)]
        count, parts = len(inputs["input_ids"]), []
        for rows in batch.groups(self.max_tokens):
            index = torch.tensor(rows, device=inputs["input_ids"].device)
            some = {
                name: value[index] if isinstance(value, torch.Tensor) and value.shape[:1] == (count,) else value
                for name, value in inputs.items()
            }
            parts.append((some, TrieBatch.of_padded(some)))
        return parts
