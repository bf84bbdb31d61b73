"""One scoring job by rank 0 alone and by all ranks of the launcher; bits are compared before a time is printed.

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m benchmarks.ranks

One thread a rank; the quickest of some calls, for other users of the machine only ever add.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.distributed as dist

from sapo_kernels import score_prompts_sharded

from .documents import seconds, table
from .workload import Cells, qwen3_shaped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    groups = [dist.new_group([0]), dist.group.WORLD]
    model, cache = qwen3_shaped(8192, 256, 4), Cells(21, 40).cache(8192)
    lines = []
    for shards in (1, 4, 12, 24):
        times, found = [], []
        for group in groups:
            dist.barrier()
            if dist.get_rank(group) < 0:
                continue  # the others wait in the next barrier meanwhile
            took = []
            for _ in range(4):  # the first warms up
                started = time.perf_counter()
                scores = score_prompts_sharded(model, cache, group=group, shards=shards)
                took.append(time.perf_counter() - started)
            times.append(min(took[1:]))
            found.append(scores)
        if dist.get_rank() == 0:
            assert torch.equal(found[0].nll, found[1].nll), "the bits depend on the number of ranks"
            tokens = found[0].stats["trie_tokens"]
            lines.append([f"{shards}", f"{tokens}", *map(seconds, times), f"{times[0] / times[1]:.2f}"])
    if lines:
        header = ["shards", "tokens", "1 rank", f"{dist.get_world_size()} ranks", "times as fast"]
        print("\n".join(table(header, lines)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
