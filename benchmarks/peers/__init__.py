"""What people use today to score prompts: the other columns of every end-to-end table.

`PEERS` names them. All take ``(model, cache)`` and give [K * M] negative log-likelihoods in nats, except
`trainer_loop`, which can only give one mean for each prompt.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from .flex import flex_trie
from .loops import lm_eval_harness, trainer_loop, trl_fused_head
from .plain import packed, tuned_plain
from .prefix import prefix_cache

__all__ = ["PEERS", "Peer"]


@dataclass(frozen=True)
class Peer:
    """One peer: what runs it, what it needs, which sizes are tried (the fastest is the figure), what it gives.

    gives: "cells" or "batch8", the published score. loop: it projects every row on a CPU, so it takes part in one turn
    only. gpu: only there is it what people would use.
    """

    run: Callable
    about: str
    needs: tuple[str, ...] = ("transformers",)
    sizes: tuple[int, ...] = ()
    size_name: str = "batch_size"
    gives: str = "cells"
    loop: bool = False
    gpu: bool = False

    def missing(self) -> str:
        """The packages it needs that are not installed; empty if it can run."""
        return ", ".join(name for name in self.needs if importlib.util.find_spec(name) is None)

    def variants(self, sizes: tuple[int, ...] | None = None) -> dict[str, Callable]:
        """Suffix and callable of every size, its own by default: ``{"_8": run, "_32": run}``; no sizes, no suffix."""
        sizes = self.sizes if sizes is None else sizes
        chosen = {f"_{size}": {self.size_name: size} for size in sizes} or {"": {}}
        return {suffix: functools.partial(self.run, **size) for suffix, size in chosen.items()}


PEERS = {
    "trainer_loop": Peer(
        trainer_loop, "the published loop: Trainer.evaluate per prompt, batches of 8, left padding",
        ("transformers", "accelerate"), gives="batch8", loop=True,
    ),
    "tuned_plain": Peer(tuned_plain, "sorted by length, logits_to_keep mask of the response rows", sizes=(8, 32)),
    "packed": Peer(
        packed, "the same, packed with a block-diagonal mask", sizes=(1024, 4096), size_name="tokens"
    ),
    "prefix_cache": Peer(prefix_cache, "keys and values of a shared prefix reused over a group's cells", sizes=(8, 32)),
    "lm_eval": Peer(
        lm_eval_harness, "lm-evaluation-harness HFLM.loglikelihood", ("lm_eval",), sizes=(8, 32), loop=True,
    ),
    "trl_head": Peer(trl_fused_head, "TRL's fused log-probability head, sorted", ("trl",), sizes=(8, 32), loop=True),
    "flex_trie": Peer(flex_trie, "our path with FlexAttention over the same trie", gpu=True),
}  # fmt: skip
