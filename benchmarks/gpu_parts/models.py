"""End to end with random models of published shapes: every peer, memory, and what kernels a pass launches."""

from __future__ import annotations

import collections
import importlib.util

import torch

import sapo_kernels as sk
from sapo_kernels.training.trie_batch import TrieBatch, padded_rows

from ..ops.end_to_end import make_case
from ..peers import PEERS
from ..timing import Case, Provider
from ..train_step import step
from ..workload import Cells, build_cache, load_tasks, load_tokenizer, qwen3_published, with_lora
from . import Job, Skipped, measured

PROMPTS, EXAMPLES = 21, 250
# On a GPU more cells fill it; the fastest size is the figure.
SIZES = {
    **dict.fromkeys(("tuned_plain", "prefix_cache", "lm_eval", "trl_head"), (32, 128)),
    "packed": (4096, 8192),
}
TOY_SIZES = {**dict.fromkeys(SIZES, (4,)), "packed": (64,)}
SMALL_PEERS = ["tuned_plain", "flex_trie", "prefix_cache", "packed", "trainer_loop", "lm_eval", "trl_head"]
LARGE_PEERS = ["tuned_plain", "flex_trie", "prefix_cache", "trainer_loop"]


def _model(job: Job, name: str):
    return qwen3_published("toy", torch.float32, "cpu") if job.toy else qwen3_published(name, torch.bfloat16, "cuda")


def _compared(job: Job, name: str, model, cache, peers: list[str], rounds: int) -> None:
    """All peers on one job; one that fails is named and left out."""
    for peer in peers:
        if PEERS[peer].missing():
            job.say(f"{name}: {peer}: not installed: {PEERS[peer].missing()}")
    case = make_case("end_to_end", name, model, cache, peers, rounds, TOY_SIZES if job.toy else SIZES)
    case.warm_up = None  # whole: compilers look at sizes
    measured(job, case)


def _whole(job: Job, name: str, model, cache) -> None:
    """Ours alone at K=21, M=250, checked against the oracle's cells."""
    case = make_case("end_to_end", f"{name} K={PROMPTS} M={EXAMPLES}", model, cache, [], 1)
    case.warm_up = lambda: None
    measured(job, case)


def _kernels(job: Job, model, cache) -> None:
    """Kernels that one call launches, by the profiler; on a CPU the operators instead."""
    from torch.profiler import ProfilerActivity, profile

    cuda = job.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        sk.score_prompts(model, cache, progress=False)
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in trace.events() if event.device_type == kind]
    counts = collections.Counter(event.name for event in events)
    times: dict[str, float] = collections.defaultdict(float)
    for event in events:
        times[event.name] += event.self_device_time_total if cuda else event.self_cpu_time_total
    layers = model.config.num_hidden_layers
    passes = len(cache.plan(16384 if cuda else 1024).passes)
    job.say(
        f"{'kernels' if cuda else 'operators'} of one call: {sum(counts.values())}, {passes} passes of {layers} layers"
    )
    total = sum(times.values()) or 1.0
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:12]:
        job.say(f"  {spent / total:5.1%} {counts[name]:6} x {name[:90]}")


def _cells(job: Job, examples: int) -> Cells:
    return Cells(3, 4, 6, 8, 2) if job.toy else Cells(PROMPTS, examples)


def small(job: Job) -> None:
    """The 0.6B shape: K=21, M=250 of SuperNI lengths; real tasks too where a data folder was given."""
    model = _model(job, "0.6B")
    vocabulary = model.config.vocab_size
    peers = SMALL_PEERS[:1] + SMALL_PEERS[2:] if job.toy else SMALL_PEERS
    _compared(job, "0.6B SuperNI lengths", model, _cells(job, EXAMPLES).cache(vocabulary), peers, 3)
    _kernels(job, model, _cells(job, 40).cache(vocabulary))
    if job.data is None:
        return
    tokenizer = load_tokenizer(job.data / "gpt2tokenizer")
    for task in load_tasks(job.data):
        if job.left <= 0:
            return job.miss(f"{task.name} and the tasks after it")
        cache = build_cache(task, tokenizer, 2 if job.toy else EXAMPLES)
        _compared(job, f"0.6B {task.name[:20]}", model, cache, ["tuned_plain"], 1)


def large(job: Job) -> None:
    """The 8B shape: peers at a part of the examples, then ours at K=21, M=250."""
    model = _model(job, "8B")
    vocabulary = model.config.vocab_size
    peers = LARGE_PEERS[:1] + LARGE_PEERS[2:] if job.toy else LARGE_PEERS
    _compared(job, "8B SuperNI lengths M=50", model, _cells(job, 50).cache(vocabulary), peers, 1)
    if job.left > 0.25 * job.seconds or job.toy:
        _whole(job, "8B SuperNI lengths", model, _cells(job, EXAMPLES).cache(vocabulary))
    else:
        job.miss(f"M={EXAMPLES}")


# Rows of a training batch.
BATCH = 16
# Of all gradients together, against the padded step's: the two round differently.
LOW_PRECISION, FLOAT32 = 0.05, 1e-4


def training(job: Job) -> None:
    """Forward and backward of a LoRA on all linear layers: 16 rows of SuperNI lengths under one instruction."""
    if importlib.util.find_spec("peft") is None:
        raise Skipped("peft is not installed")
    model = _model(job, "8B")
    cache = (Cells(1, 4, 6, 8, 2) if job.toy else Cells(1, BATCH)).cache(model.config.vocab_size)
    rows = list(zip(cache.contexts[0], cache.responses[0], strict=True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = with_lora(model, 8, 32, init_lora_weights=False)
    padded = {name: tensor.to(job.device) for name, tensor in padded_rows(rows).items()}
    batch = TrieBatch.pack(*zip(*rows, strict=True))

    def gradients(provider: str) -> torch.Tensor:
        found = step(model, provider, padded if provider == "padded" else rows)[2]
        return torch.cat([gradient.flatten().float() for gradient in found])

    own = gradients("padded")
    case = Case(
        "training step", f"8B shape, LoRA, {len(rows)} rows", dtype="fp32" if job.toy else "bf16",
        rounds=1 if job.toy else 7,
        check=lambda found: float((found - own).norm() / own.norm()), tolerance=FLOAT32 if job.toy else LOW_PRECISION,
        tokens=batch.num_tokens, shape=f"padded={padded['input_ids'].numel()} trie={batch.num_tokens}",
    )  # fmt: skip
    case.providers = {
        "ours": Provider(lambda: gradients("trie")),
        "padded": Provider(lambda: gradients("padded"), tokens=padded["input_ids"].numel()),
    }
    measured(job, case)
