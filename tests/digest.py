"""Fingerprints of results that must not depend on what is compiled: ``python -m tests.digest`` prints them as JSON.

Run in two environments, one with the native modules and one without; `tests/installed.py` compares what they print.
"""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import torch

import sapo_kernels as sk
from sapo_kernels import native
from tests.oracles import byte_tokenizer, flatten, random_cells, small_qwen3


def fingerprint(*arrays) -> str:
    """SHA-256 over dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array.numpy() if isinstance(array, torch.Tensor) else array)
        digest.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def planned() -> str:
    """300 random jobs, every array of their tries."""
    arrays = []
    for seed in range(300):
        cells = random_cells(seed, prompts=1 + seed % 5, examples=1 + seed % 9, vocabulary=2 + seed % 11)
        trie = sk.plan_trie(*flatten(cells))
        arrays += [value for name, value in sorted(vars(trie).items()) if isinstance(value, np.ndarray)]
    return fingerprint(*arrays)


def accumulated() -> str:
    """50 random jobs in random pieces."""
    draw, results = random.Random(0), []
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randn(draw.randint(1, 300), generator=generator)
        rows = [sorted(draw.sample(range(len(targets)), draw.randint(0, min(40, len(targets))))) for _ in range(20)]
        cell_ptr = torch.tensor([0, *np.cumsum([len(r) for r in rows])])
        cell_target = torch.tensor(sum(rows, []), dtype=torch.int64)
        nll, tokens = torch.zeros(20, dtype=torch.float64), torch.zeros(20, dtype=torch.int64)
        cuts = sorted([0, len(targets), *(draw.randrange(len(targets)) for _ in range(3))])
        for start, stop in zip(cuts, cuts[1:]):  # noqa: B905 (pairs of neighbours)
            sk.accumulate_(nll, tokens, targets[start:stop], cell_target, cell_ptr, start)
        results += [nll, tokens]
    return fingerprint(*results)


def scored() -> str:
    """`score_prompts` on a small random model, both roads."""
    tokenizer = byte_tokenizer()
    prompts = ["Say which it is.", "Say what it is.", "Name it."]
    examples = [{"input": f"thing {i * i}", "target": "ab" * (1 + i % 3)} for i in range(7)]
    model = small_qwen3()
    return fingerprint(
        *(sk.score_prompts(model, prompts, examples, tokenizer=tokenizer, impl=road, max_tokens=90).nll
          for road in ("tree", "padded"))
    )  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    parts = {"planner": planned, "accumulate_": accumulated, "score_prompts": scored}
    print(json.dumps({"native": native.status(), "digests": {name: part() for name, part in parts.items()}}))


if __name__ == "__main__":
    main()
