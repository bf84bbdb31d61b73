"""The report of sequence runs: one HTML file that needs no network, no script and no other file.

`compare` pairs the runs, `views` and `charts` make what is shown of them, and the templates put it on a page.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from sapo_kernels.files import DataError, atomic_write, read_bytes

from ..locks import only_writer
from ..sequence.folder import Run, read_run
from . import text, views
from .compare import group_runs, in_order

__all__ = ["write_report"]

FILE_NAME = "report.html"
# Runs with sections of their own; the others are in the comparison and in the table of runs.
MAX_DETAILED = 8
# In every report.
MARK = b"<code>sapo report</code>"


def write_report(
    run_dirs: str | os.PathLike | Iterable[str | os.PathLike],
    out: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the report of one or more runs of `sapo sequence` and return its path.

    Args:
        run_dirs: folders of runs, or folders that hold several. If the first is a run, the report is about it and the
            others are what it is compared with; otherwise it is about all of them, at most `MAX_DETAILED` in detail.
        out: the file to write; by default `FILE_NAME` in the first folder. An older report there is replaced.
        overwrite: replace any other file too.

    A run may still be in progress. Deterministic: the same folders give the same bytes.

    Raises: `sapo_kernels.files.DataError` for a folder without runs, a damaged one, the same run twice, or another
    file at `out`; `RuntimeError` if another process writes to it; `OSError`.
    """
    paths = [Path(p) for p in ([run_dirs] if isinstance(run_dirs, (str, os.PathLike)) else run_dirs)]
    if not paths:
        raise DataError("run_dirs: expected at least one folder, got none")
    runs = [read_run(path) for path in find_runs(paths)]
    if (paths[0] / "run.json").is_file():
        detailed = runs[:1]
    else:
        runs = in_order(runs)
        detailed = runs[:MAX_DETAILED]
    out = paths[0] / FILE_NAME if out is None else Path(out)
    if not overwrite and out.is_file() and MARK not in read_bytes(out):
        raise DataError(f"{out}: expected no file or an older report, got another file (see --overwrite)")
    page = _page(runs, detailed)
    with only_writer(out):
        atomic_write(out, page)
    return out


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among `paths` and below them, each once, in the order of `paths` and then by name.

    Raises: `DataError` for a path that is no folder or holds no run.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.is_dir():
            got = "a file" if path.exists() else "no such path"
            raise DataError(f"{path}: expected the folder of a run, got {got}")
        # What starts with a dot is being written.
        here = [file.parent for file in sorted(path.rglob("run.json")) if "/." not in f"/{file.relative_to(path)}"]
        if not here:
            raise DataError(f"{path}: expected a folder with run.json in it or below it, got none")
        for run in here:
            found.setdefault(os.path.realpath(run), run)
    return list(found.values())


def _page(runs: Sequence[Run], detailed: Sequence[Run]) -> str:
    """The whole document. detailed: the runs with sections of their own, at least one; all of them are in `runs`."""
    single = detailed[0] if len(detailed) == 1 else None
    title = f"{text.plural(len(runs), 'run')} of tasks in a row, compared by their prompts"
    if single:
        count, policy = len(single.record.tasks), single.record.policy
        told = f"{count} tasks in a row" if count > 1 else "One task"
        title = f"{told}, trained with {views.POLICIES.get(policy, policy)}"
    groups = group_runs(runs)
    own = [group for group in groups if not single or single in group.runs]
    compared = [group for group in own if len(group.runs) > 1]
    found = Environment(
        loader=PackageLoader("sapo_peft.report"), autoescape=True, undefined=StrictUndefined, finalize=text.visible,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    names = ("line", "name", "fixed", "signed", "percent", "whole", "seconds", "plural", "figure", "unit")
    found.filters.update({name: getattr(text, name) for name in names})
    found.tests["left_original"] = views.left_original
    return found.get_template("page.html").render(
        views=views,
        title=title,
        single=single,
        runs=runs,
        detailed=[(run, next(one for one in groups if run in one.runs).baseline(run)) for run in detailed],
        comparisons=[views.comparison(one, one.arm_of(single or one.runs[0])) for one in compared],
        foreign=len(runs) - sum(len(group.runs) for group in own),
        latest=max(run.record.finished or run.record.started for run in runs),
    )  # fmt: skip
