"""What a scoring pass costs in tokens, operations, bytes and messages, and the time that follows on 1 to 64 devices.

    python -m benchmarks.cost_model                             # the tables of docs/scaling.md: predictions, unmeasured
    python -m benchmarks.cost_model --matmul 620e12 --copy 2.6e12   # with ceilings that were measured somewhere
    python -m benchmarks.cost_model --check                     # against small cases measured on this CPU
    python -m torch.distributed.run --standalone --nproc_per_node=2 -m benchmarks.cost_model --ranks

Formulas, for U trie tokens, R response rows, P = sum of (depth + 1) over the tokens, and a model of L layers, width D,
Hq query and Hkv key heads of size d, MLP width I, vocabulary V:

    weights in layers   N = L * (D * d * (2 * Hq + 2 * Hkv) + 3 * D * I)
    operations          2 * N * U  +  4 * L * Hq * d * P  +  2 * R * D * V
    bytes of one pass   what its weights take, once, and the activations that go to memory and back
    time of one pass    the longer of operations / matrix ceiling and bytes / copy ceiling
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from sapo_kernels import ResponseCache, plan_trie, score_prompts, score_prompts_sharded
from sapo_kernels.scoring.distributed import COUNTS
from sapo_kernels.scoring.ranks import MESSAGE
from sapo_kernels.scoring.score import DEFAULT_MAX_TOKENS

from .suite_summary import seconds, table
from .workload import Cells, qwen3_shaped

# Reads and writes of an activation row of width D in one layer: two norms, residuals, projections in and out, the MLP.
ROW_TRIPS = 24
DEVICE_MEMORY = 80e9
# Of --check: width, layers, vocabulary, cells.
CASES = [
    (256, 4, 8192, Cells(8, 16)), (512, 8, 8192, Cells(8, 8)), (512, 8, 50257, Cells(8, 8)),
    (512, 8, 8192, Cells(8, 8, last=True)), (768, 6, 8192, Cells(4, 8, input=300)),
]  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A decoder's shape. bytes: of one weight."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    bytes: int = 2

    @property
    def layer_weights(self) -> int:
        projections = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (projections + 3 * self.hidden * self.intermediate)

    @property
    def weights(self) -> int:
        return self.layer_weights + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @classmethod
    def of(cls, config, name: str = "", size: int = 4) -> Model:
        """The shape of a transformers configuration."""
        return cls(
            name, config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
            config.head_dim, config.intermediate_size, config.vocab_size, config.tie_word_embeddings, size,
        )  # fmt: skip


MODELS = [
    Model("Qwen3-0.6B", 1024, 28, 16, 8, 128, 3072, 151936, tied=True),
    Model("Qwen3-8B", 4096, 36, 32, 8, 128, 12288, 151936),
    Model("Llama-3.1-8B", 4096, 32, 32, 8, 128, 14336, 128256),
    Model("Qwen3-32B", 5120, 64, 64, 8, 128, 25600, 151936),
    Model("Llama-3.1-70B", 8192, 80, 64, 8, 128, 28672, 128256),
]


@dataclass(frozen=True)
class Job:
    """Counts of a scoring job: cells, tokens of separate forwards and of the trie, response rows, attention pairs."""

    cells: int
    dense: int
    tokens: int
    rows: int
    pairs: int

    @classmethod
    def of(cls, cache: ResponseCache) -> Job:
        trie = plan_trie(cache.ids, cache.offsets, cache.context_lengths)
        pairs = int((trie.depth + 1).sum())
        return cls(len(trie.leaf), trie.dense_tokens, len(trie), len(trie.row_token), pairs)

    def path(self) -> float:
        """Tokens of a mean path, which a cut computes again; at most one sequence."""
        return self.dense / self.cells


@dataclass(frozen=True)
class Machine:
    """Ceilings of one device, per second: operations, bytes of memory, bytes to the others inside and between nodes."""

    matmul: float
    copy: float
    link: float = 350e9
    network: float = 40e9
    node: int = 8

    def between(self, world: int) -> float:
        return self.link if world <= self.node else self.network


def operations(model: Model, job: Job) -> float:
    """Floating-point operations of a whole job."""
    attention = 4 * model.layers * model.heads * model.head_dim * job.pairs
    return 2 * model.layer_weights * job.tokens + attention + 2 * job.rows * model.hidden * model.vocabulary


def pass_bytes(model: Model, tokens: float) -> float:
    """Bytes that a pass of `tokens` moves: the weights once, and activations."""
    return model.bytes * (model.weights + ROW_TRIPS * tokens * model.hidden * model.layers)


def default_shards(job: Job, max_tokens: int) -> int:
    return max(n for n in COUNTS if n <= max(1, job.tokens // (2 * max_tokens)))


@dataclass(frozen=True)
class Prediction:
    """shards: of the job. passes: of the busiest rank. gathered: bytes of weights that a rank receives in all.
    messages: bytes that a rank sends in all beside them. seconds: of the whole call."""

    shards: int
    passes: int
    gathered: float
    messages: float
    seconds: float


def predict(model: Model, job: Job, machine: Machine, world: int, max_tokens: int, spread: bool, shards=None):
    """Time of one call on `world` devices, each with the whole model or (`spread`) with its part of it by FSDP2."""
    shards = shards or default_shards(job, max_tokens)
    tokens = job.tokens + (shards - 1) * job.path()
    # All shards are about as large; the busiest rank may have one more than the others.
    most, size = math.ceil(shards / world), tokens / shards
    share = most / shards
    # A pass ends between 3/4 and the whole of its budget; a shard that fits into one is one.
    passes = most * (1 if size <= max_tokens else math.ceil(size / (0.875 * max_tokens)))
    work = operations(model, job) * tokens / job.tokens * share / passes
    each = max(work / machine.matmul, pass_bytes(model, share * tokens / passes) / machine.copy)
    gathered = model.weights * model.bytes * (world - 1) / world if spread else 0.0
    # FSDP2 gathers the next layer while this one computes.
    each = max(each, gathered / machine.between(world))
    messages = (world - 1) * (passes * MESSAGE * 8 + 8 * share * job.cells)
    return Prediction(shards, passes, gathered * passes, messages, passes * each)


def report(job: Job, machine: Machine, max_tokens: int, source: str) -> list[str]:
    """The tables of docs/scaling.md."""
    lines = [
        f"Job: {job.cells} cells, {job.dense} tokens in separate forwards, {job.tokens} in the trie "
        f"({job.dense / job.tokens:.2f}x fewer), {job.rows} response rows; passes of {max_tokens} tokens.",
        f"Ceilings ({source}): {machine.matmul / 1e12:.4g} TFLOP/s, {machine.copy / 1e12:.3g} TB/s, "
        f"{machine.link / 1e9:.3g} GB/s inside a node of {machine.node}, {machine.network / 1e9:.3g} between nodes.",
        "", "**Predictions. Not measured.**", "",
    ]  # fmt: skip
    rows = []
    for model in MODELS:
        fits = model.weights * model.bytes * 1.2 < DEVICE_MEMORY
        cells = [model.name, f"{model.weights / 1e9:.1f}", f"{operations(model, job) / 1e15:.3g}"]
        for world in (1, 4, 8, 64):
            held = model.weights * model.bytes * 1.2 / world < DEVICE_MEMORY
            shards = 192 if world == 64 else 24
            whole = predict(model, job, machine, world, max_tokens, False, shards) if fits else None
            spread = predict(model, job, machine, world, max_tokens, True, shards) if held and world > 1 else None
            cells.append(" / ".join(seconds(p.seconds) if p else "-" for p in (whole, spread)))
        rows.append(cells)
    header = ["model", "weights, G", "PFLOP", *(f"{w} device{'s' * (w > 1)}" for w in (1, 4, 8, 64))]
    lines += [
        "Seconds of one call, each rank with the whole model / sharded by FSDP2; 24 shards, 192 for 64 devices:", "",
        *table(header, rows), "",
    ]  # fmt: skip
    rows = []
    for world in (1, 2, 4, 8, 16, 64):
        for shards in (24, 192):
            made = predict(MODELS[1], job, machine, world, max_tokens, True, shards)
            alone = predict(MODELS[1], job, machine, 1, max_tokens, False, 24)
            whole = predict(MODELS[1], job, machine, world, max_tokens, False, shards)
            rows.append(
                [
                    f"{world}",
                    f"{shards}",
                    f"{100 * (shards - 1) * job.path() / job.tokens:.1f} %",
                    f"{made.passes}",
                    f"{whole.messages / 2**20:.2f}",
                    f"{made.gathered / 1e9:.0f}",
                    f"{alone.seconds / whole.seconds:.1f}",
                ]  # fmt: skip
            )
    header = [
        "ranks",
        "shards",
        "tokens again, at most",
        "passes",
        "MiB sent by a rank",
        "GB gathered by FSDP2",
        "x 1 rank",
    ]
    return [*lines, f"{MODELS[1].name} by ranks and shards:", "", *table(header, rows)]


def measured(call, rounds: int = 5) -> float:
    """The quickest of some runs, seconds: other users of the machine only ever add."""
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def ceilings(hidden: int, tokens: int) -> Machine:
    """What this CPU reaches in a matrix product of an MLP's shape and in copying 64 MiB."""
    rows, weight = torch.randn(tokens, hidden), torch.randn(hidden, 3 * hidden)
    matmul = 2 * rows.numel() * 3 * hidden / measured(lambda: rows @ weight, 20)
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)
    return Machine(matmul, 2 * 4 * source.numel() / measured(lambda: target.copy_(source)))


def check(rounds: int) -> list[str]:
    """Small cases on this CPU: predicted from the ceilings of this very run, measured, and the ratio."""
    rows, limit = [], DEFAULT_MAX_TOKENS["cpu"]
    for hidden, layers, vocabulary, shape in CASES:
        model, cache = qwen3_shaped(vocabulary, hidden, layers), shape.cache(vocabulary)
        job = Job.of(cache)
        times, machines = [], [ceilings(hidden, limit)]
        for _ in range(rounds):
            times.append(measured(lambda m=model, c=cache: score_prompts(m, c, progress=False), 1))
            machines.append(ceilings(hidden, limit))
        machine = max(machines, key=lambda m: m.matmul)
        made = predict(Model.of(model.config), job, machine, 1, limit, False, shards=1)
        sharded = score_prompts_sharded(model, cache, shards=4)
        again = sharded.stats["trie_tokens"] / job.tokens - 1
        rows.append(
            [
                f"hidden {hidden}, {layers} layers, V {vocabulary}{', instruction last' if shape.last else ''}",
                f"{job.tokens}",
                f"{machine.matmul / 1e9:.0f}",
                seconds(made.seconds),
                seconds(min(times)),
                f"{min(times) / made.seconds:.2f}",
                f"{100 * again:.1f} %",
                f"{100 * 3 * job.path() / job.tokens:.1f} %",
            ]  # fmt: skip
        )
    ratios = [float(row[5]) for row in rows]
    header = [
        "case",
        "tokens",
        "GFLOP/s",
        "predicted",
        "measured",
        "measured / predicted",
        "tokens again, 4 shards",
        "bound",
    ]
    mean = float(np.exp(np.mean(np.log(ratios))))
    threads = f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), quickest of {rounds}"
    return [threads, "", *table(header, rows), "", f"geometric mean of measured / predicted: {mean:.2f}"]


def by_ranks(rounds: int) -> list[str]:
    """One job by rank 0 alone and by all ranks of the launcher; the bits are compared before a time is printed."""
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
                continue
            # The others wait in the next barrier meanwhile.
            call = partial(score_prompts_sharded, model, cache, group=group, shards=shards)
            times.append(measured(call, rounds))
            found.append(call())
        if dist.get_rank() == 0:
            assert torch.equal(found[0].nll, found[1].nll), "the bits depend on the number of ranks"
            tokens = found[0].stats["trie_tokens"]
            lines.append([f"{shards}", f"{tokens}", *map(seconds, times), f"{times[0] / times[1]:.2f}"])
    world = dist.get_world_size()
    dist.destroy_process_group()
    return table(["shards", "tokens", "1 rank", f"{world} ranks", "times as fast"], lines) if lines else []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure small cases on this CPU instead")
    parser.add_argument("--ranks", action="store_true", help="measure one job by 1 and by all ranks of the launcher")
    parser.add_argument("--rounds", type=int, default=3, help="of --check and --ranks (default: %(default)s)")
    parser.add_argument("--matmul", type=float, help="operations a second of one device (default: 600e12, assumed)")
    parser.add_argument("--copy", type=float, help="bytes a second of its memory (default: 2.5e12, assumed)")
    parser.add_argument("--link", type=float, default=350e9, help="bytes a second inside a node (default: %(default)g)")
    parser.add_argument(
        "--network", type=float, default=40e9, help="bytes a second between nodes (default: %(default)g)"
    )
    parser.add_argument("--prompts", type=int, default=21)
    parser.add_argument("--examples", type=int, default=250)
    options = parser.parse_args(argv)
    if options.ranks:
        print("\n".join(by_ranks(options.rounds)), flush=True)
        return 0
    if options.check:
        print("\n".join(check(options.rounds)))
        return 0
    job = Job.of(Cells(options.prompts, options.examples).cache(50257))
    machine = Machine(options.matmul or 600e12, options.copy or 2.5e12, options.link, options.network)
    source = "given" if options.matmul and options.copy else "assumed for an H100, not measured"
    print("\n".join(report(job, machine, DEFAULT_MAX_TOKENS["cuda"], source)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
