"""One rank of tests/test_fsdp2.py: score, train a step, score again, all layers sharded; results go to argv[1]."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sapo_kernels as sk
from tests.oracles import byte_tokenizer, small_qwen3


def steps(model, cache) -> list:
    """[nll before, nll after one step of SGD on the best prompt]."""
    found = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        scores = sk.score_prompts(model, cache, progress=False)
        found.append((scores.stats["path"], scores.nll.tolist()))
        ids = torch.tensor([cache.contexts[scores.best][0] + cache.responses[scores.best][0]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    prompts = ["Say a.", "Say what it is, please."]
    examples = [{"input": f"thing {i}", "target": "ab"} for i in range(4)]
    cache = sk.ResponseCache.build(byte_tokenizer(), prompts, examples)
    whole = steps(small_qwen3(), cache)
    model = small_qwen3()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = steps(model, cache)
    kinds = sorted({type(parameter.data).__name__ for parameter in model.parameters()})
    found = {"whole": whole, "sharded": sharded, "kinds": kinds}
    Path(sys.argv[1], f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # A thread of gloo may still be on its way out, and Python's own end would abort the process for it.
    os._exit(0)


if __name__ == "__main__":
    main()
