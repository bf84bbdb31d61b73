"""run_sequence: train a model on task after task, and measure what each task does to all of them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from sapo_kernels.files import DataError, excerpt
from sapo_kernels.scoring.render import Renderer, check_examples, with_end_token
from sapo_kernels.scoring.response_cache import CellBuilder

from .config import MAX_NAME, MAX_TASKS, SequenceConfig, derived_seed
from .evaluate import Evaluator
from .folder import Run, RunFolder, run_folder, task_folder, write_documents
from .methods import Adapters, fingerprint
from .metrics import check_scorer
from .progress import SequenceProgress
from .results import SequenceResult, results_of
from .schema import Evaluation, FinishedTask, RunRecord, TaskData
from .tasks import SequenceTask
from .training import steps_of, train_task

logger = logging.getLogger("sapo_peft")

Model = str | os.PathLike | tuple[Any, Any] | Callable[[], tuple[Any, Any]]


def run_sequence(
    model: Model,
    tasks: Sequence[SequenceTask],
    output_dir: str | os.PathLike | None,
    config: SequenceConfig | None = None,
    *,
    order: str = "",
    name: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool | None = None,
) -> SequenceResult:
    """Train adapters on task after task, each with the prompt that a policy says, and evaluate all tasks after each.

    Args:
        model: "tiny", a folder or a hub name; or a pair (model, tokenizer), or a function that returns one. A model
            that is handed over is used as it is and is afterwards as it was.
        tasks: in the order in which they are learned; see `SequenceTask.build`, `read_order`, `read_tasks`.
        output_dir: the run's folder. A run that was killed is continued there, a complete one returned; either only if
            its files are as they were written. None: nothing is written, nothing can be continued.
        config: `SequenceConfig`.
        order: name of the order, for the records.
        name: of the model, for the records; default: what was given, or its ``name_or_path``.
        tokenizer: folder or hub name, if it is not beside a model that is loaded here.
        device, dtype: for such a model: "auto", "cpu", "cuda"; "auto", "float32", "bfloat16", "float16".
        progress: a line a phase, and one every half minute, on stderr; None: only on a terminal.

    Returns:
        `SequenceResult`.

    Raises:
        ImportError: a package that is needed is missing.
        ValueError (`DataError`): an argument or file, with what was expected and got; the folder is of another run or
            damaged.
        RuntimeError: another process is at work in the folder.
        FloatingPointError: training has diverged; nothing of the task is written.

    On one machine, with one number of threads, a run that was killed at any point and continued ends with the same
    adapters (bytes), choices and matrix as one that was not: every task is redone from its beginning unless it was
    complete.
    """
    config = config or SequenceConfig()
    tasks = list(tasks)
    if not tasks or not all(isinstance(task, SequenceTask) for task in tasks):
        raise TypeError(f"tasks: expected at least one SequenceTask, got {excerpt(tasks)}")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names) or len(names) > MAX_TASKS:
        raise DataError(f"tasks: expected at most {MAX_TASKS} with different names, got {len(names)}: {excerpt(names)}")
    if not isinstance(order, str) or len(order) > MAX_NAME:
        raise DataError(f"order: expected a text of at most {MAX_NAME} characters, got {excerpt(order)}")
    if config.generate:
        check_scorer()
    with run_folder(output_dir) as folder:
        base, tok, called = _resolve(model, name, tokenizer, device, dtype)
        tasks = [replace(task, pool=task.pool.checked(tok)) for task in tasks]
        tasks = [task.used(config.train_examples, config.test_examples) for task in tasks]
        started = folder.found.record.started if folder.found else _now()
        # A template that shows a date shows that of the run's beginning, also to a start on another day.
        now = datetime.fromisoformat(started)
        marks = {"tokens": _check_texts(tasks, tok, config, now), "base": fingerprint(base)}
        record = RunRecord(
            method=config.method, policy=config.policy, order=order, tasks=names,
            seed=config.seed, model=called, config=config.as_dict(), started=started,
            data={**marks, **{f"task {task.name}": task.digest() for task in tasks}},
            versions={one: metadata.version(one) for one in ("sapo-kernels", "torch", "transformers", "peft")},
            warnings=[f"task {task.name}: {note}" for task in tasks for note in (*task.notes, *task.pool.notes())],
        )  # fmt: skip
        adapters = Adapters(base, config)
        # What is refused up to here leaves no run behind that another option would not fit.
        try:
            return _Start(adapters, tok, tasks, folder, record, progress).run()
        finally:
            adapters.remove()


class _Start:
    """One start of a run: what an earlier one has done is taken over, the rest is done."""

    def __init__(self, adapters: Adapters, tokenizer, tasks, folder: RunFolder, record: RunRecord, progress):
        self.adapters, self.tokenizer, self.tasks, self.folder = adapters, tokenizer, tasks, folder
        self.config = adapters.config
        self.now = datetime.fromisoformat(record.started)
        self.evaluator = Evaluator(adapters.base, tasks, tokenizer, self.config, self.now)
        self.record, self.before, self.done = record, None, []
        if folder.found is None:
            for warning in record.warnings:
                logger.warning("%s", warning)
            folder.write({"run": record})
        else:
            self._take_over(folder.found, record)
        self.progress = SequenceProgress(record.tasks, progress, len(self.done))

    def run(self) -> SequenceResult:
        names = self.record.tasks
        if self.config.evaluate == "all" and self.before is None:
            self.before = self._evaluate(0, {j: 0 for j in range(len(names))})
            self._warn(self.before.notes)
            self.folder.write({"before": self.before, "run": self.record})
        for index in range(len(self.done) + 1, len(names) + 1):
            self._task(index)
        results = results_of(names, self.before, self.done)
        if self.record.status != "done":
            self.record = self.record.model_copy(update={"status": "done", "finished": _now()})
            self.folder.write({"results": results, "run": self.record})
        del results["version"]
        return SequenceResult(run=self.record.model_dump(), folder=self.folder.path, **results)

    def _task(self, index: int) -> None:
        """Train the `index`-th task (from 1), evaluate, and put its folder in place."""
        task = self.tasks[index - 1]
        with self.folder.staging(index, task.name) as staging:
            self.adapters.add(index, derived_seed(self.config.seed, index, "init"))
            self.progress.phase(index, "train", steps_of(task, self.config), "step")
            shown = self.progress
            trained = train_task(
                self.adapters, self.tokenizer, task, index, self.config, shown.step, shown.scoring, self.now
            )
            self.progress.say(index, f"prompt {trained.scores.chosen} of {len(task.pool.prompts)} (0 is the original)")
            # The chosen prompt stands for its task, the original for those to come.
            chosen = [*(one.scores.chosen for one in self.done), trained.scores.chosen]
            chosen += [0] * (len(self.tasks) - index)
            metrics = self._evaluate(index, {j: chosen[j] for j in self._wanted(index)})
            used = {"train": len(task.train), "test": len(task.test)}
            data = TaskData(rows=dict(task.rows), used=used, notes=[*task.notes, *task.pool.notes()])
            self.done.append(FinishedTask(trained.scores, metrics, trained.train, data))
            self._warn([*trained.train.notes, *metrics.notes])
            if staging is not None:
                self.adapters.save(staging / "adapter", trained.prompts)
                write_documents(staging, self.done[-1])
                results = results_of(self.record.tasks, self.before, self.done)
                self.folder.write({"results": results, "run": self.record}, staging)

    def _evaluate(self, index: int, prompts: dict[int, int]) -> Evaluation:
        total = sum(len(self.tasks[j].test) for j in prompts)
        self.progress.phase(index, "evaluate", total, "example")
        # A model without adapters before the first task: what a new adapter adds is zero.
        return self.evaluator.evaluate(self.adapters.model, prompts, self.progress.examples)

    def _wanted(self, index: int) -> list[int]:
        """The tasks to evaluate after the `index`-th, counted from 0."""
        if self.config.evaluate == "all" or index == len(self.tasks):
            return list(range(len(self.tasks)))
        return list(range(index)) if self.config.evaluate == "seen" else [index - 1]

    def _take_over(self, found: Run, record: RunRecord) -> None:
        """What an earlier start has done, if it was the same run."""
        for what, was, now in _differences(found.record, record):
            raise DataError(
                f"{found.path}: {what}: expected {excerpt(was)}, as this run began with, got {excerpt(now)}; give the "
                "same options to resume it, or choose another folder"
            )
        self.record, self.before, self.done = found.record, found.before, found.tasks
        if self.config.evaluate == "all" and self.done and not self.before:
            raise DataError(f"{found.path / 'before.json'}: expected the scores before training, got no file")
        if self.record.status == "done":
            return
        other = [f"{name} {version} (was {self.record.versions.get(name)})"
                 for name, version in record.versions.items() if self.record.versions.get(name) != version]  # fmt: skip
        if other:
            self._warn(
                [f"resumed with other versions: {', '.join(other)}; results may differ from an uninterrupted run"]
            )
        folders = [task_folder(found.path, i, task.scores.task) for i, task in enumerate(self.done, 1)]
        for index, folder in enumerate(folders, 1):
            self.adapters.load(index, folder / "adapter")

    def _warn(self, notes: list[str]) -> None:
        new = [note for note in notes if note not in self.record.warnings]
        for note in new:
            logger.warning("%s", note)
        self.record = self.record.model_copy(update={"warnings": [*self.record.warnings, *new]})


def _differences(was: RunRecord, now: RunRecord) -> list[tuple[str, Any, Any]]:
    """(option, its value in the earlier start, its value now) of everything that decides the results."""
    pairs = [(name, was.config.get(name), now.config.get(name)) for name in sorted({*was.config, *now.config})]
    pairs += [(name, getattr(was, name), getattr(now, name)) for name in ("tasks", "order", "model")]
    pairs += [(f"data, {name}", was.data.get(name), now.data.get(name)) for name in sorted({*was.data, *now.data})]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _resolve(model: Model, name: str | None, tokenizer: str | None, device: str, dtype: str) -> tuple[Any, Any, str]:
    """(model, tokenizer, name for the records)."""
    if isinstance(model, (str, os.PathLike)):
        from ..loading import load

        return *load(os.fspath(model), None, dtype, device, tokenizer), name or os.fspath(model)
    pair = model() if callable(model) and not isinstance(model, torch.nn.Module) else model
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], torch.nn.Module):
        raise TypeError(f"model: expected a name, a pair (model, tokenizer) or a function, got {type(model).__name__}")
    model, tok = pair
    return model, with_end_token(tok, model), name or getattr(model, "name_or_path", "") or type(model).__name__


def _check_texts(tasks: list[SequenceTask], tokenizer: Any, config: SequenceConfig, now: datetime) -> str:
    """Find out now, not when a later task is reached, that a row is none or a prompt does not fit.

    Returns a fingerprint of the tokens of every prompt with the first row: of the tokenizer, its template, the layout.
    """
    found = hashlib.sha256()
    for task in tasks:
        pool, place = task.pool, f"task {excerpt(task.name)}"
        for split in ("train", "test"):
            try:
                check_examples(getattr(task, split))
            except ValueError as error:
                raise DataError(f"{place}: {split}: {error}") from error
        limits = config.max_source, config.max_target
        try:
            role = config.instruction_role
            renderer = Renderer(tokenizer, None, pool.suffix, pool.text_word, instruction_role=role, now=now)
            cells = CellBuilder(renderer, pool.prompts, task.train[:1], *limits, warn=False).cells()
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error
        for context, response in cells:
            found.update(b"%d %d " % (len(context), len(response)) + context.tobytes() + response.tobytes())
    return found.hexdigest()[:16]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
