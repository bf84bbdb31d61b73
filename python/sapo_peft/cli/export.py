"""`sapo export`: the adapters of a sequence run as one LoRA adapter, as PEFT and servers load it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ..terminal import log_on_stderr, plain

HELP = "one LoRA adapter of a sequence run"
EPILOG = """\
The adapters of lora-inc and o-lora are put beside each other along their ranks, which gives what all of them active at
once do; the rank is the sum of theirs, and a server must allow it (vLLM: --max-lora-rank). The folder holds the
adapter, sapo_prompts.json with the prompt of each task, a model card and a manifest.
"""


def options(add: Callable) -> None:
    """Declare the options of `sapo export`."""
    add("run_dir", metavar="RUN", help="folder of a run of `sapo sequence`")
    add("--out", required=True, metavar="DIR", help="folder to write, not there or empty")


def run(args: argparse.Namespace) -> int:
    """Read and check the run, write the adapter, and say what it is."""
    from ..sequence.export import export_adapter
    from .outputs import naming

    with log_on_stderr("sapo_peft", quiet=False), naming(args.out):
        made = export_adapter(args.run_dir, args.out)
    of = "" if len(made.tasks) == made.planned else f" of {made.planned}"
    print(f"One adapter of rank {made.rank}, of {len(made.tasks)}{of} tasks, is in {plain(args.out)}.")
    return 0
