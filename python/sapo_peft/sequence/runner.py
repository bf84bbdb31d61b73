"""run_sequence: train a model on task after task, and measure what each task does to all of them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sapo_kernels.files import DataError, excerpt, read_json, write_json
from sapo_kernels.scoring.render import Renderer, check_examples
from sapo_kernels.scoring.response_cache import CellBuilder

from ..trainer.records import PROMPTS_FILE, write_beside_adapter
from .config import SequenceConfig, derived_seed
from .evaluate import Evaluator, Row
from .folder import VERSION, RunFolder, fingerprint, finished_tasks, run_folder
from .methods import Adapters
from .metrics import check_scorer
from .progress import SequenceProgress
from .results import SequenceResult, result_document
from .tasks import MAX_NAME, MAX_TASKS, SequenceTask
from .training import Trained, steps_of, train_task

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
        output_dir: the run's folder. A run that was killed is continued there, a complete one returned. None: nothing
            is written, nothing can be continued.
        config: `SequenceConfig`.
        order: name of the order, for the records.
        name: of the model, for the records; default: what was given, or its ``name_or_path``.
        tokenizer: folder or hub name, if it does not lie beside a model that is loaded here.
        device, dtype: for such a model: "auto", "cpu", "cuda"; "auto", "float32", "bfloat16", "float16".
        progress: a bar (on a terminal) or a line a phase; None: only on a terminal.

    Returns:
        `SequenceResult`.

    Raises:
        ImportError: a package that is needed is missing.
        ValueError (`DataError`): an argument or file, with what was wanted and got; the folder is of another run.
        RuntimeError: another process is at work in the folder.

    On one machine, with one number of threads, a run that was killed at any point and continued ends with the same
    adapters (bytes), choices and matrix as one that was not: every task is redone from its beginning unless it was
    complete.
    """
    config = config or SequenceConfig()
    tasks = _checked(tasks)
    if config.generate:
        check_scorer()
    if not isinstance(order, str) or len(order) > MAX_NAME:
        raise DataError(f"order: expected a text of at most {MAX_NAME} characters, got {excerpt(order)}")
    with run_folder(output_dir) as folder:
        base, tok, called = _resolve(model, name, tokenizer, device, dtype)
        tasks = [replace(task, pool=task.pool.checked(tok)) for task in tasks]
        tasks = [task.used(config.train_examples, config.test_examples) for task in tasks]
        tokens = _check_texts(tasks, tok, config)
        adapters = Adapters(base, config)
        # What is refused up to here leaves no run behind that another option would not fit.
        run = _run_document(tasks, config, order, called, {"base": fingerprint(base), "tokens": tokens})
        saved = folder.started(run)
        if saved is None:
            for warning in run["warnings"]:
                logger.warning("%s", warning)
        else:
            run = _continued(saved, run)
        return _Runner(adapters, tok, tasks, folder, config, run, progress).run_all()


class _Runner:
    """One start of a run."""

    def __init__(
        self, adapters: Adapters, tokenizer, tasks, folder: RunFolder, config: SequenceConfig, run: dict, progress
    ):
        self.tokenizer, self.tasks, self.folder, self.config, self.run = tokenizer, tasks, folder, config, run
        self.names = [task.name for task in tasks]
        self.adapters = adapters
        self.evaluator = Evaluator(tasks, tokenizer, config)
        # The prompt that stands for each task now.
        self.chosen = [0] * len(tasks)
        self.before: dict[str, Any] | None = None
        self.done: list[dict[str, Any]] = []
        self.choices: list[dict[str, Any]] = []
        self.show = progress
        self.progress = SequenceProgress(self.names, False)

    def run_all(self) -> SequenceResult:
        try:
            finished = finished_tasks(self.folder.path, self.names) if self.folder.path else []
            self.progress = SequenceProgress(self.names, self.show, len(finished))
            if self.config.evaluate == "all":
                self._evaluate_before(bool(finished))
            for index, path in finished:
                self._take_over(index, path)
            for index in range(len(finished) + 1, len(self.tasks) + 1):
                self._task(index)
                self._write_results()
            # Also where a run was killed after its last task.
            if self.run["status"] != "done":
                document = self._write_results()
                self.run.update(status="done", finished=_now())
                self.folder.write("run.json", self.run)
            else:
                document = self._document()
        finally:
            self.progress.end()
            self.adapters.remove()
        return SequenceResult(self.run, self.names, document["metrics"], document["choices"], document["cost"],
                              self.folder.path)  # fmt: skip

    def _evaluate_before(self, begun: bool) -> None:
        file = self.folder.path / "before.json" if self.folder.path else None
        if file is not None and file.exists():
            self.before = _read_document(file)
            with _readable(file, "the scores before training"):
                self._document()
                self._warn(self.before["notes"])
        elif begun:
            raise DataError(f"{file}: expected the scores before training, got no file though tasks are done")
        else:
            self.before = _metrics_document(self._evaluate(0, {j: 0 for j in range(len(self.tasks))}))
            self.folder.write("before.json", self.before)
            self._warn(self.before["notes"])

    def _evaluate(self, index: int, prompts: dict[int, int]) -> Row:
        total = sum(len(self.tasks[j].test) for j in prompts)
        self.progress.phase(index, "evaluate", total, "example")
        # A model without adapters before the first task: what a new adapter adds is zero.
        return self.evaluator.row(self.adapters.model, prompts, self.progress.examples)

    def _task(self, index: int) -> None:
        task = self.tasks[index - 1]
        with self.folder.task(index, task.name) as staging:
            self.adapters.add(index, derived_seed(self.config.seed, index, "init"))
            self.progress.phase(index, "train", steps_of(task, self.config), "step")
            trained = train_task(self.adapters, self.tokenizer, task, index, self.config, self.progress.step)
            self.chosen[index - 1] = trained.chosen
            self.progress.say(index, f"prompt {trained.chosen} of {len(task.pool.prompts)} (0 is the original)")
            row = self._evaluate(index, {j: self.chosen[j] for j in self._wanted(index)})
            documents = _documents(task, trained, row)
            if staging is not None:
                self.adapters.save(staging / "adapter")
                if self.config.policy == "sapo":
                    write_beside_adapter(staging / "adapter", trained.record)
                else:  # the model card would name SAPO
                    write_json(staging / "adapter" / PROMPTS_FILE, trained.record)
                for name, document in documents.items():
                    write_json(staging / f"{name}.json", document)
        self._keep(index, documents)

    def _wanted(self, index: int) -> list[int]:
        """The tasks to evaluate after the `index`-th, counted from 0."""
        if self.config.evaluate == "all" or index == len(self.tasks):
            return list(range(len(self.tasks)))
        return list(range(index)) if self.config.evaluate == "seen" else [index - 1]

    def _take_over(self, index: int, path: Path) -> None:
        documents = {name: _read_document(path / f"{name}.json") for name in ("scores", "metrics", "train", "data")}
        if self.run["status"] != "done":
            self.adapters.load(index, path / "adapter")
        with _readable(path, "the files of a finished task"):
            self.chosen[index - 1] = documents["scores"]["chosen"]
            self._keep(index, documents)
            self._document()

    def _keep(self, index: int, documents: dict[str, dict[str, Any]]) -> None:
        self.done.append(documents)
        self.choices.append(_choice(self.tasks[index - 1], documents["scores"]))
        self._warn([*documents["train"]["notes"], *documents["metrics"]["notes"]])

    def _warn(self, notes: list[str]) -> None:
        new = [note for note in notes if note not in self.run["warnings"]]
        for note in new:
            logger.warning("%s", note)
        if new:
            self.run["warnings"] = [*self.run["warnings"], *new]
            self.folder.write("run.json", self.run)

    def _document(self) -> dict[str, Any]:
        return result_document(self.names, self.before, self.done, self.choices)

    def _write_results(self) -> dict[str, Any]:
        document = self._document()
        self.folder.write("results.json", document)
        return document


def _documents(task: SequenceTask, trained: Trained, row: Row) -> dict[str, dict[str, Any]]:
    """The JSON files of a task by name."""
    return {
        "scores": {"version": VERSION, "task": task.name, "prompts": list(task.pool.prompts),
                   "suffix": task.pool.suffix, "chosen": trained.chosen, "scorings": trained.scorings},
        "metrics": _metrics_document(row),
        "train": {"version": VERSION, "losses": [[step, _number(loss)] for step, loss in trained.losses],
                  "penalties": [[step, _number(penalty)] for step, penalty in trained.penalties],
                  "seconds": trained.seconds, "tokens": trained.tokens, "examples": trained.examples,
                  "notes": trained.notes},
        "data": {"version": VERSION, "rows": dict(task.rows),
                 "used": {"train": len(task.train), "test": len(task.test)},
                 "notes": [*task.notes, *task.pool.notes()]},
    }  # fmt: skip


def _metrics_document(row: Row) -> dict[str, Any]:
    return {"version": VERSION, "row": row.row, "examples": row.examples, "seconds": row.seconds,
            "notes": row.notes}  # fmt: skip


def _choice(task: SequenceTask, scores: dict[str, Any]) -> dict[str, Any]:
    """An entry of "choices"; the losses are those of the last scoring."""
    chosen, prompts = scores["chosen"], scores["prompts"]
    losses = scores["scorings"][-1]["loss"] if scores["scorings"] else [None] * len(prompts)
    return {
        "task": task.name,
        "index": chosen,
        "prompt": prompts[chosen],
        "original": prompts[0],
        "loss": losses[chosen],
        "original_loss": losses[0],
        "prompts": len(prompts),
    }


def _read_document(file: Path) -> dict[str, Any]:
    document = read_json(file)
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise DataError(f"{file}: expected an object of version {VERSION}, got {excerpt(document)}")
    return document


@contextmanager
def _readable(path: Path, wanted: str) -> Iterator[None]:
    """Files that this program wrote whole, unless somebody changed them."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        got = f"{type(error).__name__} {excerpt(str(error))}"
        raise DataError(f"{path}: expected {wanted}, got {got} while reading them") from error


def _number(value: float) -> float | None:
    return value if value - value == 0.0 else None


def _checked(tasks: Sequence[SequenceTask]) -> list[SequenceTask]:
    tasks = list(tasks)
    if not tasks or not all(isinstance(task, SequenceTask) for task in tasks):
        raise TypeError(f"tasks: expected at least one SequenceTask, got {excerpt(tasks)}")
    if len(tasks) > MAX_TASKS:
        raise DataError(f"tasks: expected at most {MAX_TASKS}, got {len(tasks)}")
    names = [task.name for task in tasks]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise DataError(f"tasks: expected different names, got {excerpt(name)} twice")
    return tasks


def _resolve(model: Model, name: str | None, tokenizer: str | None, device: str, dtype: str) -> tuple[Any, Any, str]:
    """(model, tokenizer, name for the records)."""
    if isinstance(model, (str, os.PathLike)):
        from ..loading import load

        return *load(os.fspath(model), None, dtype, device, tokenizer), name or os.fspath(model)
    pair = model() if callable(model) and not isinstance(model, torch.nn.Module) else model
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], torch.nn.Module):
        raise TypeError(f"model: expected a name, a pair (model, tokenizer) or a function, got {type(model).__name__}")
    return *pair, name or getattr(pair[0], "name_or_path", "") or type(pair[0]).__name__


def _check_texts(tasks: list[SequenceTask], tokenizer: Any, config: SequenceConfig) -> str:
    """Find out now, not when a later task is reached, that a row is none or a prompt does not fit.

    Returns a fingerprint of the tokens of every prompt with the first row: of the tokenizer, its template, the layout.
    """
    found = hashlib.sha256()
    for task in tasks:
        pool = task.pool
        try:
            for split, rows in (("train", task.train), ("test", task.test)):
                _check_rows(rows, split)
            renderer = Renderer(tokenizer, None, pool.suffix, pool.text_word)
            limits = config.max_source, config.max_target
            for context, response in CellBuilder(renderer, pool.prompts, task.train[:1], *limits, warn=False).cells():
                found.update(b"%d %d " % (len(context), len(response)) + context.tobytes() + response.tobytes())
        except ValueError as error:
            raise DataError(f"task {excerpt(task.name)}: {error}") from error
    return found.hexdigest()[:16]


def _check_rows(rows: Sequence[Mapping[str, str]], split: str) -> None:
    try:
        check_examples(rows)
    except ValueError as error:
        raise DataError(f"{split}: {error}") from error


def _run_document(
    tasks: list[SequenceTask], config: SequenceConfig, order: str, name: str, marks: dict[str, str]
) -> dict[str, Any]:
    notes = [f"task {task.name}: {note}" for task in tasks for note in (*task.notes, *task.pool.notes())]
    return {
        "version": VERSION,
        "kind": "sequence",
        "status": "running",
        "method": config.method,
        "policy": config.policy,
        "order": order,
        "tasks": [task.name for task in tasks],
        "seed": config.seed,
        "model": name,
        "config": config.as_dict(),
        "data": {**marks, **{f"task {task.name}": task.digest() for task in tasks}},
        "versions": {name: metadata.version(name) for name in ("sapo-kernels", "torch", "transformers", "peft")},
        "started": _now(),
        "finished": None,
        "warnings": notes,
    }


def _continued(saved: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The document of a run that is started again."""
    if saved["versions"] != run["versions"] and saved["status"] != "done":
        other = [f"{name} {version} (was {saved['versions'].get(name)})"
                 for name, version in run["versions"].items() if saved["versions"].get(name) != version]  # fmt: skip
        note = f"continued with other versions: {', '.join(other)}; results may differ from a run at one go"
        if note not in saved["warnings"]:
            logger.warning("%s", note)
            saved = {**saved, "warnings": [*saved["warnings"], note]}
    return saved


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
