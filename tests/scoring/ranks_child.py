"""Worlds of forked ranks for test_sharding.py: torch and transformers are imported once, then each world forks.

``python -m tests.scoring.ranks_child OUT SPEC``: SPEC is a JSON list of {"name", "world", "scene", ...}; OUT gets one
JSON object, by name what each rank found: its exit code and "result", or "error", "kind", "rank" and "after" (seconds).
"""

from __future__ import annotations

import datetime
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

# A whole world may take this long.
DEADLINE = 600.0
BEGIN = datetime.timedelta(seconds=90)
# Worlds that lose a rank mostly wait: so many run at a time.
AT_A_TIME = 4


def cache_of(seed: int, prompts: int = 4, examples: int = 5, **options) -> sk.ResponseCache:
    cells = random_cells(seed, prompts=prompts, examples=examples, **options)
    rows = [cells[k * examples : (k + 1) * examples] for k in range(prompts)]
    return sk.ResponseCache.from_token_ids([[c for c, _ in row] for row in rows], [[r for _, r in row] for row in rows])


def tiny(seed: int = 0, vocabulary: int = 13):
    return small_qwen3(
        vocabulary, seed, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip


def sharded(model, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def bits(scores) -> str:
    return hashlib.sha256(scores.nll.numpy().tobytes()).hexdigest()


def scene_random(case, rank: int) -> list:
    """Random jobs by groups of 1 to `world` ranks: bits, choices, and the plain scores beside them."""
    groups = [dist.new_group(list(range(size))) for size in range(1, dist.get_world_size() + 1)]
    models = [tiny(seed) for seed in range(3)]
    models[2].get_input_embeddings().weight.data[12] = float("nan")  # a token that makes cells non-finite
    found = []
    for seed in range(*case["seeds"]):
        rng = random.Random(seed)
        broken = rng.random() < 0.1
        race = sk.Race(first=5, relative=0.05, seed=seed) if rng.random() < 0.2 else None
        cache = cache_of(
            seed, rng.randint(1, 5), rng.randint(1, 7) + 5 * (race is not None), vocabulary=13 if broken else 12,
            longest=rng.randint(2, 10),
        )  # fmt: skip
        options = {"max_tokens": rng.choice([7, 20, 40]), "impl": rng.choice(["auto"] * 4 + ["padded"])}
        shards = rng.choice([None, None, 1, 2, 3, 5, 9])
        model = models[2] if broken else models[seed % 2]
        made = [
            score_prompts_sharded(model, cache, group=group, timeout=600.0, shards=shards, race=race, **options)
            for size, group in enumerate(groups, 1)
            if rank < size
        ]
        one = made[0]
        entry = {
            "bits": [bits(scores) for scores in made], "best": [scores.ranking()[0] for scores in made],
            "shards": one.stats["shards"], "finite": not one.nonfinite, "race": race is not None,
        }  # fmt: skip
        if rank == 0 and race is None:
            plain = sk.score_prompts(model, cache, progress=False, **options)
            finite = plain.nll.isfinite()
            apart = ((plain.nll - one.nll).abs() / plain.tokens)[finite]
            entry["same_finite"] = bool((finite == one.nll.isfinite()).all())
            entry["apart"] = float(apart.max()) if len(apart) else 0.0
            first = plain.ranking()[0]
            entry["same_choice"] = first == one.ranking()[0]
            entry["gap"] = float(one.loss[first] - one.loss[one.ranking()[0]]) if not one.nonfinite else 0.0
        found.append(entry)
    return found


def scene_lost(case, rank: int) -> dict:
    """One rank is lost in some phase; what do the others say, and when."""
    timeout, phase, mine = case["timeout"], case["phase"], rank == case["culprit"]
    model, cache = tiny(), cache_of(3, 4, 6)
    if case.get("fsdp"):
        sharded(model)
    options = {"max_tokens": 20, "shards": 12}

    def act(*_):
        Path(case["folder"], f"{case['name']}.event").write_text(repr(time.time()))
        if case["kind"] in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if case["kind"] == "kill" else signal.SIGSTOP)
        if case["kind"] == "late":
            time.sleep(1000)
        raise KeyboardInterrupt if case["kind"] == "interrupt" else ValueError("boom: \ud800 {0.__class__}")

    if phase == "first" and mine:
        act()
    # The first one may take long on a busy machine.
    score_prompts_sharded(model, cache, **options, timeout=timeout if phase == "first" else 60.0)
    if phase == "start" and mine:
        act()
    if phase == "forward" and mine:
        count = iter(range(100))
        # Sharded: in the middle of a forward, where the others wait for it to gather the layer's weights.
        place = model.model.layers[0] if case.get("fsdp") else model
        place.register_forward_pre_hook(lambda *_: act() if next(count) == 2 else None, prepend=bool(case.get("fsdp")))
    if phase == "results" and mine:
        Ranks.exchange = lambda *args, plain=Ranks.exchange: plain(*args) if len(args[1]) == 4 else act()
    score_prompts_sharded(model, cache, **options, timeout=timeout)
    return {}


def scene_alike(case, rank: int) -> dict:
    """One rank holds something else, in each of the ways; then all hold the same again."""
    said, second = {}, rank == 1
    for what in ("prompts and examples", "options", "model", "weights"):
        model = tiny(vocabulary=14 if second and what == "model" else 13)
        if second and what == "weights":
            model.model.layers[0].mlp.up_proj.weight.data.add_(1e-7)
        cache = cache_of(6 if second and what == "prompts and examples" else 5)
        try:
            score_prompts_sharded(model, cache, timeout=20.0, shards=4 if second and what == "options" else 3)
        except ValueError as error:
            said[what] = str(error)
    return {"said": said, "after": bits(score_prompts_sharded(tiny(), cache_of(5), timeout=20.0))}


def scene_sharded(case, rank: int) -> dict:
    """FSDP2: the bits of the whole model; ranks have unequal shares, one has none; and what is refused.

    Then `score_prompts` itself, on both models, before and after a step of SGD.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    models = {"whole": small_qwen3(), "sharded": sharded(small_qwen3(), mesh=mesh)}
    # Of the sharded parameters: a forward leaves those of the root whole.
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name, model in models.items()}
    found = {name: [] for name in models}
    found["kinds"] = sorted({type(p.data).__name__ for p in models["sharded"].parameters()})
    trained = found["trained"] = {name: [] for name in models}
    for cache, shards in ((cache_of(1), 5), (cache_of(2, 1, 1), None), (cache_of(3, 3, 4), 2)):
        for name, one in models.items():
            found[name].append(bits(score_prompts_sharded(one, cache, timeout=20.0, shards=shards, max_tokens=16)))
    found["timeout"] = mesh.get_group()._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    tensor_parallel = tiny()
    linear = tensor_parallel.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(distribute_tensor(linear.weight, mesh, [Shard(0)]))
    try:
        score_prompts_sharded(tensor_parallel, cache_of(1), timeout=20.0)
    except ValueError as error:
        found["refused"] = str(error)
    cache = cache_of(7, 2, 4, vocabulary=200)
    for name, model in models.items():
        for _ in range(2):
            scores = sk.score_prompts(model, cache, progress=False)
            trained[name].append((scores.stats["path"], scores.nll.tolist()))
            ids = torch.tensor([cache.contexts[scores.best][0] + cache.responses[scores.best][0]])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
    return found


def scene_gradients(case, rank: int) -> list:
    """tree_logprobs with FSDP2, plain and with checkpointing, twice each: how far from the whole model's gradients."""
    from tests.training.test_tree_logprobs import BATCH, alone

    whole, found = small_qwen3(), []
    expected = -alone(whole).sum()
    expected.backward()
    for checkpoint in (False, True):
        model = small_qwen3().train(checkpoint)
        if checkpoint:
            model.gradient_checkpointing_enable()
        with sk.use_tree_attention(sharded(model)):
            for _ in range(2):
                # Each rank has the same batch, and gradients are averaged.
                loss = -sk.tree_logprobs(model, BATCH).sum()
                loss.backward()
                pairs = zip(model.parameters(), whole.parameters(), strict=True)
                far = [float((p.grad.full_tensor() - q.grad).norm() / q.grad.norm()) for p, q in pairs]
                found.append((abs(float(loss - expected)), max(far)))
                model.zero_grad()
    return found


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
        found["made"].append((bits(scores), scores.nll.tolist(), scores.best, scores.stats["world"]))
        assert torch.equal(before, torch.get_rng_state()) and one.training
        assert not any(m._forward_pre_hooks for m in model.modules())
    return found


def child(case: dict, rank: int) -> None:
    """One rank; writes its file and leaves without running the parent's exits."""
    path = Path(case["folder"], f"{case['name']}.{rank}.json")
    try:
        store = dist.TCPStore("127.0.0.1", case["port"], is_master=False, timeout=BEGIN)
        store = dist.PrefixStore(case["name"], store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=case["world"], timeout=BEGIN)
        found = {"result": globals()[f"scene_{case['scene']}"](case, rank)}
    except BaseException as error:
        found = {
            "error": str(error), "kind": type(error).__name__, "rank": getattr(error, "rank", None), "at": time.time(),
            "trace": traceback.format_exc()[-3000:],
        }  # fmt: skip
    path.write_text(json.dumps(found))
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


def run(cases: list[dict]) -> dict[str, list[dict]]:
    """Fork the ranks of some worlds, wait for all but those that are to be lost, and end what is left of them."""
    children, codes = {}, {}
    for case in cases:
        for rank in range(case["world"]):
            children[case["name"], rank] = os.fork()
            if not children[case["name"], rank]:
                child(case, rank)
    lost = {(case["name"], case["culprit"]) for case in cases if case.get("kind") in ("stop", "late")}
    deadline = time.time() + max(case.get("deadline", DEADLINE) for case in cases)
    while children.keys() - lost - codes.keys() and time.time() < deadline:
        for key in children.keys() - codes.keys():
            done, status = os.waitpid(children[key], os.WNOHANG)
            if done:
                codes[key] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for key in children.keys() - codes.keys():
        os.kill(children[key], signal.SIGKILL)
        os.waitpid(children[key], 0)
        codes[key] = "hung"
    made = {}
    for case in cases:
        event, found = Path(case["folder"], f"{case['name']}.event"), made.setdefault(case["name"], [])
        for rank in range(case["world"]):
            path = Path(case["folder"], f"{case['name']}.{rank}.json")
            found.append({"exit": codes[case["name"], rank], **(json.loads(path.read_text()) if path.exists() else {})})
            if event.exists() and "at" in found[-1]:
                found[-1]["after"] = found[-1]["at"] - float(event.read_text())
    return made


def main() -> None:
    torch.set_num_threads(1)
    out, cases = sys.argv[1], json.loads(sys.argv[2])
    # Once, before the forks: everything that is imported on the way takes seconds.
    sk.score_prompts(tiny(), cache_of(0), progress=False)
    gathers_in_forward(tiny())
    keeper, port = keep_store()
    waiting = [case for case in cases if case["scene"] == "lost"]
    batches = [waiting[i : i + AT_A_TIME] for i in range(0, len(waiting), AT_A_TIME)]
    batches += [[case] for case in cases if case["scene"] != "lost"]
    with tempfile.TemporaryDirectory() as folder:
        made = [run([{**case, "folder": folder, "port": port} for case in batch]) for batch in batches]
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    Path(out).write_text(json.dumps({name: ranks for found in made for name, ranks in found.items()}))


if __name__ == "__main__":
    main()
