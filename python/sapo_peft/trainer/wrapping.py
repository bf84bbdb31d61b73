"""The methods of one trainer that SAPO puts itself around."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .checkpoints import check_resumed
from .collator import CARRIED, PACKED, SapoCollator
from .records import write_beside_adapter

if TYPE_CHECKING:
    from .callback import SapoCallback


class _Newest:
    """The batches of an iterator, each rendered again if its choice is no longer the newest."""

    def __init__(self, batches, collator: SapoCollator, callback: SapoCallback):
        self.batches, self.collator, self.callback = batches, collator, callback

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.batches)
        if CARRIED not in batch:
            return batch
        with self.callback.timed():
            batch, counts = self.collator.newest(batch)
            self.callback.fetched(counts)
        return batch


def wrap(trainer: Any, training: SapoCollator, callback: SapoCallback) -> None:
    """Its training loader, its fetching of a step's batches, its saving, its model card, and with drift its step.

    They do not hold the trainer, which holds them: it is freed when its last user lets go of it, not by the cycle
    collector, which would free the queues of persistent workers before the workers are told to end.
    """
    this = weakref.ref(trainer)
    make_loader = _method(trainer, "get_train_dataloader")
    fetch, save = _method(trainer, "get_batch_samples"), _method(trainer, "save_model")
    step, make_card = _method(trainer, "training_step"), _method(trainer, "create_model_card")
    evaluate, compute = _method(trainer, "prediction_step"), _method(trainer, "compute_loss")
    begin, packing = _method(trainer, "train"), callback.packing

    def train(resume_from_checkpoint=None, *args, **kwargs):
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            check_resumed(resume_from_checkpoint)
        return begin(this(), resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(*args, **kwargs):
        trainer = this()
        kept, trainer.data_collator = trainer.data_collator, training
        try:
            return make_loader(trainer, *args, **kwargs)
        finally:
            trainer.data_collator = kept

    def get_batch_samples(epoch_iterator, *args, **kwargs):
        # A run that was killed after its last checkpoint is complete; the trainer would make a step more.
        if this().control.should_training_stop:
            return [], None
        return fetch(this(), _Newest(epoch_iterator, training, callback), *args, **kwargs)

    def training_step(model, inputs, *args, **kwargs):
        loss = packing.train(this(), step, model, inputs, *args, **kwargs)
        if callback.config.drift is not None:
            callback.trained.loss = callback.trained.loss + loss.detach().float()
        return loss

    def prediction_step(model, inputs, prediction_loss_only, *args, **kwargs):
        return packing.evaluate(this(), evaluate, model, inputs, prediction_loss_only, *args, **kwargs)

    def compute_loss(model, inputs, *args, **kwargs):
        # A `training_step` that was put in front of this one may leave the trie where it is.
        inputs = {name: value for name, value in inputs.items() if name != PACKED}
        return compute(this(), packing.over(model, inputs.get("labels")), inputs, *args, **kwargs)

    def save_model(output_dir=None, *args, **kwargs):
        trainer = this()
        callback.check_finite()
        # A checkpoint's model is saved before its state is.
        callback.keep()
        result = save(trainer, output_dir, *args, **kwargs)
        if trainer.args.should_save:
            write_beside_adapter(output_dir or trainer.args.output_dir, callback.prompts())
        return result

    def create_model_card(*args, **kwargs):
        # Written anew, with nothing of what was there.
        trainer = this()
        result = make_card(trainer, *args, **kwargs)
        if trainer.is_world_process_zero():
            write_beside_adapter(trainer.args.output_dir, callback.prompts())
        return result

    trainer.train = train
    trainer.get_train_dataloader, trainer.get_batch_samples = get_train_dataloader, get_batch_samples
    trainer.save_model, trainer.create_model_card = save_model, create_model_card
    trainer.training_step, trainer.prediction_step, trainer.compute_loss = training_step, prediction_step, compute_loss


def _method(trainer: Any, name: str) -> Callable:
    """A method of the trainer as a function of the trainer; one that was put on this very object stays as it is."""
    method = getattr(trainer, name)
    if getattr(method, "__self__", None) is trainer:
        return method.__func__
    return lambda _, *args, **kwargs: method(*args, **kwargs)
