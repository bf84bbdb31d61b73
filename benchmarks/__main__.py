"""Run the benchmarks of a CPU, or of a GPU's operators, within a time; the rows go to benchmarks/results.

    python -m benchmarks                                   # everything, under ten minutes on two cores
    python -m benchmarks --data DIR --minutes 9             # more minutes: more examples a task
    python -m benchmarks --only end_to_end tree_attention
    python -m benchmarks --size toy --out /tmp/rows         # does it start? the figures mean nothing

Each file runs in a process of its own with its own share of the time: what fails or hangs takes nothing else with it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from .rows import RESULTS, ROOT

# File and its share of the time, in the order in which they run.
PARTS = {
    "planner": 0.02, "accumulate": 0.02, "reweight": 0.02, "tree_attention": 0.04, "linear_logprob": 0.06,
    "end_to_end": 0.52, "sweeps": 0.32,
}  # fmt: skip
# The minutes that a case's own size is meant for.
USUAL = 9.0
GRACE = 45.0


def command(part: str, options, seconds: float) -> list[str]:
    made = [sys.executable, "-m", "pytest", f"benchmarks/bench_{part}.py", "-q", "-p", "no:cacheprovider", "-rs"]
    made += ["--benchmark-quiet", "--benchmark-disable-gc"]
    made += [f"--bench-size={options.size}", f"--bench-device={options.device}", f"--bench-seconds={seconds:.0f}"]
    made += [f"--bench-scale={max(1.0, options.minutes / USUAL):.3f}"]
    made += [f"--bench-out={options.out.resolve()}"] if options.out else []
    return made + ([f"--bench-data={options.data.resolve()}"] if options.data else [])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--data", type=Path, help="folder with SUPERNI/ and paraphrases.json (default: bundled)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files (default: %(default)s)")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(argv)
    if options.size == "toy" and options.out.resolve() == RESULTS:
        parser.error("--size toy: expected --out, for toy figures do not belong among the results")
    if not 0 < options.minutes < 1e6:
        parser.error(f"--minutes: expected a positive number, got {options.minutes}")
    if options.data and not (options.data / "SUPERNI" / "instructions.json").is_file():
        parser.error(f"--data: expected a folder with SUPERNI/instructions.json, got {options.data}")
    started, failed = time.monotonic(), []
    total = options.minutes * 60
    waiting = [part for part in PARTS if part in options.only]
    while waiting:
        # What the parts before left over is shared by those that follow.
        left = total - (time.monotonic() - started)
        part, share = waiting[0], PARTS[waiting[0]] / sum(PARTS[p] for p in waiting)
        waiting = waiting[1:]
        seconds = max(5.0, left * share)
        print(f"== {part}: {seconds:.0f} s", flush=True)
        try:
            # No case begins after its seconds; the last one may end a little later, and one that hangs is ended.
            done = subprocess.run(command(part, options, seconds), cwd=ROOT, timeout=max(30.0, left) + GRACE)
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        if code not in (0, 5):  # 5: nothing to run for this device
            failed.append(f"{part} ({code})")
    print(f"{time.monotonic() - started:.0f} s; " + (f"failed: {', '.join(failed)}" if failed else "all parts passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
