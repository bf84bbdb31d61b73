"""The report of sequence runs: one HTML file that needs no network, no script and no other file.

`compare` pairs the runs, `views` and `charts` make what is shown of them, and `page` fills the templates.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

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
    file at `out`; `OSError`; `ImportError` naming a package of the extra "train" that is missing.
    """
    from sapo_kernels.files import DataError, atomic_write, read_bytes

    from ..sequence.folder import read_run
    from .compare import in_order
    from .page import render

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
    atomic_write(out, render(runs, detailed))
    return out


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among `paths` and below them, each once, in the order of `paths` and then by name.

    Raises: `DataError` for a path that is no folder or holds no run.
    """
    from sapo_kernels.files import DataError

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
