"""Packing: the batches of a trainer as tries in the place of padded rows, where the model computes the same."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from sapo_kernels.scoring import model_support
from sapo_kernels.training.agreement import disagreement, refusal
from sapo_kernels.training.over_trie import OverTrie
from sapo_kernels.training.tree_logprobs import logprobs_of, use_tree_attention
from sapo_kernels.training.trie_batch import TrieBatch

from . import ranks as _ranks
from .collator import PACKED

logger = logging.getLogger("sapo_peft")
# One forward of a batch: its trie, or None where it stays padded, and the tokens of the loss in the whole batch.
Forward = tuple[TrieBatch | None, int]


class Packing:
    """Whether the batches of one trainer go over a trie, and the batch that does so now.

    mode: as in `SapoConfig`. max_tokens: of one forward; a batch with more goes in parts.
    """

    def __init__(self, mode: str, max_tokens: int | None):
        self.mode, self.max_tokens = mode, max_tokens
        self._now: Forward = (None, 0)
        self.begin_anew()

    def begin_anew(self) -> None:
        """Nothing is known of the model."""
        self.agreed: bool | None = False if self.mode == "padded" else None
        self.longest = 0
        # Of this run: computed over tries, and in padded rows.
        self.tokens, self.padded_tokens = 0, 0

    def forwards(self, trainer: Any, model, inputs: dict[str, Any]) -> list[tuple[dict[str, Any], Forward]]:
        """The forwards of a batch that is trained on, each with its rows."""
        rows = dict(inputs)
        batch: TrieBatch | None = rows.pop(PACKED, None)
        if batch is None or not self._takes(trainer, model, batch):
            return [(rows, (None, 0))]
        made = self._cut(rows, batch, model_support.unwrap(model)[1])
        self.tokens += sum(trie.num_tokens for _, (trie, _) in made)
        self.padded_tokens += rows["input_ids"].numel()
        return made

    def evaluated(self, inputs: dict[str, Any], loss_only: bool) -> tuple[dict[str, Any], Forward]:
        """The forward of a batch that is evaluated: over its trie if no more than the loss is asked for."""
        rows = dict(inputs)
        batch: TrieBatch | None = rows.pop(PACKED, None)
        if batch is None or not self.agreed or not loss_only or batch.longest > self.longest:
            return rows, (None, 0)
        return rows, (batch, len(batch.target_of))

    @contextlib.contextmanager
    def running(self, model: Any, forward: Forward) -> Iterator[None]:
        """While `forward` runs, with its backward: the attention is that over tries, and `over` takes it."""
        if forward[0] is None:
            yield
            return
        self._now = forward
        try:
            with use_tree_attention(model_support.unwrap(model)[1]):
                yield
        finally:
            self._now = (None, 0)

    def over(self, model: Any, labels: torch.Tensor | None) -> Any:
        """What a trainer's ``compute_loss`` is to call in the place of `model`, for the batch with these labels."""
        batch, count = self._now
        return model if batch is None else OverTrie(model, batch, labels, count, verify=False)

    def saved(self) -> str:
        """What the trie saved so far, to be put behind a sentence; nothing where it was not taken."""
        if not self.tokens:
            return ""
        return f"; trained on {self.tokens:,} trie tokens instead of {self.padded_tokens:,} padded ones"

    def _takes(self, trainer: Any, model, batch: TrieBatch) -> bool:
        """Whether this batch goes over its trie; the first one of a run decides for all, but for longer ones."""
        if self.agreed is None:
            self.settle(trainer, self._reason(trainer, model, batch))
        if self.agreed and batch.longest > self.longest:
            # If the model does nothing else with sequences of that length.
            inner = model_support.unwrap(model)[1]
            if not (model_support.length_dependent(inner, batch.longest)
                    or model_support.too_long(inner, batch.longest)):  # fmt: skip
                self.longest = batch.longest
        return self.agreed and batch.longest <= self.longest

    def _reason(self, trainer: Any, model, batch: TrieBatch) -> str | None:
        """Why the trainer's batches cannot go over a trie, or None."""
        args = trainer.args
        for name in ("label_smoothing_factor", "neftune_noise_alpha"):
            if getattr(args, name, None):
                return f"{name} needs whole batches"
        if args.n_gpu > 1:
            return "nn.DataParallel cuts batches into rows"
        if trainer.compute_loss_func is not None:
            return "compute_loss_func needs the logits of whole batches"
        try:
            outer, inner = model_support.unwrap(model)
        except (TypeError, ValueError) as error:  # virtual tokens, a model that is none of transformers'
            return str(error)
        model.train()
        with torch.enable_grad():
            found = refusal(outer, inner, batch.longest)
            # Each rank runs the same forwards, whatever it finds.
            return found or disagreement(outer, inner, batch, lambda part: logprobs_of(outer, inner, part))

    def settle(self, trainer: Any, reason: str | None) -> None:
        """Take the trie if every rank can; else one line in the log says why not."""
        reasons = [other for other in (reason, *_ranks.gathered(reason)) if other]
        self.agreed = not reasons
        self.tokens = self.padded_tokens = 0
        if reasons and self.mode == "trie":
            raise RuntimeError(f"packing='trie': {reasons[0]}")
        if reasons and trainer.is_world_process_zero():
            logger.warning("batches are padded, not packed into tries: %s", reasons[0])

    def _cut(self, inputs, batch: TrieBatch, inner) -> list[tuple[dict[str, Any], Forward]]:
        """The batch in pieces of at most `max_tokens`, each with its rows; whole where ranks wait for each forward."""
        tokens, count = len(batch.target_of), len(inputs["input_ids"])
        whole = self.max_tokens is None or batch.num_tokens <= self.max_tokens
        if whole or any(hasattr(p, "to_local") for p in inner.parameters()):
            return [(inputs, (batch, tokens))]
        pieces = []
        for rows in batch.groups(self.max_tokens):
            index = torch.tensor(rows, device=inputs["input_ids"].device)
            some = {
                name: value[index] if isinstance(value, torch.Tensor) and value.shape[:1] == (count,) else value
                for name, value in inputs.items()
            }
            pieces.append((some, (TrieBatch.of_padded(some), tokens)))
        return pieces
