"""The page: the templates of this package, filled with what `views` makes of the runs."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..sequence.folder import Run
from . import text, views
from .compare import group_runs

MAX_GROUPS = 12


def render(runs: Sequence[Run], detailed: Sequence[Run]) -> str:
    """The whole document. detailed: the runs with sections of their own, at least one; all of them are in `runs`."""
    single = detailed[0] if len(detailed) == 1 else None
    groups = group_runs(runs)
    own = [group for group in groups if not single or single in group.runs]
    compared = [group for group in own if len(group.runs) > 1]
    comparisons = [
        views.comparison(one, one.arm_of(single) if single else one.arms[0]) for one in compared[:MAX_GROUPS]
    ]
    return _environment().get_template("page.html").render(
        title=_title(runs, single),
        single=single,
        runs=runs,
        detailed=[(run, next(one for one in groups if run in one.runs).baseline(run)) for run in detailed],
        comparisons=comparisons,
        left_out=len(compared[MAX_GROUPS:]),
        foreign=len(runs) - sum(len(group.runs) for group in own),
        latest=max(run.record.finished or run.record.started for run in runs),
    )  # fmt: skip


def _title(runs: Sequence[Run], single: Run | None) -> str:
    """What was trained on what, in words."""
    if single:
        record = single.record
        tasks = f"{len(record.tasks)} tasks in a row" if len(record.tasks) > 1 else "One task"
        return f"{tasks}, trained with {views.POLICIES.get(record.policy, record.policy)}"
    return f"{text.plural(len(runs), 'run')} of tasks in a row, compared by their prompts"


def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("sapo_peft.report"), autoescape=True, undefined=StrictUndefined, finalize=text.visible,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    names = ("line", "name", "fixed", "signed", "percent", "whole", "seconds", "plural", "figure", "unit")
    found.filters.update({name: getattr(text, name) for name in names})
    found.tests["left_original"] = views.left_original
    found.globals.update(views=views)
    return found
