"""Run folders, found and read whole by the schema of `sequence`; two files that contradict each other are refused."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sapo_kernels.files import DataError, excerpt

from ..sequence import schema
from ..sequence.folder import task_folder

MAX_RUNS = 1000
MAX_FOLDERS = 20_000
TASK_FILES = {"scores": schema.Scores, "metrics": schema.Evaluation, "train": schema.Training, "data": schema.TaskData}


@dataclass(frozen=True)
class FinishedTask:
    """The folder of a task that is done. number: from 1."""

    number: int
    name: str
    scores: schema.Scores
    metrics: schema.Evaluation
    train: schema.Training
    data: schema.TaskData

    def switches(self) -> list[tuple[schema.Scoring, int]]:
        """(scoring, the prompt before) for every scoring that changed the prompt."""
        scorings = self.scores.scorings
        pairs = zip(scorings, scorings[1:], strict=False)
        return [(after, before.chosen) for before, after in pairs if before.chosen != after.chosen]

    @property
    def left_original(self) -> bool:
        """Whether it was trained on another prompt than the first, at the end or before a switch."""
        return any([self.scores.chosen, *(scoring.chosen for scoring in self.scores.scorings)])


@dataclass(frozen=True)
class Run:
    """A run's folder. results: None until the first task is done; tasks: those that are done."""

    path: Path
    record: schema.RunRecord
    before: schema.Evaluation | None
    results: schema.Results | None
    tasks: list[FinishedTask]

    @property
    def finished(self) -> bool:
        return self.record.status == "done"

    def matrix(self, measure: str) -> list[list[float | None]] | None:
        return self.results.metrics[measure].R if self.results and measure in self.results.metrics else None

    def figure(self, measure: str, metric: str) -> float | None:
        known = self.results.metrics.get(measure) if self.results else None
        return getattr(known, metric) if known else None

    @property
    def measures(self) -> list[str]:
        """Those of `MEASURES` that it has; the first is its headline."""
        return [name for name in schema.MEASURES if self.matrix(name)]


def is_run(path: Path) -> bool:
    return (path / "run.json").is_file()


def find_runs(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """The run folders among `paths` and below them, each once, in the order of `paths` and then by name.

    Raises: `DataError` for a path that is no folder or holds no run, and for more than `MAX_RUNS` runs.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(
                f"{path}: expected the folder of a run, got {'a file' if path.exists() else 'no such path'}"
            )
        here = [path] if is_run(path) else _below(path)
        if not here:
            raise DataError(f"{path}: expected a folder with run.json in it or below it, got none")
        for run in here:
            found.setdefault(os.path.realpath(run), run)
        if len(found) > MAX_RUNS:
            raise DataError(f"{path}: expected at most {MAX_RUNS} runs, got more")
    return list(found.values())


def _below(path: Path) -> list[Path]:
    runs = []
    for number, (folder, names, files) in enumerate(os.walk(path)):
        if number >= MAX_FOLDERS:
            raise DataError(f"{path}: expected at most {MAX_FOLDERS} folders to look for runs in, got more")
        # A run holds no other run, and what starts with a dot is being written.
        names[:] = [] if "run.json" in files else sorted(name for name in names if not name.startswith("."))
        if "run.json" in files:
            runs.append(Path(folder))
    return runs


def read_run(path: Path) -> Run:
    """The run in a folder. Raises: `DataError`, `OSError`."""
    record = schema.read(schema.RunRecord, path / "run.json")
    before, results = (
        schema.read(kind, path / name) if (path / name).exists() else None
        for kind, name in ((schema.Evaluation, "before.json"), (schema.Results, "results.json"))
    )
    tasks = []
    for number, name in enumerate(record.tasks, 1):
        folder = path / "tasks" / task_folder(number, name)
        if folder.is_dir():
            files = {part: schema.read(kind, folder / f"{part}.json") for part, kind in TASK_FILES.items()}
            tasks.append(FinishedTask(number, name, **files))
    run = Run(path, record, before, results, tasks)
    _agree(run)
    return run


def _agree(run: Run) -> None:
    """What stands in two files stands there alike. A task may be in its folder before it is in the results."""
    names, results = run.record.tasks, run.results
    if results and results.tasks != names:
        got = excerpt(results.tasks)
        raise DataError(
            f"{run.path / 'results.json'}: 'tasks': expected those of run.json, {excerpt(names)}, got {got}"
        )
    rows = [(0, run.path / "before.json", run.before)] if run.before else []
    for task in run.tasks:
        folder = run.path / "tasks" / task_folder(task.number, task.name)
        rows.append((task.number, folder / "metrics.json", task.metrics))
        if results is None or len(results.choices) < task.number:
            continue
        scores, choice = task.scores, results.choices[task.number - 1]
        got = (len(scores.prompts), scores.chosen, scores.prompts[0], scores.prompts[scores.chosen])
        expected = (choice.prompts, choice.index, choice.original, choice.prompt)
        if got != expected:
            what = "(count, chosen, original, chosen prompt) as in results.json"
            raise DataError(f"{folder / 'scores.json'}: expected {what}, {_short(expected)}, got {_short(got)}")
    for number, file, found in rows:
        if len(found.examples) != len(names):
            raise DataError(f"{file}: 'examples': expected {len(names)} entries, got {len(found.examples)}")
        for measure, row in found.row.items():
            known = (run.matrix(measure) or [[]] * (number + 1))[number]
            # A row of nulls: the results are older than this file.
            if any(value is not None for value in known) and not all(map(schema.same, known, row)):
                place = f"{file}: 'row' {measure!r}"
                raise DataError(f"{place}: expected {excerpt(known)} as in results.json, got {excerpt(row)}")


def _short(values: Iterable) -> str:
    return ", ".join(map(excerpt, values))
