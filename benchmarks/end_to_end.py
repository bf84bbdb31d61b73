"""End to end on one machine, in one run, interleaved: score_prompts against the peers.

    python -m benchmarks.end_to_end --data DIR --tasks task141 --examples 16 --vocab 50257
    python -m benchmarks.end_to_end --data DIR --examples 6 --peers tuned_plain    # every task of the folder

Every provider's output is compared with the oracle (each sequence alone, no padding) and with ours cell by cell before
a time is kept. On a shared CPU only the ratios mean something. "of ratio" is the speed-up over the best peer without
the trie divided by dense / trie tokens.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import statistics
from pathlib import Path

import torch

import sapo_kernels as sk
from sapo_kernels import plan_trie

from .peers import PEERS, alone
from .rows import Row, append_rows
from .timing import Case, Provider, run_case
from .workload import build_cache, data_folder, load_tasks, load_tokenizer, qwen3_shaped

# Nats per token: the promise of the package in fp32.
TOLERANCE = 1e-4
FORMULA = "2*layer weights*trie tokens + 2*D*V*rows + 4*layers*heads*head_dim*sum(depth+1)"
ORACLE_CELLS = 24
# Bytes that logits of every row may take on a CPU: themselves, their log-softmax and one more copy, in fp32. On a GPU a
# size that does not fit is a finding.
ROOM = 4 * 2**30


class Agreement:
    """The check of one job: a few cells against each sequence alone, all cells against ours.

    In fp32 an error is the largest over the cells, in nats per response token. In low precision the oracle is the same
    model in fp32, and the error of a cell is in nats per square root of its response tokens: rounding differs from
    token to token, so cells of all lengths err alike by that measure. Their root mean square counts, and the largest
    divided by what the largest of so many normal errors is at most; the tolerance is twice the root mean square that
    plain transformers reaches on the oracle's cells in that precision (plus 1e-3).
    """

    def __init__(self, model, cache, tolerance: float = TOLERANCE):
        self.low = model.dtype in (torch.bfloat16, torch.float16)
        counts = torch.from_numpy(cache.response_lengths).double()
        self.unit = counts.sqrt() if self.low else counts
        # Of a mean over tokens, as if one cell of usual length had it.
        self.unit_of_means = float(counts.mean().sqrt()) if self.low else 1.0
        cells = len(counts)
        self.sample = sorted(set(torch.linspace(0, cells - 1, min(cells, ORACLE_CELLS)).long().tolist()))
        self.exact, self.tolerance = self._oracle(model, cache, tolerance)
        self.ours = sk.score_prompts(model, cache, progress=False)

    def _oracle(self, model, cache, tolerance: float) -> tuple[torch.Tensor, float]:
        if not self.low:
            return alone(model, cache, self.sample), tolerance
        exact = alone(copy.deepcopy(model).float(), cache, self.sample)
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        plain = alone(model, cache, self.sample)
        return exact, 2 * float(((plain - exact) / self.unit[self.sample]).square().mean().sqrt()) + 1e-3

    def _size(self, differences: torch.Tensor) -> torch.Tensor:
        largest = differences.abs().max()
        if not self.low:
            return largest
        usual = differences.square().mean().sqrt()
        # Not Python's `max`, which passes a NaN over.
        return torch.maximum(usual, largest / math.sqrt(2 * math.log(2 * len(differences))))

    def error_of_cells(self, nll: torch.Tensor) -> float:
        """[K * M] nats: the distance from the oracle, or from ours if that is larger."""
        far = self._size((nll[self.sample] - self.exact) / self.unit[self.sample])
        return float(torch.maximum(far, self._size((nll - self.ours.nll.flatten()) / self.unit)))

    def error_of_means(self, losses: torch.Tensor, batch_size: int = 8) -> float:
        """[K] nats per token as `Trainer.evaluate` means them."""
        return float((losses - self.ours.reduce("batch", batch_size)).abs().max()) * self.unit_of_means


def needed_work(model, trie) -> float:
    """Floating point operations of one forward over the trie and one head row for each response row."""
    config = model.config
    embedding = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    layers = sum(p.numel() for p in model.parameters()) - embedding - (0 if tied else head)
    seen = float((trie.depth + 1).sum())
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen
    return 2.0 * layers * len(trie) + 2.0 * head * len(trie.row_token) + attention


def affordable(peer, sizes: tuple[int, ...], model, cache) -> tuple[int, ...] | None:
    """Those of a peer's batch sizes for which a CPU has the `ROOM`; None if it has room for none of them."""
    if not sizes or not peer.loop or model.device.type != "cpu":
        return sizes
    longest = max(len(ids) for row in cache.contexts for ids in row) + int(max(cache.response_lengths))
    fitting = tuple(size for size in sizes if 3 * 4 * size * longest * model.config.vocab_size <= ROOM)
    return fitting or None


def make_case(
    op: str, name: str, model, cache, peers: list[str], rounds: int, sizes=None, loop_rounds=1, **options
) -> Case:
    """`score_prompts` and the named peers on one job; what is not installed or has no room is left out.

    sizes: by peer, instead of its own. loop_rounds: turns that peers which loop take part in. options: for ours.
    """
    trie = plan_trie(cache.ids, cache.offsets, cache.context_lengths)
    check = Agreement(model, cache)
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[model.dtype]

    def ours():
        return sk.score_prompts(model, cache, progress=False, **options).nll.flatten()

    providers, runs = {"ours": Provider(ours, tokens=len(trie))}, []
    for peer_name in peers:
        peer = PEERS[peer_name]
        chosen = affordable(peer, (sizes or {}).get(peer_name, peer.sizes), model, cache)
        if peer.missing() or chosen is None:
            continue
        own_check = check.error_of_means if peer.gives == "batch8" else None
        for suffix, run in peer.variants(chosen).items():
            runs.append(run)
            providers[peer_name + suffix] = Provider(
                lambda run=run: run(model, cache), tokens=trie.dense_tokens, check=own_check,
                rounds=loop_rounds if peer.loop else None, peer=peer_name,
            )  # fmt: skip

    small = sk.ResponseCache.from_token_ids(
        [row[:2] for row in cache.contexts[:2]], [r[:2] for r in cache.responses[:2]]
    )

    def warm_up():  # ours was run whole for the check
        for run in runs:
            run(model, small)

    config = model.config
    shape = (
        f"K={cache.num_prompts} M={cache.num_examples} V={config.vocab_size} D={config.hidden_size} "
        f"L={config.num_hidden_layers} dense/trie={trie.dense_tokens / len(trie):.3f}"
    )
    return Case(
        op, name, providers, check.error_of_cells, check.tolerance, shape=shape, dtype=dtype,
        work=needed_work(model, trie), formula=FORMULA, rounds=rounds, warm_up=warm_up,
    )  # fmt: skip


def task_name(task) -> str:
    return task.name.split("_")[0] if task.name.startswith("task") else task.name[:32]


def summary(rows: list[Row]) -> dict[str, float]:
    """p50 seconds by peer (the fastest of its sizes) and the token ratio of one case's rows."""
    best: dict[str, float] = {}
    for row in rows:
        name = next((p for p in PEERS if row.provider == p or row.provider.rpartition("_")[0] == p), row.provider)
        best[name] = min(best.get(name, row.p50_s), row.p50_s)
    ours = next(row for row in rows if row.provider == "ours")
    dense = max((row.tokens for row in rows), default=ours.tokens)
    return {**best, "tokens/trie": dense / ours.tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with SUPERNI/ and paraphrases.json (default: bundled)")
    parser.add_argument("--tasks", nargs="*", help="task names, or their part before the first underscore")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=["trainer_loop", "tuned_plain"], choices=list(PEERS))
    parser.add_argument("--out", type=Path, help="append the rows to this CSV file")
    args = parser.parse_args()

    data = data_folder(args.data)
    tokenizer = load_tokenizer(data / "gpt2tokenizer")
    model = qwen3_shaped(args.vocab, args.hidden, args.layers)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, hidden {args.hidden}, layers {args.layers}, "
          f"vocabulary {args.vocab}, {args.examples} examples, median of {args.rounds}")  # fmt: skip
    print(
        f"{'task':<16}{'tokens/trie':>12}{'ours s':>9}"
        + "".join(f"{name + ' x':>16}" for name in args.peers)
        + f"{'of ratio':>10}"
    )
    found: dict[str, list[float]] = {}
    for task in load_tasks(data, args.tasks):
        cache = build_cache(task, tokenizer, args.examples)
        rows = run_case(
            make_case("end_to_end", task_name(task), model, cache, args.peers, args.rounds, loop_rounds=None)
        )
        if args.out:
            append_rows(args.out, rows)
        by = summary(rows)
        ratios = {name: by[name] / by["ours"] for name in args.peers if name in by}
        for name, ratio in ratios.items():
            found.setdefault(name, []).append(ratio)
        plain = [r for name, r in ratios.items() if not PEERS[name].loop]
        of_ratio = f"{min(plain) / by['tokens/trie']:>10.0%}" if plain else ""
        cells = "".join(f"{ratios.get(name, float('nan')):>16.2f}" for name in args.peers)
        print(f"{task_name(task)[:15]:<16}{by['tokens/trie']:>12.2f}{by['ours']:>9.2f}{cells}{of_ratio}", flush=True)
    for name, ratios in found.items():
        if len(ratios) > 1:
            print(f"geometric mean over {name}: {statistics.geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()
