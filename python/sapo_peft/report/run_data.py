"""Run folders of `sapo sequence`, read whole, bounded and checked before anything is drawn.

Nothing is repaired: a value of another kind, a row of another length or two files that contradict each other raise
`DataError` with the file, the place, what was wanted and got. A file that is not there is None here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sapo_kernels.files import DataError, excerpt

from ..data.prompt_files import MAX_PROMPTS
from ..sequence.folder import task_folder
from ..sequence.metrics import sequence_metrics
from ..sequence.tasks import MAX_NAME, MAX_TASKS
from ._node import Node
from .measures import MEASURES

VERSION = 1
MAX_BYTES = 64 * 2**20
MAX_SCORINGS = 100_000
MAX_RUNS = 1000
MAX_FOLDERS = 20_000
# One figure in two files: rounding of a sum in another order is all that may lie between them.
SAME = 1e-9


@dataclass(frozen=True)
class Scoring:
    """One scoring of K prompts: loss [K] in nats per token (None: not known), probe tokens [K], weights [K]."""

    step: int
    reason: str
    loss: list[float | None]
    tokens: list[int]
    weights: list[float]
    chosen: int
    seconds: float | None
    dense_tokens: int | None
    computed_tokens: int | None


@dataclass(frozen=True)
class Prompts:
    """`scores.json`: the texts of the K prompts, the answer-format line, and the scorings in order."""

    texts: list[str]
    suffix: str
    scorings: list[Scoring]

    def switches(self) -> list[tuple[int, int, int]]:
        """(number of the scoring, old prompt, new prompt) of every change of the chosen prompt."""
        chosen = [scoring.chosen for scoring in self.scorings]
        return [(i, chosen[i - 1], chosen[i]) for i in range(1, len(chosen)) if chosen[i] != chosen[i - 1]]


@dataclass(frozen=True)
class Task:
    """The folder of a finished task. row: scores [N] by name; train: seconds, tokens, examples and losses."""

    number: int
    name: str
    folder: str
    prompts: Prompts | None = None
    row: dict[str, list[float | None]] = field(default_factory=dict)
    eval_seconds: float | None = None
    train: dict[str, Any] | None = None
    rows: dict[str, int] | None = None
    notes: list[str] = field(default_factory=list)

    def score_seconds(self) -> float | None:
        return _total(s.seconds for s in self.prompts.scorings) if self.prompts else None

    def tokens(self, kind: str) -> float | None:
        """Sum of "dense_tokens" or "computed_tokens" over the scorings."""
        return _total(getattr(s, kind) for s in self.prompts.scorings) if self.prompts else None


@dataclass(frozen=True)
class Choice:
    """The chosen prompt of a task beside the original; losses in nats per token, None where nothing was scored."""

    task: str
    index: int
    prompt: str
    original: str
    loss: float | None
    original_loss: float | None
    count: int


@dataclass(frozen=True)
class Score:
    """One of `MEASURES`: matrix [N + 1][N], row 0 before training, and `METRICS` of it (None: not known yet)."""

    matrix: list[list[float | None]]
    figures: dict[str, float | None]


@dataclass(frozen=True)
class Run:
    """A run folder. results are None until the first task is done; folders has an entry for each task or None."""

    path: Path
    status: str
    method: str
    policy: str
    order: str
    tasks: list[str]
    seed: int
    model: str
    config: dict[str, Any]
    versions: dict[str, Any]
    started: str | None
    finished: str | None
    warnings: list[str]
    scores: dict[str, Score]
    choices: dict[str, Choice]
    cost: dict[str, float | None] | None
    folders: list[Task | None]
    # What the base model and the data were, so that runs on other ones are not compared.
    data: Any = None

    @property
    def headline(self) -> str | None:
        """The first of `MEASURES` that the run has."""
        return next((name for name in MEASURES if name in self.scores), None)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def done(self) -> int:
        """Number of tasks whose folder is there."""
        return sum(folder is not None for folder in self.folders)

    def figure(self, score: str, metric: str) -> float | None:
        return self.scores[score].figures.get(metric) if score in self.scores else None


def is_run(path: Path) -> bool:
    return (path / "run.json").is_file()


def find_runs(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """The run folders among `paths` and below them, each once, in the order of `paths` and then by name.

    Raises: `DataError` for a path that is no folder or holds no run, and for more than `MAX_RUNS` runs.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"{path}: wanted the folder of a run, got {'a file' if path.exists() else 'nothing there'}")
        here = [path] if is_run(path) else _below(path)
        if not here:
            raise DataError(f"{path}: wanted a folder with run.json in it or below it, got none")
        for run in here:
            found.setdefault(os.path.realpath(run), run)
        if len(found) > MAX_RUNS:
            raise DataError(f"{path}: wanted at most {MAX_RUNS} runs, got more")
    return list(found.values())


def _below(path: Path) -> list[Path]:
    runs = []
    for number, (folder, names, files) in enumerate(os.walk(path)):
        if number >= MAX_FOLDERS:
            raise DataError(f"{path}: wanted at most {MAX_FOLDERS} folders to look for runs in, got more")
        # A run holds no other run, and what starts with a dot is being written.
        names[:] = [] if "run.json" in files else sorted(name for name in names if not name.startswith("."))
        if "run.json" in files:
            runs.append(Path(folder))
    return runs


def read_run(path: Path) -> Run:
    """The run in a folder. Raises: `DataError`, `OSError`."""
    run = Node.read(path / "run.json", MAX_BYTES)
    run["version"].one_of(VERSION)
    run["kind"].one_of("sequence")
    names = [node.text(MAX_NAME) for node in run["tasks"].items(1, MAX_TASKS)]
    if len(set(names)) != len(names):
        run["tasks"].fail("each task once")
    results = _optional(path / "results.json")
    folders = [_task(path, number, name, len(names)) for number, name in enumerate(names, 1)]
    scores, choices, cost = _results(results, names) if results else ({}, {}, None)
    _agree(path, folders, scores, choices)
    return Run(
        path,
        run["status"].one_of("running", "done"),
        *(run[key].text(MAX_NAME) for key in ("method", "policy", "order")),
        names,
        run["seed"].integer(),
        run["model"].text(MAX_BYTES),
        run["config"].object(),
        run["versions"].object(),
        *(None if run.get(key).null() else run[key].text(MAX_NAME) for key in ("started", "finished")),
        [node.text() for node in run["warnings"].items()],
        scores,
        choices,
        cost,
        folders,
        run.get("data").value,
    )


def _optional(path: Path) -> Node | None:
    try:
        node = Node.read(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    node["version"].one_of(VERSION)
    return node


def _results(results: Node, tasks: list[str]) -> tuple[dict[str, Score], dict[str, Choice], dict[str, float | None]]:
    size = len(tasks)
    if results["tasks"].value != tasks:
        results["tasks"].fail(f"the tasks of run.json, {excerpt(tasks)}")
    scores = {}
    for name, measure in MEASURES.items():
        if results["metrics"].get(name).null():
            continue
        node = results["metrics"][name]
        rows = node["R"].items(length=size + 1)
        matrix = [[cell.maybe(0, measure.top) for cell in row.items(length=size)] for row in rows]
        scores[name] = Score(matrix, _figures(node, matrix))
    choices = {}
    for node in results["choices"].items(most=size):
        task = node["task"].text()
        if task not in tasks or task in choices:
            node["task"].fail("a task of the run, each once")
        count = node["prompts"].integer(1, MAX_PROMPTS)
        choices[task] = Choice(
            task,
            node["index"].integer(0, count - 1),
            node["prompt"].text(),
            node["original"].text(),
            node["loss"].maybe(),
            node["original_loss"].maybe(),
            count,
        )
    cost = {key: results["cost"].get(key).maybe(0) for key in results["cost"].object()}
    return scores, choices, cost


def _figures(node: Node, matrix: list[list[float | None]]) -> dict[str, float | None]:
    """The metrics beside a matrix, which have to be those that follow from it."""
    found = {}
    for key, wanted in sequence_metrics(matrix).items():
        found[key] = node[key].maybe()
        if (found[key] is None) != (wanted is None) or (wanted is not None and abs(found[key] - wanted) > SAME):
            node[key].fail(f"{wanted}, which follows from 'R'")
    return found


def _task(run: Path, number: int, name: str, size: int) -> Task | None:
    folder = run / "tasks" / task_folder(number, name)
    if not folder.is_dir():
        return None
    scores, metrics, train, data = (
        _optional(folder / f"{part}.json") for part in ("scores", "metrics", "train", "data")
    )
    row: dict[str, list[float | None]] = {}
    if metrics:
        for key, measure in MEASURES.items():
            if not metrics["row"].get(key).null():
                row[key] = [cell.maybe(0, measure.top) for cell in metrics["row"][key].items(length=size)]
    return Task(
        number,
        name,
        f"tasks/{folder.name}",
        _prompts(scores) if scores else None,
        row,
        metrics.get("seconds").maybe(0) if metrics else None,
        _train(train) if train else None,
        {key: data["rows"][key].integer(0) for key in data["rows"].object()} if data else None,
        [node.text() for node in data["notes"].items()] if data else [],
    )


def _prompts(scores: Node) -> Prompts:
    texts = [node.text() for node in scores["prompts"].items(1, MAX_PROMPTS)]
    size = len(texts)
    scorings = []
    for node in scores["scorings"].items(most=MAX_SCORINGS):
        scorings.append(
            Scoring(
                node["step"].integer(0),
                node["reason"].text(MAX_NAME),
                [cell.maybe() for cell in node["loss"].items(length=size)],
                [cell.integer(0) for cell in node["tokens"].items(length=size)],
                [cell.number(0) for cell in node["weights"].items(length=size)],
                node["chosen"].integer(0, size - 1),
                node.get("seconds").maybe(0),
                *(None if node.get(k).null() else node[k].integer(0) for k in ("dense_tokens", "computed_tokens")),
            )
        )
    return Prompts(texts, scores["suffix"].text(), scorings)


def _train(train: Node) -> dict[str, Any]:
    losses = []
    for node in train["losses"].items():
        step, loss = node.items(length=2)
        losses.append((step.integer(0), loss.maybe()))
    return {"losses": losses, **{key: train.get(key).maybe(0) for key in ("seconds", "tokens", "examples")}}


def _agree(path: Path, folders: list[Task | None], scores: dict[str, Score], choices: dict[str, Choice]) -> None:
    """What stands in two files stands there alike. A task may be in its folder before it is in the results."""
    for task in folders:
        if task is None:
            continue
        choice = choices.get(task.name)
        if choice and task.prompts:
            place = f"{path / task.folder / 'scores.json'}: 'prompts'"
            if len(task.prompts.texts) != choice.count:
                raise DataError(f"{place}: wanted the {choice.count} of results.json, got {len(task.prompts.texts)}")
            got = task.prompts.texts[choice.index]
            if got != choice.prompt:
                raise DataError(
                    f"{place} {choice.index}: wanted the chosen prompt of results.json, {excerpt(choice.prompt)}, "
                    f"got {excerpt(got)}"
                )
        for name, row in task.row.items():
            if name not in scores:
                continue
            for j, (wanted, got) in enumerate(zip(scores[name].matrix[task.number], row, strict=True)):
                if wanted is not None and (got is None or abs(wanted - got) > SAME):
                    place = f"{path / task.folder / 'metrics.json'}: 'row' {name!r} {j}"
                    raise DataError(f"{place}: wanted {wanted} as in results.json, got {got}")


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
