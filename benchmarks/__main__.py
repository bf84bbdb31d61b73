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

from . import ops  # noqa: F401
from .apart import run_apart, shared_out
from .registry import OPS
from .rows import RESULTS

# The minutes that a case's own size is meant for.
USUAL = 9.0
GRACE = 45.0


def command(op: str, options, seconds: float) -> list[str]:
    made = [sys.executable, "-m", "pytest", "benchmarks/bench_ops.py", "-q", "-p", "no:cacheprovider", "-rs"]
    made += ["--benchmark-quiet", "--benchmark-disable-gc", f"--bench-op={op}", f"--bench-out={options.out.resolve()}"]
    made += [f"--bench-size={options.size}", f"--bench-device={options.device}", f"--bench-seconds={seconds:.0f}"]
    made += [f"--bench-scale={max(1.0, options.minutes / USUAL):.3f}"]
    made += [f"--bench-base={options.base}"] if options.base else []
    return made + ([f"--bench-data={options.data.resolve()}"] if options.data else [])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--data", type=Path, help="folder with SUPERNI/ and paraphrases.json (default: bundled)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files (default: %(default)s)")
    parser.add_argument("--only", nargs="*", choices=list(OPS), default=[op for op in OPS if OPS[op].share])
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--base", help="smollm2, gemma3-270m or a .gguf file, for the races")
    options = parser.parse_args(argv)
    if options.size == "toy" and options.out.resolve() == RESULTS:
        parser.error("--size toy: expected --out, for toy figures do not belong among the results")
    if not 0 < options.minutes < 1e6:
        parser.error(f"--minutes: expected a positive number, got {options.minutes}")
    if options.data and not (options.data / "SUPERNI" / "instructions.json").is_file():
        parser.error(f"--data: expected a folder with SUPERNI/instructions.json, got {options.data}")
    if "race" in options.only and options.base is None:
        parser.error("--only race: expected --base, the model to race on")
    started, failed = time.monotonic(), []
    shares = {op: OPS[op].share or 1.0 for op in OPS if op in options.only}
    for op, share, left in shared_out(shares, options.minutes * 60):
        seconds = max(5.0, share)
        print(f"== {op}: {seconds:.0f} s", flush=True)
        # No case begins after its seconds; the last one may end a little later. 5: nothing to run for this device.
        status = run_apart(command(op, options, seconds), None, max(30.0, left) + GRACE, well=(0, 5))
        failed += [f"{op} ({status})"] if status != "passed" else []
    print(f"{time.monotonic() - started:.0f} s; " + (f"failed: {', '.join(failed)}" if failed else "all parts passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
