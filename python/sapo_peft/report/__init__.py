"""The report of sequence runs: one HTML file that needs no network, no script and no other file.

`runs` reads run folders by the schema of `sequence`, `compare` pairs them, `views` and `charts` make what is shown of
them, and `page` fills the templates.
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

    from .compare import in_order
    from .page import render
    from .runs import find_runs, is_run, read_run

    paths = [Path(p) for p in ([run_dirs] if isinstance(run_dirs, (str, os.PathLike)) else run_dirs)]
    if not paths:
        raise DataError("run_dirs: expected at least one folder, got none")
    runs = [read_run(path) for path in find_runs(paths)]
    if is_run(paths[0]):
        detailed = runs[:1]
    else:
        runs = in_order(runs)
        detailed = runs[:MAX_DETAILED]
    out = paths[0] / FILE_NAME if out is None else Path(out)
    if not overwrite and out.is_file() and MARK not in read_bytes(out):
        raise DataError(f"{out}: expected no file or an older report, got another file (see --overwrite)")
    atomic_write(out, render(runs, detailed))
    return out
