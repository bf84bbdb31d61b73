"""The whole measurement of one GPU by one command, unattended, within a time.

    python -m benchmarks.gpu_suite --minutes 9 --out DIR
    python -m benchmarks.gpu_suite --toy --out DIR         # every part at toy size on the CPU: does it start?
    python -m benchmarks.gpu_suite --out DIR --only ceilings tree_attention

Needs this checkout, torch, triton, transformers and pytest, and downloads nothing: models are random and drawn on the
device. Every part runs in a process of its own with its share of the time that is left; one that fails or hangs is
ended and named, and the others go on. DIR/rows.csv and DIR/summary.md grow as parts are done; DIR/logs holds what each
printed. The exit status is 1 if a part failed, was ended or had no time; what is skipped for want of a tool says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from sapo_kernels.files import atomic_write

from .apart import run_apart, shared_out
from .documents import table
from .gpu_parts import NO_TIME, NOTE, PARTS, STATUS, Job, run_part
from .registry import Setting
from .rows import ROOT, csv_text, read_rows
from .tables import against_ceilings, ceilings, newest

# Between a part's own deadline and its end by force, and what is kept for writing at the end.
GRACE_SECONDS = 15.0
CLOSING_SECONDS = 5.0


def child_environment(toy: bool) -> dict[str, str]:
    """The packages of this checkout whether or not they are installed; no network. Toys run in Triton's interpreter."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [kept.get("PYTHONPATH")])]
    kept |= {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | ({"TRITON_INTERPRET": "1"} if toy else {})


def job_of(name: str, options, seconds: float) -> Job:
    """At toy size Triton's interpreter takes the place of the compiled kernels."""
    kind = {"device": "cpu", "toy": True, "impl": "triton"} if options.toy else {"device": "cuda"}
    return Job(Setting(**kind, data=options.data), seconds, options.out / "rows" / f"{name}.csv")


def part_command(name: str, options, seconds: float) -> list[str]:
    made = [sys.executable, "-m", "benchmarks.gpu_suite", "--part", name, "--out", str(options.out)]
    made += [f"--minutes={seconds / 60}", *(["--toy"] if options.toy else [])]
    return made + (["--data", str(options.data.resolve())] if options.data else [])


def run_part_apart(name: str, options, seconds: float, limit: float) -> str:
    """The part in a process of its own, ended after `limit`; how it ended."""
    log = options.out / "logs" / f"{name}.log"
    status = run_apart(part_command(name, options, seconds), log, limit, env=child_environment(options.toy))
    said = log.read_text(encoding="utf-8", errors="replace").rpartition(STATUS)
    if status != "passed":
        return status
    return said[2].strip() if said[1] else f"failed (it ended without a status; logs/{name}.log)"


def write_results(out: Path, outcomes: list[list[str]], started: float) -> None:
    """rows.csv and summary.md, of all parts so far and in the parts' order."""
    rows = [row for name in PARTS for row in read_rows(out / "rows" / f"{name}.csv")]
    if rows:
        atomic_write(out / "rows.csv", csv_text(rows))
    lines = ["# GPU suite", "", f"{time.monotonic() - started:.0f} s.", ""]
    lines += table(["part", "how it ended", "s"], outcomes)
    lines += ["", *(f"- ceiling: {value / 1e12:.4g} T{unit}/s" for unit, value in ceilings(rows).items()), ""]
    if measured := {key: found for key, found in newest(rows).items() if key[0] != "ceiling"}:
        lines += against_ceilings(measured, rows)
    for name, log in ((name, out / "logs" / f"{name}.log") for name in PARTS):
        found = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        if notes := [line.removeprefix(NOTE) for line in found if line.startswith(NOTE)]:
            lines += ["", f"## Notes: {name}", "", "```", *notes, "```"]
    atomic_write(out / "summary.md", "\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, help="folder with SUPERNI/, paraphrases.json and gpt2tokenizer/: real tasks too"
    )
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU, Triton in its interpreter")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)  # this one, in this process
    options = parser.parse_args(argv)
    if not 0 < options.minutes < 1e6:
        parser.error(f"--minutes: expected a positive number, got {options.minutes}")
    if options.data and not (options.data / "SUPERNI" / "instructions.json").is_file():
        parser.error(f"--data: expected a folder with SUPERNI/instructions.json, got {options.data}")
    options.out = options.out.resolve()
    if options.part:
        run_part(options.part, job_of(options.part, options, 60 * options.minutes))
        return 0
    if (options.out / "rows.csv").exists() or (options.out / "rows").exists():
        parser.error(f"--out: expected a folder without earlier rows, got {options.out}")
    (options.out / "logs").mkdir(parents=True, exist_ok=True)

    started, outcomes = time.monotonic(), []
    shares = {name: share for name, (_, share, _) in PARTS.items() if name in options.only}
    for name, seconds, left in shared_out(shares, options.minutes * 60 - CLOSING_SECONDS):
        begun, status = time.monotonic(), NO_TIME
        if left >= 5:
            status = run_part_apart(name, options, seconds, min(left, seconds + GRACE_SECONDS))
        outcomes.append([name, status, f"{time.monotonic() - begun:.0f}"])
        print(f"{name:<16} {status} ({outcomes[-1][2]} s)", flush=True)
        write_results(options.out, outcomes, started)
    print(f"{options.out / 'summary.md'}: {time.monotonic() - started:.0f} s")
    return 1 if any(status.startswith(("failed", "ended", "not run")) for _, status, _ in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
