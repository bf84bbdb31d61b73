"""attach_sapo: one call between making a trainer and ``trainer.train()``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .callback import SapoCallback
from .choice import Choice
from .collator import CARRIED, COLUMNS, SapoCollator, named_example
from .config import SapoConfig
from .prompt_pool import PromptPool
from .records import write_beside_adapter
from .rescoring import Rescorer


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
            examples: "input" and "target" (or "sentence"/"label", "prompt"/"completion"), and "task" where there are
            several.
        pools: the candidates of each task.
        probe: examples to score on, or such a list for each task; default: the first ``config.probe_examples`` of
            each task in the training dataset.
        config: `SapoConfig`.

    Returns:
        The callback that was added: its `choice`, `history` and `prompts()` tell what happened.

    The trainer gets the collator, keeps its raw columns (``remove_unused_columns``), renders a batch again if the
    choice changed after it was fetched, and writes ``sapo_prompts.json`` wherever it saves the model. Model, optimizer
    and launch are not touched.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what was got; the trainer is as it was.
    """
    config = config or SapoConfig()
    named = _by_task(pools)
    tokenizer = getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None:
        raise ValueError("trainer: wanted one made with processing_class=tokenizer, got none")
    _check_trainer(trainer)
    named = {task: pool.checked(tokenizer) for task, pool in named.items()}
    choice = Choice(named, config.mode, config.seed)
    layout = {"max_source": config.max_source, "max_target": config.max_target, "template": config.template}
    training = SapoCollator(tokenizer, choice, carry=True, **layout)
    _check_tasks(trainer.train_dataset, choice)
    probes = _probes(trainer, choice, probe, config) if config.scores else {}
    rescorer = Rescorer(choice, probes, tokenizer, config) if config.scores else None

    # Nothing of the trainer has been changed up to here.
    callback = SapoCallback(trainer, choice, rescorer, config)
    trainer.args.remove_unused_columns = False
    trainer.data_collator = SapoCollator(tokenizer, choice, sample=False, **layout)
    trainer.add_callback(callback)
    _wrap(trainer, training, callback)
    return callback


def _by_task(pools) -> dict[str, PromptPool]:
    if isinstance(pools, PromptPool):
        pools = [pools]
    values = list(pools.values() if isinstance(pools, Mapping) else pools)
    if not values or not all(isinstance(pool, PromptPool) for pool in values):
        kinds = sorted({type(pool).__name__ for pool in values})
        raise ValueError(f"pools: wanted at least one PromptPool, got {type(pools).__name__} of {kinds}")
    named = dict(pools) if isinstance(pools, Mapping) else {pool.task: pool for pool in values}
    if len(named) != len(values):
        raise ValueError("pools: wanted tasks with different names, got a name twice")
    return named


def _check_trainer(trainer: Any) -> None:
    args = trainer.args
    for option in ("packing", "padding_free"):
        if getattr(args, option, False):
            raise ValueError(
                f"trainer: {option}=True joins examples that were tokenised ahead with one fixed prompt; wanted it off"
            )
    # Of TRL; None means: on the completion if there is one.
    if getattr(args, "completion_only_loss", None) is False:
        raise ValueError("trainer: completion_only_loss=False asks for a loss on the prompt too; wanted it on or unset")
    dataset = trainer.train_dataset
    if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"trainer: wanted a train_dataset with a length, got {type(dataset).__name__}")
    if not len(dataset):
        raise ValueError("trainer: wanted a train_dataset with examples, got an empty one")
    first = dataset[0]
    # TRL keeps the texts beside the tokens, and has put its end token behind them.
    raw = isinstance(first, Mapping) and any(all(name in first for name in names) for names in COLUMNS)
    if not raw or "input_ids" in first:
        got = sorted(map(str, first))[:20] if isinstance(first, Mapping) else type(first).__name__
        raise ValueError(
            f"trainer: train_dataset: wanted raw examples with {' or '.join('/'.join(names) for names in COLUMNS)}, "
            f"got {got}; for TRL's SFTTrainer pass dataset_kwargs={{'skip_prepare_dataset': True}}"
        )
    # Whether the texts are texts.
    named_example(first)
    for name in ("get_batch_samples", "get_train_dataloader", "save_model"):
        if not callable(getattr(trainer, name, None)):
            raise TypeError(f"trainer: wanted a transformers Trainer with {name}(), got {type(trainer).__name__}")
    if isinstance(getattr(trainer, "data_collator", None), SapoCollator):
        raise ValueError("trainer: wanted one without SAPO, got one that it is attached to already")


def _check_tasks(dataset: Any, choice: Choice) -> None:
    """Every task of the dataset where that costs little, else the first example's; the collator sees the others."""
    if isinstance(dataset, (list, tuple)):
        rows = dataset
    elif "task" in (getattr(dataset, "column_names", None) or ()) and hasattr(dataset, "unique"):
        rows = [{"task": task} for task in dataset.unique("task")]
    else:
        rows = [dataset[0]]
    for row in rows:
        choice.task_of(row)


def _probes(trainer, choice: Choice, probe, config: SapoConfig) -> dict[str, list]:
    """The probe of each task, checked to be there."""
    if isinstance(probe, Mapping):
        unknown = sorted(map(str, set(probe) - set(choice.tasks)))
        if unknown:
            raise ValueError(f"probe: wanted tasks among {choice.tasks[:20]}, got {unknown[:20]}")
        probes = {task: list(probe.get(task, ())) for task in choice.tasks}
    else:
        probes = {task: [] for task in choice.tasks}
        source = trainer.train_dataset if probe is None else probe
        limit = config.probe_examples if probe is None else len(source)
        for i in range(len(source)):
            example = source[i]
            task = choice.task_of(example)
            if len(probes[task]) < limit:
                probes[task].append(example)
            if all(len(found) >= limit for found in probes.values()):
                break
    for task, found in probes.items():
        if not found:
            raise ValueError(f"probe: task {task!r}: wanted at least one example to score on, got none")
    return {task: [named_example(one) for one in found] for task, found in probes.items()}


class _Newest:
    """The batches of an iterator, each rendered again if its choice is no longer the newest."""

    def __init__(self, batches, collator: SapoCollator):
        self.batches, self.collator = batches, collator

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.batches)
        return self.collator.refreshed(batch) if CARRIED in batch else batch


def _wrap(trainer: Any, training: SapoCollator, callback: SapoCallback) -> None:
    """Three methods of this one trainer: its training loader, its fetching of a step's batches, its saving.

    They do not hold the trainer, which holds them: it is freed when its last user lets go of it, not by the cycle
    collector, which would free the queues of persistent workers before the workers are told to end.
    """
    this = weakref.ref(trainer)
    make_loader = _method(trainer, "get_train_dataloader")
    fetch, save = _method(trainer, "get_batch_samples"), _method(trainer, "save_model")

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
        return fetch(this(), _Newest(epoch_iterator, training), *args, **kwargs)

    def save_model(output_dir=None, *args, **kwargs):
        trainer = this()
        result = save(trainer, output_dir, *args, **kwargs)
        if trainer.args.should_save:
            write_beside_adapter(output_dir or trainer.args.output_dir, callback.prompts())
        return result

    trainer.get_train_dataloader, trainer.get_batch_samples = get_train_dataloader, get_batch_samples
    trainer.save_model = save_model


def _method(trainer: Any, name: str) -> Callable:
    """A method of the trainer as a function of the trainer; one that was put on this very object stays as it is."""
    method = getattr(trainer, name)
    if getattr(method, "__self__", None) is trainer:
        return method.__func__
    return lambda _, *args, **kwargs: method(*args, **kwargs)
