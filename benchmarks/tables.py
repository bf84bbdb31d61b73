"""Tables of README.md and docs/measured.md and the plots in docs/plots, all made of the committed rows.

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

from sapo_kernels.files import atomic_write

from . import aot, plots
from .end_to_end import summary
from .peers import PEERS
from .rows import RESULTS, ROOT, Row, read_rows
from .suite_summary import ceilings, seconds, size, table

FILES = ("README.md", "docs/measured.md")
PLOTS = ROOT / "docs" / "plots"
MARKED = re.compile(r"(<!-- table: ([a-z0-9 -]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
ABSENT = "No rows yet: `{}` writes them."
CPU_COMMAND, GPU_COMMAND = "python -m benchmarks --data DIR", "python -m benchmarks.gpu_suite --minutes 9 --out DIR"


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


def _job(shape: str) -> str:
    """A row's shape without the token ratio, which is another one in every case."""
    return re.sub(r" dense/trie=\S+", "", shape)


def fastest(rows: list[Row]) -> tuple[str, float]:
    """(name, p50 seconds) of the fastest peer of a case."""
    by = {name: value for name, value in summary(rows).items() if name in PEERS}
    return min(by.items(), key=lambda item: item[1]) if by else ("none", math.nan)


def end_to_end(results: Path) -> list[str]:
    """Every provider of the one-task cases, times and ratios."""
    lines: list[str] = []
    for case, rows in cases_of("end_to_end", results).items():
        ours = next(row for row in rows if row.provider == "ours")
        lines += [f"{case}: {ours.shape}, {ours.dtype}", ""]
        body = []
        for row in rows:
            peer = next(
                (p for n, p in PEERS.items() if row.provider == n or row.provider.rpartition("_")[0] == n), None
            )
            body.append(
                [f"{row.provider}: {peer.about}" if peer else "sapo_kernels", seconds(row.p50_s),
                 f"{row.p50_s / ours.p50_s:.2f}x", size(row.peak_bytes), f"{row.error:.1g}"]
            )  # fmt: skip
        lines += table(["provider", "p50", "of ours", "peak memory", "error, nats a token"], body) + [
            "",
            where(rows),
            "",
        ]
    return lines[:-1]


TASK_PEERS = {
    "trainer_loop": "the published loop",
    "tuned_plain": "tuned transformers",
    "prefix_cache": "a prefix cache",
}


def task_ratios(results: Path) -> dict[str, tuple[float, dict[str, float], list[Row]]]:
    """Task -> (dense / trie tokens, times each peer's p50, rows)."""
    made = {}
    for case, rows in cases_of("tasks", results).items():
        by = summary(rows)
        times = {peer: by[peer] / by["ours"] for peer in TASK_PEERS if peer in by}
        made[case] = float(shape_value(rows[0], "dense/trie")), times, rows
    return made


def tasks(results: Path) -> list[str]:
    """All tasks: token ratio, times the published loop, tuned transformers and a prefix cache; geometric means."""
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
    shape = re.sub(r" M=\S+", "", _job(rows[0].shape))
    return table(header, body) + ["", f"{shape}, {rows[0].dtype}; {where(rows)}"]


def sweep_ratios(results: Path) -> list[tuple[str, float, float, str, float]]:
    """(point, dense / trie, times faster than the fastest peer, its name, ours seconds) of every sweep point."""
    made = []
    for case, rows in cases_of("sweep", results).items():
        ours = next(row for row in rows if row.provider == "ours")
        name, best = fastest(rows)
        made.append((case, float(shape_value(ours, "dense/trie")), best / ours.p50_s, name, ours.p50_s))
    return made


def sweep(results: Path) -> list[str]:
    """One thing changed at a time, the losses named."""
    found = sweep_ratios(results)
    if not found:
        return []
    body = [[point, f"{ratio:.2f}", seconds(ours), name, f"{gain:.2f}"] for point, ratio, gain, name, ours in found]
    lost = [f"{point} ({gain:.2f}x, {name})" for point, _, gain, name, _ in found if gain < 1]
    lines = table(["changed", "dense / trie tokens", "ours, p50", "fastest peer", "times faster than it"], body)
    usual = next((rows[0] for case, rows in cases_of("sweep", results).items() if case == "layout=first"), None)
    told = [f"Unless a line says otherwise: {_job(usual.shape)}, {usual.dtype}; {where([usual])}", ""] if usual else []
    return [*lines, "", *told, f"Slower than the fastest peer at: {', '.join(lost) if lost else 'no point of it'}."]


def operators(results: Path) -> list[str]:
    """p50 of every provider of the operators, one line a case."""
    body = []
    for op in ("tree_attention", "linear_logprob", "accumulate", "reweight", "planner"):
        for case, rows in cases_of(op, results).items():
            ours = next((row for row in rows if row.provider == "ours"), None)
            if ours is None:
                continue
            others = [f"{r.provider} {r.p50_s / ours.p50_s:.2f}x" for r in rows if r is not ours]
            rate = f"{ours.work / ours.p50_s / 1e9:.3g} G{ours.work_unit}/s" if ours.work else "-"
            body.append([f"{op}: {case}", ours.shape, seconds(ours.p50_s), rate, ", ".join(others)])
    return table(["case", "shape", "ours, p50", "rate", "others, of ours"], body) if body else []


def gpu(results: Path) -> list[str]:
    """The GPU suite's rows, every op of it, with what the ceilings of the same run allow."""
    rows = read_rows(results / "gpu.csv")
    if not rows:
        return []
    lines: list[str] = []
    by_run = newest(rows)
    reached = ceilings([row for found in by_run.values() for row in found])
    body = []
    for (op, case), found in by_run.items():
        ours = next((row for row in found if row.provider == "ours"), None)
        for row in found:
            share = f"{row.work / row.p50_s / reached[row.work_unit]:.0%}" if row.work_unit in reached else "-"
            times = f"{row.p50_s / ours.p50_s:.2f}x" if ours else "-"
            body.append([f"{op}: {case}", row.provider, seconds(row.p50_s), times, share, size(row.peak_bytes)])
    lines += table(["case", "provider", "p50", "of ours", "of ceiling", "peak memory"], body)
    return [*lines, "", where(rows)]


def ahead_of_time(results: Path) -> list[str]:
    """Registers, shared memory and the bound on resident warps of each configuration in use; then the candidates."""
    path = results / "aot.csv"
    if not path.exists():
        return []
    uses = aot.read_uses(path)
    targets = list(aot.PARTS)[:1] + ["sm_90", "sm_100"]
    shapes: dict[tuple[str, str], dict[str, aot.Use]] = {}
    for use in uses:
        if use.role == "in use":
            shapes.setdefault((use.kernel, use.shape), {})[use.target] = use

    def cell(use: aot.Use | None) -> str:
        if use is None:
            return "-"
        spills = f", {use.spills} B spilled" if use.spills else ""
        return f"{use.configuration}: {use.registers} / {use.shared / 1024:.0f} / {use.warps} of {use.warps_of}{spills}"

    body = [
        [f"{kernel} {shape}".strip(), *(cell(found.get(t)) for t in targets)]
        for (kernel, shape), found in shapes.items()
    ]
    lines = ["Tile, warps, stages: registers / shared KiB / warps resident at most.", ""]
    lines += table(["kernel", *targets], body)
    candidates = [use for use in uses if use.role == "candidate"]
    if candidates:
        lines += ["", f"Candidates that the GPU suite tries on {candidates[0].target}:", ""]
        lines += table(
            ["kernel", "configuration", "registers", "spills, B", "shared KiB", "warps", "unfit"],
            [[f"{u.kernel} {u.shape}".strip(), u.configuration, str(u.registers), str(u.spills),
              f"{u.shared / 1024:.0f}", f"{u.warps} of {u.warps_of}", u.complaint] for u in candidates],
        )  # fmt: skip
    return [*lines, "", f"{len(uses)} compilations, triton {uses[0].triton}."]


TABLES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "end to end": (end_to_end, CPU_COMMAND),
    "tasks": (tasks, CPU_COMMAND),
    "sweep": (sweep, CPU_COMMAND),
    "operators": (operators, CPU_COMMAND),
    "gpu": (gpu, GPU_COMMAND),
    "ahead of time": (ahead_of_time, "python -m benchmarks.aot"),
}


def made_table(name: str, results: Path = RESULTS) -> str:
    if name not in TABLES:
        raise SystemExit(f"table {name!r}: expected one of {', '.join(TABLES)}")
    function, command = TABLES[name]
    return "\n".join(function(results) or [ABSENT.format(command)]) + "\n"


def replaced(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked table made anew."""
    if len(re.findall(r"<!-- table: ", text)) != len(MARKED.findall(text)):
        raise SystemExit("a table has no end, or a name with other characters than a-z, 0-9, blanks and hyphens")
    return MARKED.sub(lambda m: m[1] + "\n" + made_table(m[2], results) + "\n" + m[4], text)


def made_plots(results: Path = RESULTS) -> dict[str, str]:
    """File name -> SVG text of every plot that there are rows for."""
    made = {}
    found = task_ratios(results)
    groups = [(case, [*(times.get(p) for p in TASK_PEERS), ratio]) for case, (ratio, times, _) in found.items()]
    if groups:
        names = [*(f"over {name}" for name in TASK_PEERS.values()), "dense / trie tokens"]
        made["tasks.svg"] = plots.bars("Times faster, by task", names, groups, line=1.0)
    points = [(point, [gain, ratio]) for point, ratio, gain, _, _ in sweep_ratios(results)]
    if points:
        names = ["over the fastest peer", "dense / trie tokens"]
        made["sweep.svg"] = plots.bars("One thing changed at a time", names, points, line=1.0)
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--write", action="store_true")
    options = parser.parse_args(argv)
    wanted = {ROOT / name: replaced((ROOT / name).read_text(encoding="utf-8")) for name in FILES}
    wanted |= {PLOTS / name: text for name, text in made_plots().items()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if options.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, wanted[path])
        print(f"{path.relative_to(ROOT)}: {'written' if options.write else 'differs from the rows'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
