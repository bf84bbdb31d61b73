"""Worlds of forked ranks for tests/test_sharding.py: torch and transformers are imported once, then each world forks.

``python -m tests.scoring.ranks_child OUT SPEC``: SPEC is a JSON list of {"name", "world", "scene", ...}; OUT gets one
JSON object, by name what each rank found: its exit code and "result", or "error", "kind", "rank" and "after" (seconds).
"""

from __future__ import annotations

import datetime
import faulthandler
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import sapo_kernels as sk
from sapo_kernels.scoring.distributed import gathers_in_forward, score_prompts_sharded
from sapo_kernels.scoring.ranks import Ranks
from tests.oracles import random_cells, small_qwen3

# A whole world may take this long; a hang is an error of its own.
DEADLINE = 120.0
# A rank that waits for the others to begin says so before that.
BEGIN = datetime.timedelta(seconds=90)


def cache_of(seed: int, prompts: int = 4, examples: int = 5, **options) -> sk.ResponseCache:
    cells = random_cells(seed, prompts=prompts, examples=examples, **options)
    rows = [cells[k * examples : (k + 1) * examples] for k in range(prompts)]
    return sk.ResponseCache.from_token_ids([[c for c, _ in row] for row in rows], [[r for _, r in row] for row in rows])


def tiny(seed: int = 0, vocabulary: int = 13):
    return small_qwen3(
        vocabulary, seed, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip


def bits(scores) -> list[list[int]]:
    return scores.nll.view(torch.int64).tolist()


def scene_random(case, rank: int) -> dict:
    """Random jobs by groups of 1 to `world` ranks: bits, choices, and the plain scores beside them."""
    groups = [dist.new_group(list(range(size))) for size in range(1, dist.get_world_size() + 1)]
    models = [tiny(seed) for seed in range(3)]
    for parameter in (models[2].get_input_embeddings().weight,):
        parameter.data[12] = float("nan")  # a token that makes cells non-finite
    found = []
    for seed in range(*case["seeds"]):
        rng = random.Random(seed)
        broken = rng.random() < 0.1
        race = sk.Race(first=5, relative=0.05, seed=seed) if rng.random() < 0.2 else None
        cache = cache_of(
            seed, rng.randint(1, 5), rng.randint(1, 7) + 5 * (race is not None), vocabulary=13 if broken else 12,
            longest=rng.randint(2, 10),
        )  # fmt: skip
        options = {
            "max_tokens": rng.choice([1, 7, 20, 40]), "shards": rng.choice([None, None, 1, 2, 3, 5, 9]),
            "impl": rng.choice(["auto"] * 4 + ["padded"]),
        }  # fmt: skip
        if options["max_tokens"] == 1:
            options["max_tokens"], options["shards"] = 11, None
        options["race"] = race
        model = models[2] if broken else models[seed % 2]
        made = {}
        for size, group in enumerate(groups, 1):
            if rank < size:
                # Rank 0 scores once more, alone, while the others wait for it.
                made[size] = score_prompts_sharded(model, cache, group=group, timeout=600.0, **options)
        if not made:
            continue
        one = next(iter(made.values()))
        shapes = {tuple(scores.tokens.shape) for scores in made.values()}
        entry = {"seed": seed, "bits": {size: digest(bits(scores)) for size, scores in made.items()}}
        entry["best"] = {size: scores.ranking()[0] for size, scores in made.items()}
        entry["shards"], entry["shapes"], entry["finite"] = one.stats["shards"], len(shapes), not one.nonfinite
        entry["empty"] = sum(size > one.stats["shards"] for size in made)
        entry["race"] = race is not None
        if rank == 0 and not entry["race"]:
            plain = sk.score_prompts(
                model, cache, max_tokens=options["max_tokens"], impl=options["impl"], progress=False
            )
            same = plain.nll.isfinite() == one.nll.isfinite()
            apart = (plain.nll - one.nll)[plain.nll.isfinite()].abs()
            entry["apart"] = float((apart / plain.tokens[plain.nll.isfinite()]).max()) if len(apart) else 0.0
            entry["same_finite"], entry["plain_best"] = bool(same.all()), plain.ranking()[0]
            loss = one.loss
            entry["gap"] = float(loss[plain.ranking()[0]] - loss[one.ranking()[0]]) if not one.nonfinite else 0.0
        found.append(entry)
    return {"found": found}


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def scene_lost(case, rank: int) -> dict:
    """One rank is lost in some phase; what do the others say, and when."""
    timeout, culprit, phase = case["timeout"], case["culprit"], case["phase"]
    model, cache = tiny(), cache_of(3, 4, 6)
    if case.get("fsdp"):
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    options = {"max_tokens": 20, "shards": 12}
    event = Path(case["folder"], f"{case['name']}.event")

    def act(*_):
        event.write_text(repr(time.time()))
        kind = case["kind"]
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "late":
            time.sleep(1000)
        raise KeyboardInterrupt if kind == "interrupt" else ValueError("boom: \ud800 {0.__class__}")

    mine = rank == culprit
    if phase == "first" and mine:
        act()
    # Connecting may take long on a busy machine.
    first = score_prompts_sharded(model, cache, **options, timeout=timeout if phase == "first" else 60.0)
    if mine and phase == "start":
        act()
    if mine and phase == "forward":
        count = iter(range(100))
        # Sharded: in the middle of a forward, where the others wait for it to gather the layer's weights.
        place = model.model.layers[0] if case.get("fsdp") else model
        place.register_forward_pre_hook(lambda *_: act() if next(count) == 2 else None, prepend=bool(case.get("fsdp")))
    if mine and phase == "idle":
        plain_post = Ranks.post
        Ranks.post = lambda self, status, payload=None: act() if status == 0 else plain_post(self, status, payload)
    if mine and phase == "results":
        Ranks.exchange = act
    if not mine and phase == "idle":
        time.sleep(0.2)
    score_prompts_sharded(model, cache, **options, timeout=timeout)
    return {"first": digest(bits(first)), "done": True}


def scene_alike(case, rank: int) -> dict:
    """One rank holds something else, in each of the ways; then all hold the same again."""
    said = {}
    for what in ("prompts and examples", "options", "model", "weights"):
        cache, model, options = cache_of(5), tiny(), {"shards": 3}
        if rank == 1:
            if what == "prompts and examples":
                cache = cache_of(6)
            elif what == "options":
                options = {"shards": 4}
            elif what == "model":
                model = tiny(vocabulary=14)
            else:
                with torch.no_grad():
                    model.model.layers[0].mlp.up_proj.weight.add_(1e-7)
        try:
            score_prompts_sharded(model, cache, timeout=20.0, **options)
        except ValueError as error:
            said[what] = str(error)
    after = score_prompts_sharded(tiny(), cache_of(5), timeout=20.0)
    return {"said": said, "after": digest(bits(after))}


def scene_sharded(case, rank: int) -> dict:
    """FSDP2: the bits of the whole model; ranks have unequal shares, one has none; and what is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {"whole": [], "sharded": []}
    whole = small_qwen3()
    model = small_qwen3()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for cache, shards in ((cache_of(1), 5), (cache_of(2, 1, 1), None), (cache_of(3, 3, 4), 2)):
        for name, one in (("whole", whole), ("sharded", model)):
            scores = score_prompts_sharded(one, cache, timeout=20.0, shards=shards, max_tokens=16)
            found[name].append(digest(bits(scores)))
    found["kinds"] = sorted({type(p.data).__name__ for p in model.parameters()})
    found["training"] = any(m.training for m in model.modules())
    found["timeout"] = mesh.get_group()._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    tensor_parallel = tiny()
    weight = tensor_parallel.model.layers[0].mlp.up_proj.weight
    tensor_parallel.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    try:
        score_prompts_sharded(tensor_parallel, cache_of(1), timeout=20.0)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def scene_trained(case, rank: int) -> dict:
    """score_prompts itself on a model sharded by FSDP2 and on the whole one, before and after a step of SGD."""
    from torch.distributed.fsdp import fully_shard

    def steps(model) -> list:
        optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(2):
            scores = sk.score_prompts(model, cache, progress=False)
            found.append((scores.stats["path"], scores.nll.tolist()))
            ids = torch.tensor([cache.contexts[scores.best][0] + cache.responses[scores.best][0]])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return found

    cache, model = cache_of(7, 2, 4, vocabulary=200), small_qwen3()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    kinds = sorted({type(p.data).__name__ for p in model.parameters()})
    return {"whole": steps(small_qwen3()), "sharded": steps(model), "kinds": kinds}


def scene_wrapped(case, rank: int) -> dict:
    """Plain, in DDP, with an adapter, through Accelerate: whole options of score_prompts go through."""
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model

    from tests.oracles import byte_tokenizer

    prompts = ["Say a.", "Say what it is, please.", "Say a."]
    examples = [{"input": f"thing {i}", "target": "ab"} for i in range(5)]
    torch.manual_seed(0)
    model = get_peft_model(small_qwen3(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.train()
    plain = sk.score_prompts(model, prompts, examples, tokenizer=byte_tokenizer(), suffix="Go.", progress=False)
    found = {"plain": plain.nll.tolist(), "made": []}
    accelerator = Accelerator(cpu=True)
    for one in (model, torch.nn.parallel.DistributedDataParallel(model), accelerator.prepare(model)):
        before = torch.get_rng_state()
        scores = score_prompts_sharded(
            one, prompts, examples, tokenizer=byte_tokenizer(), suffix="Go.", shards=4, timeout=30.0
        )
        found["made"].append((digest(bits(scores)), scores.nll.tolist(), scores.best, scores.stats["world"]))
        assert torch.equal(before, torch.get_rng_state()) and one.training
        assert not any(m._forward_pre_hooks for m in model.modules())
    return found


def child(case: dict, rank: int, folder: str) -> None:
    """One rank; writes its file and leaves without running the parent's exits."""
    path = Path(folder, f"{case['name']}.{rank}.json")
    faulthandler.register(signal.SIGUSR1, path.with_suffix(".stack").open("w"))
    try:
        store = dist.TCPStore("127.0.0.1", case["port"], is_master=False, timeout=BEGIN)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=case["world"], timeout=BEGIN)
        found = {"result": globals()[f"scene_{case['scene']}"](case, rank)}
    except BaseException as error:
        found = {
            "error": str(error), "kind": type(error).__name__, "rank": getattr(error, "rank", None), "at": time.time(),
            "trace": traceback.format_exc()[-3000:],
        }  # fmt: skip
    path.with_suffix(".part").write_text(json.dumps(found))
    path.with_suffix(".part").rename(path)
    if "result" in found:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0 if "result" in found else 1)


def keep_store() -> tuple[int, int]:
    """(process, port) of a store that outlives every rank, as torchrun's agent holds it.

    In a process of its own: its server is a thread, and a rank forked beside a running thread inherits whatever that
    thread has locked.
    """
    read, write = os.pipe()
    parent, keeper = os.getpid(), os.fork()
    if not keeper:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, str(store.port).encode())
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(0)
    os.close(write)
    port = int(os.read(read, 16))
    os.close(read)
    return keeper, port


def run(case: dict, folder: str) -> list[dict]:
    """Fork the ranks of a world, wait for all but a rank that is to be lost, and end what is left of them."""
    keeper, port = keep_store()
    case = {**case, "folder": folder, "port": port}
    children = {}
    for rank in range(case["world"]):
        children[rank] = os.fork()
        if not children[rank]:
            child(case, rank, folder)
    deadline, waiting, codes = time.time() + case.get("deadline", DEADLINE), set(children), {}
    lost = case.get("culprit") if case.get("kind") in ("stop", "late") else None
    while waiting - {lost} and time.time() < deadline:
        for rank in sorted(waiting):
            done, status = os.waitpid(children[rank], os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
                waiting.discard(rank)
        time.sleep(0.01)
    if waiting - {lost}:
        for rank in waiting:  # where it hangs
            os.kill(children[rank], signal.SIGUSR1)
        time.sleep(0.5)
    for rank in waiting:
        os.kill(children[rank], signal.SIGKILL)
        os.waitpid(children[rank], 0)
        codes[rank] = "hung"
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    event = Path(folder, f"{case['name']}.event")
    began = float(event.read_text()) if event.exists() else None
    made = []
    for rank in sorted(children):
        path = Path(folder, f"{case['name']}.{rank}.json")
        found = json.loads(path.read_text()) if path.exists() else {}
        if began is not None and "at" in found:
            found["after"] = found["at"] - began
        stack = path.with_suffix(".stack")
        made.append({**found, "exit": codes[rank], "stack": stack.read_text() if stack.exists() else ""})
    return made


def main() -> None:
    torch.set_num_threads(1)
    out, spec = sys.argv[1:]
    # Once, before the forks: everything that is imported on the way takes seconds.
    sk.score_prompts(tiny(), cache_of(0), progress=False)
    gathers_in_forward(tiny())
    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else [""]
    if len(threads) != 1:
        raise RuntimeError(f"expected one thread before the forks, got {len(threads)}")
    with tempfile.TemporaryDirectory() as folder:
        found = {case["name"]: run(case, folder) for case in json.loads(spec)}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
