"""Milliseconds of the host around the forwards: K=21 prompts, M=250 examples, a model of next to nothing.

    python -m benchmarks.host                                # this checkout
    python -m benchmarks.host --before ../other-checkout     # and another one, process by process in turn
    python -m benchmarks.host --csv benchmarks/results/host.csv

Calls are those of a GPU: passes of 16,384 tokens, with the tile lists that its attention walks, and its rounds of a
race. The time inside the model is taken out, so what is left is what a device would wait for if it were infinitely
fast. It is the thread's CPU time, which other work on the machine lengthens little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

PROMPTS, EXAMPLES, TOKENS, GROUP = 21, 250, 16384, 2
MILLION = 345  # examples with which the trie of `million` has a million tokens


class Clock:
    """CPU seconds of each part of a call, without those of the parts inside it."""

    def __init__(self):
        self.spent, self._open = Counter(), [0.0]

    @contextlib.contextmanager
    def part(self, name: str):
        started = time.thread_time()
        self._open.append(0.0)
        try:
            yield
        finally:
            took = time.thread_time() - started
            self.spent[name] += took - self._open.pop()
            self._open[-1] += took

    def watch(self, name: str, owner, *functions: str) -> None:
        """Count the functions of a class or module as that part from now on."""
        for function in functions:
            original = getattr(owner, function)

            def timed(*args, original=original, **options):
                with self.part(name):
                    return original(*args, **options)

            setattr(owner, function, timed)


def measure() -> dict[str, float]:
    """Milliseconds by "case: part", in this process, of the checkout that it runs in."""
    import sapo_kernels as sk
    from benchmarks.workload import Cells, _qwen3
    from sapo_kernels.scoring import attention, cell_sums, head, prefix_cache, race, response_cache, score, verification
    from sapo_kernels.scoring import verified_paths as verified
    from sapo_kernels.trie.tiles import tile_tokens
    from sapo_kernels.trie.trie import TokenTrie
    from sapo_peft.tiny_random import tiny_tokenizer

    torch.set_num_threads(1)
    model = _qwen3(
        torch.float32, "cpu", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=GROUP,
        num_key_value_heads=1, head_dim=8, vocab_size=512, tie_word_embeddings=True,
    )  # fmt: skip
    clock, size = Clock(), tile_tokens(GROUP)
    score.ScoringJob.fills_rounds = lambda job: True
    reading = head.HeadReader.reading

    @contextlib.contextmanager
    def with_tiles(reader, batch):
        with clock.part("tile lists"):
            attention.running.state.trie.tiles(size)
        with clock.part("forwards"), reading(reader, batch):
            yield

    head.HeadReader.reading = with_tiles
    clock.watch("forwards", verification.PlainModel, "_logits")
    clock.watch("planning", response_cache, "plan_trie")
    clock.watch("passes", TokenTrie, "passes")
    clock.watch("prefixes", prefix_cache.PrefixCache, "__init__", "begin", "of_pass", "add", "end")
    clock.watch("rules", race.RaceState, "__init__", "next_cells", "add", "report")
    clock.watch("sums", cell_sums.CellSums, "__init__", "add", "nll")
    clock.watch("selections", response_cache.ResponseCache, "select")
    clock.watch("whose code", verified, "foreign_code", "fingerprint")
    found = {}

    def take(case: str, call) -> None:
        clock.spent.clear()
        with clock.part("rest"):
            call()
        parts = {name: 1000 * seconds for name, seconds in clock.spent.items() if name != "forwards"}
        found[f"{case}: all"] = sum(parts.values())
        found.update((f"{case}: {name}", value) for name, value in parts.items())

    tasks = [{"input": f"text {m} " + "of some words " * 4, "target": f"answer {m % 7}"} for m in range(EXAMPLES)]
    prompts = [f"Instruction number {k}, which says what is to be done." for k in range(PROMPTS)]
    job, cells = million(), Cells(PROMPTS, EXAMPLES)
    trie = sk.plan_trie(*job)
    for _ in range(3):  # the first two warm up
        cache = cells.cache(512)
        take("rendering", lambda: sk.ResponseCache.build(tiny_tokenizer(), prompts, tasks))
        take("planning a million tokens", lambda: sk.plan_trie(*job))
        for budget in (TOKENS, 1024):
            fresh = replace(trie)  # without what it remembers
            take(f"cutting a million tokens into passes of {budget}", lambda: fresh.passes(budget))  # noqa: B023
            steps = fresh.passes(budget)
            take(f"their tile lists ({budget})", lambda: [step.tiles(size) for step in steps])  # noqa: B023
        take("all cells at first", lambda: sk.score_prompts(model, cache, max_tokens=TOKENS))  # noqa: B023
        take("all cells again", lambda: sk.score_prompts(model, cache, max_tokens=TOKENS))  # noqa: B023
        to_the_end = sk.Race(relative=0.0)
        take("a race", lambda: sk.score_prompts(model, cache, max_tokens=TOKENS, race=to_the_end))  # noqa: B023
    return found


def million():
    """(ids, offsets, context lengths) of a trie of a million tokens: 21 prompts of 60 in front of inputs of 139."""
    draw = np.random.default_rng(0)
    prompts, inputs = draw.integers(0, 50_000, (PROMPTS, 60)), draw.integers(0, 50_000, (MILLION, 140))
    ids = np.concatenate([np.concatenate([prompt, text]) for prompt in prompts for text in inputs])
    return ids, np.arange(PROMPTS * MILLION + 1) * 200, np.full(PROMPTS * MILLION, 195)


def main() -> None:
    from .documents import table
    from .rows import ROOT, Row, append_rows, environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, built, to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="processes a checkout")
    parser.add_argument("--csv", type=Path, help="where rows are added")
    options = parser.parse_args()
    checkouts = {"before": options.before, "ours": ROOT} if options.before else {"ours": ROOT}
    taken = {name: defaultdict(list) for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            path = os.pathsep.join((str(checkout), str(checkout / "python")))
            made = subprocess.run(
                [sys.executable, "-", "--measure"], input=Path(__file__).read_bytes(), cwd=checkout,
                stdout=subprocess.PIPE, check=True, env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
            for part, value in json.loads(made.stdout.splitlines()[-1]).items():
                taken[name][part].append(value)
    parts = list(dict.fromkeys(part for values in taken.values() for part in values))
    lines = [[p, *(f"{np.median(v[p]):.1f}" if p in v else "-" for v in taken.values())] for p in parts]
    print("\n".join(table(["host milliseconds, medians", *checkouts], lines)))
    if options.csv:
        rows = []
        for name, path in checkouts.items():
            head = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=path, text=True).strip()
            where = replace(environment(), commit=head, threads=1)
            for part, values in taken[name].items():
                if min(values) > 0:
                    times = (float(np.percentile(values, p)) / 1000 for p in (20, 50, 80))
                    note = f"passes of {TOKENS} tokens, the forwards' time taken out"
                    rows.append(Row("host", part, name, "none", f"K={PROMPTS} M={EXAMPLES}", len(values), *times,
                                    note=note, environment=where))  # fmt: skip
        append_rows(options.csv, rows)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        print(json.dumps(measure()))
    else:
        main()
