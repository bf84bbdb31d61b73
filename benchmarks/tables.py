"""Tables and plots of the documents, all made of the committed rows.

    python -m benchmarks.tables --check      # do files and rows agree? exit 1 and say where not
    python -m benchmarks.tables --write

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what is between them is replaced. All
rows of one case come from one run, the newest.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from sapo_kernels.files import DataError, atomic_write

from . import aot, ops, plots  # noqa: F401
from .documents import outdated, seconds, size, table
from .peers import PEERS
from .registry import OPS
from .rows import RESULTS, ROOT, Row, read_rows

PLOTS = ROOT / "docs" / "plots"
TASK_PEERS = {
    "trainer_loop": "the published loop", "tuned_plain": "tuned transformers", "prefix_cache": "a prefix cache",
}  # fmt: skip


def newest(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """(op, case) -> the rows of its newest run, in the order in which cases first appear."""
    runs: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        runs.setdefault((row.op, row.case), {}).setdefault(row.environment.date, []).append(row)
    return {key: by_date[max(by_date)] for key, by_date in runs.items()}


def cases_of(op: str, results: Path) -> dict[str, list[Row]]:
    return {case: rows for (_, case), rows in newest(read_rows(results / f"{op}.csv")).items()}


def where(rows: list[Row]) -> str:
    """The line under a table: what it was measured on."""
    found = sorted({
        f"{e.device}, {e.threads} threads, torch {e.torch}, transformers {e.transformers}, commit {e.commit}, "
        f"{e.date[:10]}" for e in (row.environment for row in rows)
    })  # fmt: skip
    return "; ".join(found) + "."


def shape_value(row: Row, name: str) -> str:
    found = re.search(rf"(?:^| ){re.escape(name)}=(\S+)", row.shape)
    return found[1] if found else "-"


def _job(shape: str, *names: str) -> str:
    """A row's shape without the values that are others in every case."""
    return re.sub(rf" (?:{'|'.join(['dense/trie', *names])})=\S+", "", shape)


def ours_of(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row.provider == "ours"), None)


def peer_of(row: Row) -> str:
    """The peer that a provider is a size of, or the provider."""
    names = (row.provider, row.provider.rpartition("_")[0])
    return next((name for name in PEERS if name in names), row.provider)


def fastest_sizes(rows: list[Row]) -> dict[str, float]:
    """p50 seconds of one case by peer, the fastest of its sizes."""
    best: dict[str, float] = {}
    for row in rows:
        best[peer_of(row)] = min(best.get(peer_of(row), math.inf), row.p50_s)
    return best


def end_to_end(results: Path) -> list[str]:
    """Every provider of the one-task cases, times and ratios."""
    lines: list[str] = []
    for case, rows in cases_of("end_to_end", results).items():
        ours = ours_of(rows)
        body = [
            [f"{row.provider}: {PEERS[peer_of(row)].about}" if peer_of(row) in PEERS else "sapo_kernels",
             seconds(row.p50_s), f"{row.p50_s / ours.p50_s:.2f}x", size(row.peak_bytes), f"{row.error:.1g}"]
            for row in rows
        ]  # fmt: skip
        made = table(["provider", "p50", "of ours", "peak memory", "error, nats a token"], body)
        lines += [f"{case}: {ours.shape}, {ours.dtype}", "", *made, "", where(rows), ""]
    return lines[:-1]


def task_ratios(results: Path) -> dict[str, tuple[float, dict[str, float], list[Row]]]:
    """Task -> (dense / trie tokens, times each peer's p50, rows)."""
    made = {}
    for case, rows in cases_of("tasks", results).items():
        by = fastest_sizes(rows)
        times = {peer: by[peer] / by["ours"] for peer in TASK_PEERS if peer in by}
        made[case] = float(shape_value(rows[0], "dense/trie")), times, rows
    return made


def tasks(results: Path) -> list[str]:
    """Every task of the data folder: the token ratio, and how many times ours the peers take."""
    found = task_ratios(results)
    if not found:
        return []
    body = []
    for case, (ratio, times, rows) in found.items():
        cells = [f"{times[peer]:.2f}" if peer in times else "-" for peer in TASK_PEERS]
        of_ratio = f"{times['tuned_plain'] / ratio:.0%}" if "tuned_plain" in times else "-"
        body.append([case, shape_value(rows[0], "M"), f"{ratio:.2f}", *cells, of_ratio])
    columns = [[times[peer] for _, times, _ in found.values() if peer in times] for peer in TASK_PEERS]
    means = [f"{statistics.geometric_mean(values):.2f}" if values else "-" for values in columns]
    body.append(["geometric mean", "", "", *means, ""])
    peers = [f"times {name}" for name in TASK_PEERS.values()]
    header = ["task", "examples", "dense / trie tokens", *peers, "tuned, of ratio"]
    rows = [row for _, _, rows in found.values() for row in rows]
    return [*table(header, body), "", f"{_job(rows[0].shape, 'M')}, {rows[0].dtype}; {where(rows)}"]


def real_model(results: Path) -> list[str]:
    """A pretrained model: seconds of every peer, and how many times ours that is."""
    peers = ("trainer_loop", "lm_eval", "tuned_plain", "prefix_cache", "race")
    body, rows = [], []
    for case, found in cases_of("race", results).items():
        by = fastest_sizes(found)
        times = [f"{by[peer]:.1f} ({by[peer] / by['ours']:.2f}x)" if peer in by else "-" for peer in peers]
        body.append(
            [case, shape_value(found[0], "M"), shape_value(found[0], "dense/trie"), f"{by['ours']:.1f}", *times]
        )
        rows += found
    if not rows:
        return []
    header = ["task", "examples", "dense / trie tokens", "every cell, s", *(f"{peer}, s" for peer in peers)]
    return [*table(header, body), "", f"{_job(rows[0].shape, 'M')}, {rows[0].dtype}; {where(rows)}"]


def sweep(results: Path) -> list[str]:
    """One thing changed at a time, the losses named."""
    body, lost = [], []
    found = cases_of("sweep", results)
    for point, rows in found.items():
        ours, by = ours_of(rows), fastest_sizes(rows)
        name = min((peer for peer in by if peer in PEERS), key=by.__getitem__)
        gain = by[name] / ours.p50_s
        body.append([point, f"{float(shape_value(ours, 'dense/trie')):.2f}", seconds(ours.p50_s), name, f"{gain:.2f}"])
        lost += [f"{point} ({gain:.2f}x, {name})"] if gain < 1 else []
    if not body:
        return []
    lines = table(["changed", "dense / trie tokens", "ours, p50", "fastest peer", "times faster than it"], body)
    usual = next((rows[0] for case, rows in found.items() if case == "layout=first"), None)
    told = [f"Unless a line says otherwise: {_job(usual.shape)}, {usual.dtype}; {where([usual])}", ""] if usual else []
    return [*lines, "", *told, f"Slower than the fastest peer at: {', '.join(lost) if lost else 'no point of it'}."]


def operators(results: Path) -> list[str]:
    """p50 of every provider of the operators, one line a case."""
    body = []
    for op in (
        "tree_attention",
        "tree_attention_backward",
        "linear_logprob",
        "linear_logprob_backward",
        "accumulate",
        "reweight",
        "planner",
    ):
        for case, rows in cases_of(op, results).items():
            if (ours := ours_of(rows)) is None:
                continue
            others = [f"{r.provider} {r.p50_s / ours.p50_s:.2f}x" for r in rows if r is not ours]
            rate = f"{ours.work / ours.p50_s / 1e9:.3g} G{ours.work_unit}/s" if ours.work else "-"
            body.append([f"{op}: {case}", ours.shape, seconds(ours.p50_s), rate, ", ".join(others)])
    return table(["case", "shape", "ours, p50", "rate", "others, of ours"], body) if body else []


def ceilings(rows: list[Row]) -> dict[str, float]:
    """Bytes and operations a second of the ceilings' best quantile, by unit."""
    return {row.work_unit: row.work / row.p20_s for row in rows if row.op == "ceiling"}


def against_ceilings(cases: dict[tuple[str, str], list[Row]], rows: list[Row]) -> list[str]:
    """Every provider of some cases, with what the ceilings of the same commit among `rows` allow."""
    body = []
    for (op, case), found in cases.items():
        ours = ours_of(found)
        reached = ceilings([row for row in rows if row.environment.commit == found[0].environment.commit])
        for row in found:
            share = f"{row.work / row.p50_s / reached[row.work_unit]:.0%}" if row.work_unit in reached else "-"
            times = f"{row.p50_s / ours.p50_s:.2f}x" if ours else "-"
            body.append([f"{op}: {case}", row.provider, seconds(row.p50_s), times, share, size(row.peak_bytes)])
    header = ["case", "provider", "p50", "of ours", "of ceiling", "peak memory"]
    return [*table(header, body), "", where([row for found in cases.values() for row in found])]


def gpu(results: Path) -> list[str]:
    """The operators and models of the GPU suite's newest rows."""
    rows = [row for path in sorted(results.glob("gpu/*.csv")) for row in read_rows(path)]
    shown = {key: found for key, found in newest(rows).items() if key[0] in OPS}
    return against_ceilings(shown, rows) if shown else []


TABLES: dict[str, Callable[[Path], list[str]]] = {
    "end to end": end_to_end,
    "tasks": tasks,
    "real model": real_model,
    "sweep": sweep,
    "operators": operators,
    "gpu": gpu,
    "ahead of time": lambda _: aot.made_table(),
}


def made_table(name: str, results: Path = RESULTS) -> list[str]:
    """The lines of a table."""
    if name not in TABLES:
        raise DataError(f"table {name!r}: expected one of {', '.join(TABLES)}")
    return TABLES[name](results) or ["No rows yet."]


def made_plots(results: Path = RESULTS) -> dict[str, str]:
    """File name -> SVG text of every plot that there are rows for."""
    found = task_ratios(results)
    groups = [(case, [*(times.get(p) for p in TASK_PEERS), ratio]) for case, (ratio, times, _) in found.items()]
    names = [*(f"over {name}" for name in TASK_PEERS.values()), "dense / trie tokens"]
    return {"tasks.svg": plots.bars("Times faster, by task", names, groups, line=1.0)} if groups else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--write", action="store_true")
    options = parser.parse_args(argv)
    stale = outdated("table", made_table, options.write)
    for name, text in made_plots().items():
        path = PLOTS / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if options.write:
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, text)
    print("\n".join(f"{name}: {'written' if options.write else 'differs from the rows'}" for name in stale))
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
