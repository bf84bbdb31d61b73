"""attach_sapo: one call between making a trainer and ``trainer.train()``."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sapo_kernels.files import DataError
from sapo_kernels.scoring.distributed import DEFAULT_TIMEOUT
from sapo_kernels.scoring.render import STARTED, check_examples, with_end_token
from sapo_kernels.scoring.turns import COLUMNS

from ..data.prompt_pool import PromptPool
from . import ranks as _ranks
from .callback import SapoCallback
from .checkpoints import checkpoint_fault
from .choice import Choice
from .collator import SapoCollator
from .config import SapoConfig
from .records import excerpt_line, write_beside_adapter
from .rescoring import Rescorer
from .run_state import alike

logger = logging.getLogger("sapo_peft")

# Rows of a dataset that are looked at when attaching: a second or two.
MOST_CHECKED = 50_000


def attach_sapo(
    trainer: Any,
    pools: PromptPool | Sequence[PromptPool] | Mapping[str, PromptPool],
    probe: Sequence[Mapping[str, str]] | Mapping[str, Sequence[Mapping[str, str]]] | None = None,
    config: SapoConfig | None = None,
) -> SapoCallback:
    """Make a trainer train each task on the prompt with the lowest loss under the model's current state.

    Use::

        trainer = Trainer(model, args, train_dataset=examples, processing_class=tokenizer)
        attach_sapo(trainer, pool)
        trainer.train()

    Args:
        trainer: a transformers `Trainer` or TRL `SFTTrainer` that was made with a tokenizer and a dataset of raw
            examples: "input" and "target" (or "sentence"/"label", "prompt"/"completion", "messages"), and "task" where
            there are several.
        pools: the candidates of each task.
        probe: examples to score on, or such a list for each task; default: the first ``config.probe_examples`` of
            each task in the training dataset.
        config: `SapoConfig`.

    Returns:
        The callback that was added: its `choice`, `history` and `prompts()` tell what happened.

    The trainer gets the collator, keeps its raw columns (``remove_unused_columns``), renders a batch again if the
    choice changed after it was fetched, and writes ``sapo_prompts.json`` wherever it saves the model. Model, optimizer
    and launch are not touched. Every switch is one line on stdout, or in the log of "sapo_peft" where that is shown at
    level INFO; with that logger at a higher level there is none.

    With several processes each calls this, with the same arguments.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was got; the trainer is as it was.
    """
    config = SapoConfig() if config is None else config
    if not isinstance(config, SapoConfig):
        raise TypeError(f"config: expected a SapoConfig, got {type(config).__name__}")
    _check_trainer(trainer, config)
    tokenizer = with_end_token(_tokenizer(trainer), trainer.model)
    named = {task: _checked(task, pool, tokenizer, trainer) for task, pool in _by_task(pools).items()}
    choice = Choice(named, config.mode, config.seed)
    _check_dataset(trainer.train_dataset, "train_dataset", choice)
    _check_evaluation(getattr(trainer, "eval_dataset", None), choice)
    collator = SapoCollator(
        tokenizer, choice, max_source=config.max_source, max_target=config.train_max_target, template=config.template,
        instruction_role=config.instruction_role, carry=True,
    )  # fmt: skip
    rescorer = None
    if config.scores:
        timeout = float(getattr(trainer.args, "ddp_timeout", 0) or DEFAULT_TIMEOUT)
        rescorer = Rescorer(choice, _probes(trainer, choice, probe, config), tokenizer, config, timeout)
    callback = SapoCallback(trainer, collator, rescorer, config, _ranks.first_of(config.now or STARTED))
    _ranks.check_same(alike(choice.tasks, callback.setup))

    # Nothing of the trainer has been changed up to here.
    trainer.args.remove_unused_columns = False
    # The same renderers, hence the same date.
    trainer.data_collator = copy.copy(collator)
    trainer.data_collator.carry = trainer.data_collator.sample = False
    trainer.add_callback(callback)
    kind, trainer._sapo = type(trainer), callback
    # What somebody has put on this very object in the place of a method stays behind ours.
    own = {name: staticmethod(vars(trainer).pop(name)) for name in METHODS if name in vars(trainer)}
    # Still what a method of its class takes it for that says super(self.__class__, self).
    shown = {"__module__": kind.__module__, "__class__": property(lambda self: kind)}
    trainer.__class__ = type(kind.__name__, (_Attached, type("Own", (), own), kind), shown)
    return callback


class _Attached:
    """The methods of a trainer that SAPO overrides, in the order in which a run calls them."""

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        # Before anything is loaded from it.
        named = isinstance(resume_from_checkpoint, (str, os.PathLike))
        if named and (fault := checkpoint_fault(resume_from_checkpoint)):
            raise DataError(f"checkpoint: {fault}")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self, *args, **kwargs):
        kept, self.data_collator = self.data_collator, self._sapo.collator
        try:
            return super().get_train_dataloader(*args, **kwargs)
        finally:
            self.data_collator = kept

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        # A run that was killed after its last checkpoint is complete; the trainer would make a step more.
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(map(self._sapo.newest, epoch_iterator), *args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        packing, losses = self._sapo.packing, []
        forwards = packing.forwards(self, model, inputs)
        for i, (rows, forward) in enumerate(forwards):
            # Gradients of all forwards but the last stay on their rank.
            waits = i + 1 < len(forwards)
            together = self.accelerator.no_sync(model) if waits else contextlib.nullcontext()
            with together, packing.running(model, forward):
                losses.append(super().training_step(model, rows, *args, **kwargs))
        loss = sum(losses)
        self._sapo.trained.loss = self._sapo.trained.loss + loss.detach().float()
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        packing = self._sapo.packing
        with packing.running(model, packing.evaluated(model, inputs, prediction_loss_only)):
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        def plain(trainer):
            return super(_Attached, trainer).compute_loss  # noqa: UP008 (perhaps of a copy)

        return self._sapo.packing.loss(self, plain, model, inputs, args, kwargs)

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

    def __reduce_ex__(self, protocol):
        raise TypeError("trainer: expected one without SAPO to copy or pickle; attach_sapo to the copy instead")


# Those of `_Attached` that every trainer must have.
METHODS = [name for name in vars(_Attached) if not name.startswith("_")]


def _tokenizer(trainer: Any) -> Any:
    """The trainer's tokenizer, with the chat template of the processor that it is a part of."""
    whole = getattr(trainer, "processing_class", None)
    tokenizer = getattr(whole, "tokenizer", whole)
    if tokenizer is None:
        raise ValueError("trainer: expected one made with processing_class=tokenizer, got none")
    template = getattr(whole, "chat_template", None)
    if tokenizer is not whole and template and template != getattr(tokenizer, "chat_template", None):
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def _checked(task: str, pool: PromptPool, tokenizer: Any, trainer: Any) -> PromptPool:
    """The pool by the rules of this tokenizer; a line in the log names each prompt that it rules out."""
    checked = pool.checked(tokenizer)
    if trainer.is_world_process_zero():
        for lost in checked.rejected[len(pool.rejected) :]:
            logger.warning(
                "task %s: a prompt is left out with this tokenizer: %s: %s", excerpt_line(task), lost.reason,
                excerpt_line(lost.text),
            )  # fmt: skip
    return checked


def _by_task(pools) -> dict[str, PromptPool]:
    if isinstance(pools, PromptPool):
        pools = [pools]
    if not isinstance(pools, (Mapping, Sequence)):
        raise TypeError(f"pools: expected a PromptPool, a list of them or one by task, got {type(pools).__name__}")
    values = list(pools.values() if isinstance(pools, Mapping) else pools)
    if not values or not all(isinstance(pool, PromptPool) for pool in values):
        kinds = sorted({type(pool).__name__ for pool in values})
        raise ValueError(f"pools: expected at least one PromptPool, got {type(pools).__name__} of {kinds}")
    named = dict(pools) if isinstance(pools, Mapping) else {pool.task: pool for pool in values}
    if len(named) != len(values):
        raise ValueError("pools: expected tasks with different names, got a name twice")
    return named


def _check_trainer(trainer: Any, config: SapoConfig) -> None:
    args = trainer.args
    for name in METHODS:
        if not callable(getattr(trainer, name, None)):
            raise TypeError(f"trainer: expected a transformers Trainer with {name}(), got {type(trainer).__name__}")
    if isinstance(trainer.data_collator, SapoCollator):
        raise ValueError("trainer: expected one without SAPO, got one that it is attached to already")
    for option in ("packing", "padding_free"):
        if getattr(args, option, False):
            raise ValueError(
                f"trainer: {option}=True joins examples tokenised ahead with one fixed prompt; expected it off"
            )
    _check_sampling(trainer)
    # Of TRL; None means: on the completion if there is one.
    if getattr(args, "completion_only_loss", None) is False:
        raise ValueError("trainer: completion_only_loss=False asks for a loss on the prompt; expected it on or unset")
    if args.accelerator_config.dispatch_batches:
        # A rank would be sent its rows of the tensors, but not of what they are rendered again from.
        raise ValueError(
            "trainer: accelerator_config: dispatch_batches=True cannot be combined with SAPO; expected it off"
        )
    if config.drift is not None and args.logging_strategy == "no":
        raise ValueError("config: drift is seen in the losses that are logged; expected a logging_strategy, got 'no'")


def _check_sampling(trainer: Any) -> None:
    """Samplers by length look at tokens, which raw examples have not; or at a column of a dataset of Hugging Face."""
    args = trainer.args
    strategy = "group_by_length" if getattr(args, "group_by_length", False) else None
    strategy = strategy or getattr(args, "train_sampling_strategy", "random")
    column, evaluation = getattr(args, "length_column_name", "length"), getattr(trainer, "eval_dataset", None)
    datasets = [trainer.train_dataset, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]
    if strategy in ("group_by_length", "batch_rebalance") and not all(
        one is None or column in (getattr(one, "column_names", None) or ()) for one in datasets
    ):
        raise ValueError(
            f"trainer: train_sampling_strategy={strategy!r} needs the length of every example, which is not tokenised "
            f"ahead: expected datasets.Dataset with a column {column!r} (say, of characters), or 'random'"
        )


def _check_dataset(dataset: Any, name: str, choice: Choice) -> None:
    """It has examples, and they are texts of known tasks: the collator would find that out in the middle of the run.

    Of a dataset whose rows are made when they are read only the first one is looked at.
    """
    if not _indexed(dataset) or not len(dataset):
        raise ValueError(f"trainer: expected a {name} with examples and a length, got {type(dataset).__name__}")
    first = dataset[0]
    # TRL keeps the texts beside the tokens, and has put its end token behind them.
    if not isinstance(first, Mapping) or "input_ids" in first:
        got = sorted(map(str, first))[:20] if isinstance(first, Mapping) else type(first).__name__
        raise ValueError(
            f"trainer: {name}: expected raw examples with input/target, sentence/label, prompt/completion or messages, "
            f"got {got}; for TRL's SFTTrainer pass dataset_kwargs={{'skip_prepare_dataset': True}}"
        )
    rows = dataset if isinstance(dataset, (list, tuple)) else [first]
    # Of datasets of Hugging Face, without images and their like; a transform of the user's makes other rows.
    if hasattr(dataset, "select_columns") and dataset.format["type"] != "custom":
        rows = dataset.select_columns([name for name in dataset.column_names if name in {"task", *COLUMNS}])
    for i, row in enumerate(itertools.islice(rows, MOST_CHECKED)):
        try:
            choice.task_of(row)
            check_examples([row])
        except (ValueError, TypeError) as error:
            said = str(error).removeprefix("example 0: ")
            raise type(error)(f"trainer: {name}: row {i}: {said}") from None


def _indexed(found: Any) -> bool:
    return hasattr(found, "__len__") and hasattr(found, "__getitem__")


def _check_evaluation(found: Any, choice: Choice) -> None:
    """Each evaluation dataset that can be looked into: else the first evaluation would end the run."""
    several = isinstance(found, dict)
    for name, dataset in found.items() if several else [("", found)]:
        if _indexed(dataset) and len(dataset):
            _check_dataset(dataset, f"eval_dataset[{name!r}]" if several else "eval_dataset", choice)


def _probes(trainer: Any, choice: Choice, probe: Any, config: SapoConfig) -> dict[str, list]:
    """The probe of each task, checked to be there."""
    if isinstance(probe, Mapping):
        unknown = sorted(map(str, set(probe) - set(choice.tasks)))
        if unknown:
            raise ValueError(f"probe: expected tasks among {choice.tasks[:20]}, got {unknown[:20]}")
        for task, found in probe.items():
            if isinstance(found, str) or not _indexed(found):
                raise TypeError(f"probe: task {task!r}: expected a list of examples, got {type(found).__name__}")
        probes = {task: probe.get(task, ()) for task in choice.tasks}
    elif isinstance(probe, str) or not (probe is None or _indexed(probe)):
        raise TypeError(f"probe: expected a list of examples, or one by task, got {type(probe).__name__}")
    else:
        source = trainer.train_dataset if probe is None else probe
        limit = config.probe_examples if probe is None else len(source)
        probes = {task: [] for task in choice.tasks}
        for i in range(len(source)):
            found = probes[choice.task_of(source[i])]
            if len(found) < limit:
                found.append(source[i])
            if all(len(found) >= limit for found in probes.values()):
                break
    for task, found in probes.items():
        if not len(found):
            raise ValueError(f"probe: task {task!r}: expected at least one example to score on, got none")
    return {task: check_examples(found) for task, found in probes.items()}
