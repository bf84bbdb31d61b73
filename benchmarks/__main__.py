"""Run the benchmarks of a CPU, or of a GPU's operators, within a time; the rows go to benchmarks/results.

    python -m benchmarks                                   # everything, under ten minutes on two cores
    python -m benchmarks --data DIR --minutes 9             # more minutes: more examples a task
    python -m benchmarks --only end_to_end tree_attention
    python -m benchmarks --only race --base smollm2 --data DIR --minutes 60
    python -m benchmarks --size toy --out /tmp/rows         # does it start? the figures mean nothing

Each operation runs in a process of its own with its own share of the time: what fails or hangs takes nothing else with
it. Providers take turns, their outputs are checked before a time is kept, and the line of a case shows them all.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from . import ops  # noqa: F401
from .apart import run_apart, shared_out
from .registry import OPS, Setting
from .rows import RESULTS, Row, append_rows
from .timing import Turns
from .workload import data_folder

# The minutes that a case's own size is meant for.
USUAL = 9.0
GRACE = 45.0


def command(op: str, options, seconds: float) -> list[str]:
    made = [sys.executable, "-m", "benchmarks", "--here", f"{seconds:.0f}", "--only", op, "--size", options.size]
    made += ["--out", str(options.out.resolve()), "--device", options.device, "--minutes", str(options.minutes)]
    made += ["--base", options.base] if options.base else []
    return made + (["--data", str(options.data.resolve())] if options.data else [])


def measure(op: str, options) -> None:
    """Every case of an operation in this process: one turn of every provider after the other, then its rows.

    Near the deadline a case takes fewer rounds, but two at least; past it none begins.
    """
    setting = Setting(
        options.device, options.size == "toy", data_folder(options.data), max(1.0, options.minutes / USUAL),
        base=options.base,
    )  # fmt: skip
    if setting.device == "cpu" and setting.toy:
        torch.set_num_threads(1)
    deadline = time.monotonic() + options.here
    for name in OPS[op].names(setting):
        if time.monotonic() > deadline:
            print(f"{op}, {name}: no time left")
            continue
        case = OPS[op].build(name, setting)
        if setting.toy:
            case.name, case.rounds = f"toy {name}", 2
        turns = Turns(case, setting.device)
        turns.warm_up()
        started = time.monotonic()
        turns.turn()
        left = (deadline - time.monotonic()) / max(time.monotonic() - started, 1e-9)
        for _ in range(max(1, min(case.rounds - 1, int(left)))):
            turns.turn()
        rows = turns.rows()
        append_rows(options.out / f"{case.op}.csv", rows)
        print(f"{op}, {name}: {line(rows)}", flush=True)


def line(rows: list[Row]) -> str:
    """Providers with their p50 and how many times ours that is."""
    ours = next((row.p50_s for row in rows if row.provider == "ours"), None)
    return ", ".join(
        f"{row.provider} {row.p50_s * 1e3:.4g} ms{f' ({row.p50_s / ours:.2f}x)' if ours else ''}"
        + (f" [{row.note}]" if row.note else "")
        for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--data", type=Path, help="folder with SUPERNI/ and paraphrases.json (default: bundled)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files (default: %(default)s)")
    parser.add_argument("--only", nargs="*", choices=list(OPS), default=[op for op in OPS if OPS[op].share])
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--base", help="smollm2, gemma3-270m or a .gguf file, for the races")
    parser.add_argument("--here", type=float, help=argparse.SUPPRESS)  # seconds, for the one operation of --only
    options = parser.parse_args(argv)
    if options.size == "toy" and options.out.resolve() == RESULTS:
        parser.error("--size toy: expected --out, for toy figures do not belong among the results")
    if not 0 < options.minutes < 1e6:
        parser.error(f"--minutes: expected a positive number, got {options.minutes}")
    if options.data and not (options.data / "SUPERNI" / "instructions.json").is_file():
        parser.error(f"--data: expected a folder with SUPERNI/instructions.json, got {options.data}")
    if "race" in options.only and options.base is None:
        parser.error("--only race: expected --base, the model to race on")
    if options.here:
        measure(options.only[0], options)
        return 0
    started, failed = time.monotonic(), []
    shares = {op: OPS[op].share or 1.0 for op in OPS if op in options.only}
    for op, share, left in shared_out(shares, options.minutes * 60):
        seconds = max(5.0, share)
        print(f"== {op}: {seconds:.0f} s", flush=True)
        # No case begins after its seconds; the last one may end a little later.
        status = run_apart(command(op, options, seconds), None, max(30.0, left) + GRACE)
        failed += [f"{op} ({status})"] if status != "passed" else []
    print(f"{time.monotonic() - started:.0f} s; " + (f"failed: {', '.join(failed)}" if failed else "all parts passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
