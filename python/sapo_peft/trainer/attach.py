"""attach_sapo: one call between making a trainer and ``trainer.train()``."""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sapo_kernels.scoring.distributed import DEFAULT_TIMEOUT
from sapo_kernels.scoring.render import STARTED, check_examples, with_end_token

from ..data.prompt_pool import PromptPool
from . import ranks as _ranks
from .callback import SapoCallback
from .choice import Choice
from .collator import COLUMNS, SapoCollator, named_example
from .config import PADDED, SapoConfig
from .records import excerpt_line
from .rescoring import Rescorer
from .run_state import Setup
from .wrapping import wrap

logger = logging.getLogger("sapo_peft")

# Rows of a dataset that are looked at when attaching: a second or two.
MOST_CHECKED = 200_000


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
        ValueError, TypeError: naming the argument, what was wanted and what was got; the trainer is as it was.
    """
    started = time.perf_counter()
    config = SapoConfig() if config is None else config
    if not isinstance(config, SapoConfig):
        raise TypeError(f"config: expected a SapoConfig, got {type(config).__name__}")
    named = _by_task(pools)
    tokenizer = _tokenizer(trainer)
    _check_trainer(trainer, config)
    tokenizer = with_end_token(tokenizer, trainer.model)
    _check_dataset(trainer.train_dataset, "train_dataset")
    named = {task: _checked(task, pool, tokenizer, trainer) for task, pool in named.items()}
    choice = Choice(named, config.mode, config.seed)
    layout = {"max_source": config.max_source, "max_target": config.train_max_target, "template": config.template,
              "packed": config.packing != PADDED, "instruction_role": config.instruction_role}  # fmt: skip
    training = SapoCollator(tokenizer, choice, carry=True, **layout)
    evaluation = SapoCollator(tokenizer, choice, sample=False, **layout)
    _check_rows(trainer.train_dataset, choice, "train_dataset")
    _check_evaluation(getattr(trainer, "eval_dataset", None), choice)
    probes = _probes(trainer, choice, probe, config) if config.scores else {}
    patience = float(getattr(trainer.args, "ddp_timeout", 0) or DEFAULT_TIMEOUT)
    now = _ranks.moment_of_first(config.now or STARTED, trainer.args.device)
    rescorer = Rescorer(choice, probes, tokenizer, config, patience, now) if config.scores else None
    setup = Setup(choice, [training, evaluation], rescorer, config, trainer, now)
    _ranks.check_same(setup.digests(), trainer.args.device)

    # Nothing of the trainer has been changed up to here.
    callback = SapoCallback(trainer, choice, rescorer, config, setup, time.perf_counter() - started)
    trainer.args.remove_unused_columns = False
    trainer.data_collator = evaluation
    trainer.add_callback(callback)
    wrap(trainer, training, callback)
    return callback


def _tokenizer(trainer: Any) -> Any:
    """The trainer's tokenizer, with the chat template of the processor that it is a part of."""
    whole = getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
    tokenizer = getattr(whole, "tokenizer", whole)
    if tokenizer is None:
        raise ValueError("trainer: expected one made with processing_class=tokenizer, got none")
    template = getattr(whole, "chat_template", None)
    if tokenizer is not whole and template and template != getattr(tokenizer, "chat_template", None):
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def _checked(task: str, pool: PromptPool, tokenizer: Any, trainer: Any) -> PromptPool:
    """The pool by the rules of this tokenizer; prompts that it loses by them are said."""
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
    if isinstance(pools, str) or not isinstance(pools, (Mapping, Sequence)):
        raise TypeError(f"pools: expected a PromptPool, a list of them or one by task, got {type(pools).__name__}")
    values = list(pools.values() if isinstance(pools, Mapping) else pools)
    if not values or not all(isinstance(pool, PromptPool) for pool in values):
        kinds = sorted({type(pool).__name__ for pool in values})
        raise ValueError(f"pools: expected at least one PromptPool, got {type(pools).__name__} of {kinds}")
    named = dict(pools) if isinstance(pools, Mapping) else {pool.task: pool for pool in values}
    if len(named) != len(values):
        raise ValueError("pools: expected tasks with different names, got a name twice")
    for task in named:
        if not isinstance(task, str):
            raise TypeError(f"pools: expected the names of tasks as strings, got {type(task).__name__} {task!r}")
    return named


def _check_trainer(trainer: Any, config: SapoConfig) -> None:
    args = trainer.args
    for option in ("packing", "padding_free"):
        if getattr(args, option, False):
            raise ValueError(
                f"trainer: {option}=True joins examples tokenised ahead with one fixed prompt; expected it off"
            )
    _check_sampling(trainer)
    # Of TRL; None means: on the completion if there is one.
    if getattr(args, "completion_only_loss", None) is False:
        raise ValueError("trainer: completion_only_loss=False asks for a loss on the prompt; expected it on or unset")
    if getattr(getattr(args, "accelerator_config", None), "dispatch_batches", None):
        # A rank would be sent its rows of the tensors, but not of what they are rendered again from.
        raise ValueError(
            "trainer: accelerator_config: dispatch_batches=True cannot be combined with SAPO; expected it off"
        )
    if config.drift is not None and getattr(args, "logging_strategy", None) == "no":
        raise ValueError("config: drift is seen in the losses that are logged; expected a logging_strategy, got 'no'")
    for name in ("get_batch_samples", "get_train_dataloader", "save_model", "training_step", "create_model_card",
                 "is_world_process_zero"):  # fmt: skip
        if not callable(getattr(trainer, name, None)):
            raise TypeError(f"trainer: expected a transformers Trainer with {name}(), got {type(trainer).__name__}")
    if isinstance(getattr(trainer, "data_collator", None), SapoCollator):
        raise ValueError("trainer: expected one without SAPO, got one that it is attached to already")


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


def _check_dataset(dataset: Any, name: str) -> None:
    """It has examples, and they are texts."""
    if not _indexed(dataset):
        raise ValueError(f"trainer: expected a {name} with a length, got {type(dataset).__name__}")
    if not len(dataset):
        raise ValueError(f"trainer: expected a {name} with examples, got an empty one")
    first = dataset[0]
    # TRL keeps the texts beside the tokens, and has put its end token behind them.
    raw = isinstance(first, Mapping) and any(all(name in first for name in names) for names in COLUMNS)
    if not raw or "input_ids" in first:
        got = sorted(map(str, first))[:20] if isinstance(first, Mapping) else type(first).__name__
        raise ValueError(
            f"trainer: {name}: expected raw examples with {' or '.join('/'.join(names) for names in COLUMNS)}, "
            f"got {got}; for TRL's SFTTrainer pass dataset_kwargs={{'skip_prepare_dataset': True}}"
        )
    # Whether the texts are texts.
    named_example(first)


def _indexed(found: Any) -> bool:
    return hasattr(found, "__len__") and hasattr(found, "__getitem__")


def _check_evaluation(found: Any, choice: Choice) -> None:
    """Each evaluation dataset that can be looked into: else the first evaluation would end the run."""
    named = {f"eval_dataset[{name!r}]": one for name, one in found.items()} if isinstance(found, dict) else {
        "eval_dataset": found}  # fmt: skip
    for name, dataset in named.items():
        if _indexed(dataset) and len(dataset):
            _check_dataset(dataset, name)
            _check_rows(dataset, choice, name)


def _check_rows(dataset: Any, choice: Choice, name: str) -> None:
    """Texts and tasks of the first `MOST_CHECKED` rows where rows cost little, else of the first one.

    The collator would find a bad row too, in the middle of the run.
    """
    for i, row in enumerate(itertools.islice(_rows(dataset), MOST_CHECKED)):
        try:
            choice.task_of(row)
            check_examples([named_example(row)])
        except (ValueError, TypeError) as error:
            raise type(error)(f"trainer: {name}: row {i}: {error}") from None


def _rows(dataset: Any) -> Iterable[Any]:
    if isinstance(dataset, (list, tuple)):
        return dataset
    # Of datasets of Hugging Face, whose columns are read in batches; a transform of the user's makes other rows.
    if hasattr(dataset, "select_columns") and getattr(dataset, "format", {}).get("type") != "custom":
        names = [name for name in dataset.column_names if name in {"task", "history", *itertools.chain(*COLUMNS)}]
        batches = dataset.select_columns(names).with_format(None).iter(1000)
        return (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
    return [dataset[0]]


def _probes(trainer, choice: Choice, probe, config: SapoConfig) -> dict[str, list]:
    """The probe of each task, checked to be there."""
    if isinstance(probe, Mapping):
        unknown = sorted(map(str, set(probe) - set(choice.tasks)))
        if unknown:
            raise ValueError(f"probe: expected tasks among {choice.tasks[:20]}, got {unknown[:20]}")
        for task, examples in probe.items():
            if isinstance(examples, str) or not _indexed(examples):
                raise TypeError(f"probe: task {task!r}: expected a list of examples, got {type(examples).__name__}")
        probes = {task: list(probe.get(task, ())) for task in choice.tasks}
    elif probe is not None and (isinstance(probe, str) or not _indexed(probe)):
        raise TypeError(f"probe: expected a list of examples, or one by task, got {type(probe).__name__}")
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
            raise ValueError(f"probe: task {task!r}: expected at least one example to score on, got none")
    return {task: [named_example(one) for one in found] for task, found in probes.items()}
