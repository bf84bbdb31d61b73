"""Run the benchmarks of a CPU within a time; the rows go to benchmarks/results.

    python -m benchmarks                                   # everything, under ten minutes on two cores
    python -m benchmarks --data DIR --minutes 18            # more minutes: more examples a task
    python -m benchmarks --only race --base smollm2 --data DIR --minutes 60 --scale 0.04 --cases task141 task195
    python -m benchmarks --size toy --out /tmp/rows         # does it start? the figures mean nothing

Of several operations each runs in a process of its own with its own share of the time: what fails or hangs takes
nothing else with it. Outputs are checked before a time is kept, and the line of a case shows all its providers.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .apart import run_apart, shared_out
from .gpu_parts import Job
from .gpu_parts.measure import operators
from .registry import OPS, Setting
from .rows import RESULTS
from .workload import data_folder

# The minutes that a case's own size is meant for, and seconds for a process that ends late.
USUAL, GRACE = 9.0, 45.0


def measure(op: str, options) -> list[str]:
    """All cases of one operation, in this process; what failed. None begins after the deadline."""
    setting = Setting(toy=options.size == "toy", data=data_folder(options.data), scale=options.scale, base=options.base)
    try:
        operators(Job(setting, 60 * options.minutes, options.out / f"{op}.csv", options.cases), op)
    except RuntimeError as error:
        return [str(error)]
    return []


def measure_apart(options, given: list[str]) -> list[str]:
    """Each operation in a process of its own; the names of those that did not pass."""
    failed, shares = [], {op: OPS[op].share or 1.0 for op in OPS if op in options.only}
    for op, share, left in shared_out(shares, options.minutes * 60):
        seconds = max(5.0, share)
        print(f"== {op}: {seconds:.0f} s", flush=True)
        # Later options overrule those given.
        command = [sys.executable, "-m", "benchmarks", *given, "--out", str(options.out.resolve()), "--only", op]
        command += ["--minutes", f"{seconds / 60}", "--scale", f"{options.scale}"]
        command += ["--data", str(options.data.resolve())] if options.data else []
        status = run_apart(command, None, max(30.0, left) + GRACE)
        failed += [f"{op} ({status})"] if status != "passed" else []
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=USUAL)
    parser.add_argument("--data", type=Path, help="folder with SUPERNI/ and paraphrases.json (default: bundled)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files (default: %(default)s)")
    parser.add_argument("--only", nargs="*", choices=list(OPS), default=[op for op in OPS if OPS[op].share])
    parser.add_argument("--cases", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--scale", type=float, help="times as many examples as usual (default: as minutes allow)")
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--base", help="smollm2, gemma3-270m or a .gguf file, for the races")
    given = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(given)
    if options.size == "toy" and options.out.resolve() == RESULTS:
        parser.error("--size toy: expected --out, for toy figures do not belong among the results")
    if not 0 < options.minutes < 1e6:
        parser.error(f"--minutes: expected a positive number, got {options.minutes}")
    if options.data and not (options.data / "SUPERNI" / "instructions.json").is_file():
        parser.error(f"--data: expected a folder with SUPERNI/instructions.json, got {options.data}")
    if "race" in options.only and options.base is None:
        parser.error("--only race: expected --base, the model to race on")
    options.scale = options.scale or max(1.0, options.minutes / USUAL)
    started = time.monotonic()
    failed = measure(options.only[0], options) if len(options.only) == 1 else measure_apart(options, given)
    print(f"{time.monotonic() - started:.0f} s; " + (f"failed: {', '.join(failed)}" if failed else "all parts passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
