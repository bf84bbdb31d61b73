"""A step of a trainer with SAPO: its batch under the newest choice, then its loss over a trie or over padded rows."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch

from sapo_kernels.files import DataError
from sapo_kernels.scoring import model_support
from sapo_kernels.scoring.attention import NotTreeable
from sapo_kernels.training.agreement import disagreement, refusal
from sapo_kernels.training.over_trie import OverTrie
from sapo_kernels.training.tree_logprobs import logprobs_of, use_tree_attention
from sapo_kernels.training.trie_batch import TrieBatch

from . import ranks as _ranks
from .callback import SapoCallback
from .checkpoints import checkpoint_fault
from .collator import CARRIED, PACKED, SapoCollator
from .records import write_beside_adapter

logger = logging.getLogger("sapo_peft")

METHODS = ("train", "get_train_dataloader", "get_batch_samples", "training_step", "compute_loss", "prediction_step",
           "save_model", "create_model_card")  # fmt: skip


def wrap(trainer: Any, training: SapoCollator, callback: SapoCallback) -> None:
    """Make this one trainer an `_Attached` of its class."""
    kind = type(trainer)
    # What somebody has put on this very object in the place of a method stays behind ours.
    own = {name: staticmethod(vars(trainer).pop(name)) for name in METHODS if name in vars(trainer)}
    trainer.__class__ = type(kind.__name__, (_Attached, type("Own", (), own), kind), {"__module__": kind.__module__})
    trainer._sapo, trainer._sapo_collator = callback, training
    callback.packing = Packing(callback.config.packing, callback.config.train_max_tokens)


class _Attached:
    """The methods of a trainer that SAPO stands in front of, in the order in which a run calls them."""

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        # Before anything is loaded from it.
        named = isinstance(resume_from_checkpoint, (str, os.PathLike))
        if named and (fault := checkpoint_fault(resume_from_checkpoint)):
            raise DataError(f"checkpoint: {fault}")
        self._sapo.packing.begin_anew()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self, *args, **kwargs):
        kept, self.data_collator = self.data_collator, self._sapo_collator
        try:
            return super().get_train_dataloader(*args, **kwargs)
        finally:
            self.data_collator = kept

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        # A run that was killed after its last checkpoint is complete; the trainer would make a step more.
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(self._newest(epoch_iterator), *args, **kwargs)

    def _newest(self, batches) -> Iterator[dict[str, Any]]:
        """Each batch under the choice that is in force now, without what it carries."""
        for batch in batches:
            if CARRIED not in batch:
                got = sorted(map(str, batch))[:20]
                raise ValueError(f"trainer: expected batches of its data_collator, got one made without it: {got}")
            with self._sapo.timed():
                batch = self._sapo_collator.newest(batch)
                self._sapo.fetched(batch.pop(CARRIED).counts)
            yield batch

    def training_step(self, model, inputs, *args, **kwargs):
        loss = self._sapo.packing.train(self, super().training_step, model, inputs, *args, **kwargs)
        self._sapo.trained.loss = self._sapo.trained.loss + loss.detach().float()
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        step = super().prediction_step
        return self._sapo.packing.evaluate(step, model, inputs, prediction_loss_only, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        # A `training_step` that was put in front of this one may leave the trie where it is.
        inputs = {name: value for name, value in inputs.items() if name != PACKED}
        return super().compute_loss(self._sapo.packing.over(model, inputs.get("labels")), inputs, *args, **kwargs)

    def save_model(self, output_dir=None, *args, **kwargs):
        self._sapo.check_finite()
        # A checkpoint's model is saved before its state is.
        self._sapo.keep()
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:
            write_beside_adapter(output_dir or self.args.output_dir, self._sapo.prompts())

    def create_model_card(self, *args, **kwargs):
        # Written anew, with nothing of what was there.
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            write_beside_adapter(self.args.output_dir, self._sapo.prompts())


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
        self.agreed: bool | None = False if self.mode == "padded" else None
        self.longest = 0
        # Of this run: computed over tries, and in padded rows.
        self.tokens, self.padded_tokens = 0, 0

    def train(self, trainer: Any, step, model, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        """`step` (the trainer's own ``training_step``) over the trie of the batch, or over its rows as they are."""
        inputs = dict(inputs)
        batch: TrieBatch | None = inputs.pop(PACKED, None)
        first = self.agreed is None
        if batch is None or not self._takes(trainer, model, batch):
            return step(model, inputs, *args, **kwargs)
        inner = model_support.unwrap(model)[1]
        losses, parts = [], self._parts(inputs, batch, inner)
        try:
            with use_tree_attention(inner):
                for i, (rows, part) in enumerate(parts):
                    # Gradients of all parts but the last stay on their rank.
                    waits = i + 1 < len(parts)
                    together = trainer.accelerator.no_sync(model) if waits else contextlib.nullcontext()
                    with together, self._run(part, len(batch.target_of)):
                        losses.append(step(model, rows, *args, **kwargs))
                    self.tokens += part.num_tokens
        except NotTreeable as error:
            # Its ``compute_loss`` wants more than a loss: known before anything went backward.
            if not first:
                raise
            self._settle(trainer, str(error))
            return step(model, inputs, *args, **kwargs)
        self.padded_tokens += inputs["input_ids"].numel()
        return torch.stack(losses).sum()

    def evaluate(self, step, model, inputs: dict[str, Any], loss_only: bool, *args, **kwargs):
        """`step` (the trainer's own ``prediction_step``), over the trie if no more than the loss is asked for."""
        inputs = dict(inputs)
        batch: TrieBatch | None = inputs.pop(PACKED, None)
        if batch is None or not self.agreed or not loss_only or batch.longest > self.longest:
            return step(model, inputs, loss_only, *args, **kwargs)
        with use_tree_attention(model_support.unwrap(model)[1]), self._run(batch, len(batch.target_of)):
            return step(model, inputs, loss_only, *args, **kwargs)

    def over(self, model: Any, labels: torch.Tensor | None) -> Any:
        """What a trainer's ``compute_loss`` is to call in the place of `model`, for the batch with these labels."""
        if self._now is None:
            return model
        batch, count = self._now
        return OverTrie(model, batch, labels, count, verify=False)

    def saved(self) -> str:
        """What the trie saved so far, to be put behind a sentence; nothing where it was not taken."""
        if not self.tokens:
            return ""
        return f"; trained on {self.tokens:,} tokens of tries for {self.padded_tokens:,} of padded rows"

    @contextlib.contextmanager
    def _run(self, batch: TrieBatch, count: int) -> Iterator[None]:
        self._now = batch, count
        try:
            yield
        finally:
            self._now = None

    def _takes(self, trainer: Any, model, batch: TrieBatch) -> bool:
        """Whether this batch goes over its trie; the first one of a run decides for all, but for longer ones."""
        if self.agreed is None:
            self._settle(trainer, self._reason(trainer, model, batch))
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
                return f"{name} looks at whole batches"
        if args.n_gpu > 1:
            return "nn.DataParallel cuts batches into rows"
        if trainer.compute_loss_func is not None:
            return "compute_loss_func wants the logits of whole batches"
        try:
            outer, inner = model_support.unwrap(model)
        except (TypeError, ValueError) as error:  # virtual tokens, a model that is none of transformers'
            return str(error)
        model.train()
        with torch.enable_grad():
            found = refusal(outer, inner, batch.longest)
            # Each rank runs the same forwards, whatever it finds.
            return found or disagreement(outer, inner, batch, lambda part: logprobs_of(outer, inner, part))

    def _settle(self, trainer: Any, reason: str | None) -> None:
        """Take the trie if every rank can; else one line in the log says why not."""
        reasons = [other for other in (reason, *_ranks.gathered(reason)) if other]
        self.agreed = not reasons
        if reasons and self.mode == "trie":
            raise RuntimeError(f"packing='trie': {reasons[0]}")
        if reasons and trainer.is_world_process_zero():
            logger.warning("batches are padded, not packed into a trie: %s", reasons[0])

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
