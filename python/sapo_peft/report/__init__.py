"""The report of sequence runs: one HTML file that needs no network, no script and no other file.

`compare` pairs the runs, `views` and `charts` make what is shown of them, and the template puts it on a page.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from sapo_kernels.files import DataError, atomic_write, read_bytes

from ..locks import only_writer
from ..sequence.folder import read_run
from . import text, views
from .compare import arms_of, baseline, in_order

__all__ = ["write_report"]

FILE_NAME = "report.html"
# In every report.
MARK = b"<code>sapo report</code>"


def write_report(
    run_dirs: str | os.PathLike | Iterable[str | os.PathLike],
    out: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the report of one or more runs of `sapo sequence` and return its path.

    Args:
        run_dirs: folders of runs, or folders that hold several. The report is about the first run and compares it with
            the others; where the first folder holds several, about the one of the lowest seed, with SAPO's prompts.
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
    if not (paths[0] / "run.json").is_file():
        runs = in_order(runs)
    out = paths[0] / FILE_NAME if out is None else Path(out)
    if not overwrite and out.is_file() and MARK not in read_bytes(out):
        raise DataError(f"{out}: expected no file or an older report, got another file (see --overwrite)")
    arms = arms_of(runs[0], runs)
    found = Environment(
        loader=PackageLoader("sapo_peft.report"), autoescape=True, undefined=StrictUndefined, finalize=text.visible,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    names = ("line", "name", "fixed", "signed", "percent", "whole", "seconds", "plural", "figure", "unit")
    found.filters.update({name: getattr(text, name) for name in names})
    found.tests["left_original"] = views.left_original
    shown = {"run": runs[0], "runs": runs, "arms": arms, "baseline": baseline(runs[0], arms)}
    page = found.get_template("page.html").render(views=views, **shown)
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
