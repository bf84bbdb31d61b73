"""score_prompts on whole models against the peers: one task, every task, one thing changed at a time, and races.

Every provider's output is compared with the oracle (each sequence alone, no padding) and with ours cell by cell before
a time is kept. On a shared CPU only the ratios mean something.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import math

import torch

import sapo_kernels as sk
from sapo_kernels import plan_trie
from tests.oracles import alone_nll

from ..peers import PEERS
from ..peers.plain import cells_of
from ..registry import DTYPE_NAMES, Op, Setting
from ..timing import Case, Provider
from ..workload import Cells, build_cache, cut, load_pretrained, load_tasks, load_tokenizer, qwen3_shaped

# Nats per token: the promise of the package in fp32.
TOLERANCE = 1e-4
FORMULA = "2*layer weights*trie tokens + 2*D*V*rows + 4*layers*heads*head_dim*sum(depth+1)"
ORACLE_CELLS = 24
# Tokens of all sequences of a task, which decide how many examples are taken of it.
TASK_TOKENS = 6000


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


def alone(model, cache, chosen: list[int] | None = None) -> torch.Tensor:
    """[len(chosen)] float64: the oracle's sums for some cells, or for all."""
    cells = cells_of(cache)
    chosen = range(len(cells)) if chosen is None else chosen
    return torch.tensor([sum(alone_nll(model, *cells[c])) for c in chosen], dtype=torch.float64)


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


def make_case(op: str, name: str, model, cache, peers, rounds: int, sizes=None) -> Case:
    """`score_prompts` and the named peers on one job; what is not installed is left out.

    sizes: by peer, instead of its own.
    """
    trie = plan_trie(cache.ids, cache.offsets, cache.context_lengths)
    check = Agreement(model, cache)

    def ours():
        return sk.score_prompts(model, cache, progress=False).nll.flatten()

    providers, runs = {"ours": Provider(ours, tokens=len(trie))}, []
    for peer_name in peers:
        peer = PEERS[peer_name]
        if peer.missing():
            continue
        own_check = check.error_of_means if peer.gives == "batch8" else None
        for suffix, run in peer.variants((sizes or {}).get(peer_name)).items():
            runs.append(run)
            providers[peer_name + suffix] = Provider(
                functools.partial(run, model, cache), tokens=trie.dense_tokens, check=own_check,
                rounds=1 if peer.loop else None, peer=peer_name,
            )  # fmt: skip

    def warm_up():  # ours was run whole for the check
        for run in runs:
            run(model, _small(cache))

    config = model.config
    shape = (
        f"K={cache.num_prompts} M={cache.num_examples} V={config.vocab_size} D={config.hidden_size} "
        f"L={config.num_hidden_layers} dense/trie={trie.dense_tokens / len(trie):.3f}"
    )
    return Case(
        op, name, providers, check.error_of_cells, check.tolerance, shape=shape, dtype=DTYPE_NAMES[model.dtype],
        work=needed_work(model, trie), formula=FORMULA, rounds=rounds, warm_up=warm_up,
    )  # fmt: skip


def _small(cache) -> sk.ResponseCache:
    """Four of its cells."""
    rows = zip(cache.contexts[:2], cache.responses[:2], strict=True)
    contexts, responses = zip(*((context[:2], response[:2]) for context, response in rows), strict=True)
    return sk.ResponseCache.from_token_ids(contexts, responses)


model_of = functools.cache(qwen3_shaped)


def task_name(task) -> str:
    return task.name.split("_")[0] if task.name.startswith("task") else task.name[:32]


def tasks_of(setting: Setting) -> dict:
    if setting.device != "cpu":  # gpu_parts/models.py has the models for a GPU
        return {}
    return {task_name(task): task for task in load_tasks(setting.data)[: 1 if setting.toy else None]}


def _first(setting: Setting) -> list[str]:
    """task141 where it is, else the first of the folder."""
    names = list(tasks_of(setting))
    return ["task141"] if "task141" in names else names[:1]


def tokenizer_of(setting: Setting):
    return load_tokenizer(setting.data / "gpt2tokenizer")


def one_task(setting: Setting, name: str):
    everyone = [peer for peer, of in PEERS.items() if not of.gpu]
    examples = 2 if setting.toy else int(10 * min(setting.scale, 2))
    model = model_of(2816, 128, 2) if setting.toy else model_of(50257, 512, 8)
    cache = build_cache(tasks_of(setting)[name], tokenizer_of(setting), examples)
    return make_case("end_to_end", name, model, cache, everyone, rounds=2), None


def every_task(setting: Setting, name: str):
    """As many examples as `TASK_TOKENS` allow."""
    task, tokenizer, examples = tasks_of(setting)[name], tokenizer_of(setting), 1 if setting.toy else 2
    cache = build_cache(task, tokenizer, examples)
    if not setting.toy and (more := int(TASK_TOKENS * setting.scale * examples / cache.offsets[-1])) > examples:
        cache = build_cache(task, tokenizer, min(more, 32))
    sizes = {"trainer_loop": (), "tuned_plain": (8, 32), "prefix_cache": (32,)}
    model = model_of(2816, 128, 2) if setting.toy else model_of(50257, 256, 4)
    return make_case("tasks", name, model, cache, list(sizes), rounds=2, sizes=sizes), None


# Around the usual point, which is measured once.
AXES = {
    "layout": [("last", False), ("last", True)],
    "K": [("prompts", n) for n in (1, 16, 64)],
    "M": [("examples", n) for n in (1, 16, 32)],
    "prompt": [("prompt", n) for n in (15, 240)],
    "input": [("input", n) for n in (15, 320)],
    "response": [("response", n) for n in (1, 32)],
    "V": [("vocabulary", n) for n in (32000, 128256, 256000)],
    "D": [("hidden", n) for n in (128, 512, 1024)],
}
NAMES_OF_LAYOUTS = {True: "last", False: "first"}
POINTS = {
    f"{axis}={NAMES_OF_LAYOUTS.get(value, value) if axis == 'layout' else value}": (field, value)
    for axis, points in AXES.items() for field, value in points
}  # fmt: skip


def one_change(setting: Setting, name: str, field: str = "", value: int = 0):
    """Where score_prompts gains, and where it loses, against tuned transformers."""
    cells = Cells(prompts=8, examples=round(4 * min(setting.scale, 4)))
    shape = {"vocabulary": 50257, "hidden": 256, "layers": 4}
    if setting.toy:
        cells, shape = Cells(2, 2, 6, 8, 2), {"vocabulary": 300, "hidden": 128, "layers": 1}
    elif field in shape:
        shape[field] = value
    else:
        cells = dataclasses.replace(cells, **{field: value})
    sizes = {"tuned_plain": (8, 32), "prefix_cache": (32,)}
    model, cache = model_of(**shape), cells.cache(shape["vocabulary"])
    return make_case("sweep", name, model, cache, list(sizes), rounds=2, sizes=sizes), None


def race(setting: Setting, name: str):
    """A task's prompt chosen on a real model: what people use today, every cell, and a race.

    All read one cache of token ids, which is in nobody's time. The note of the race says what it scored and chose. 250
    examples take hours on a CPU; --scale 0.1 takes fewer.
    """
    model, tokenizer = load_pretrained(setting.base)
    task = tasks_of(setting)[name]
    count = 4 if setting.toy else round(250 * min(setting.scale, 1.0))
    rows = cut(task.examples[:count], tokenizer, 64)
    cache = sk.ResponseCache.build(tokenizer, task.prompts, rows, suffix=task.suffix)
    sizes = {"trainer_loop": (), "tuned_plain": (32,), "prefix_cache": (32,), "lm_eval": (8,)}
    case = make_case("race", name, model, cache, list(sizes), rounds=1, sizes=sizes)

    def check(raced: sk.PromptScores) -> float:
        far = (raced.nll - full.nll).abs() / full.tokens
        above = float(full.loss[raced.best] / full.loss.min() - 1)
        case.providers[
            "race"
        ].note = f"{raced.race.cells} of {far.numel()} cells, prompt {raced.best}, {above:.2%} above"
        return float(torch.where(raced.scored, far, 0.0).max())

    full = sk.score_prompts(model, cache, progress=False)
    case.providers["race"] = Provider(
        lambda: sk.score_prompts(model, cache, progress=False, race=sk.Race()), check=check
    )
    return case, None


Op("end_to_end", one_task, names=_first, share=0.22)
Op("tasks", every_task, names=lambda setting: list(tasks_of(setting)), share=0.3)
Op("sweep", one_change, cpu=POINTS, share=0.32)
Op("race", race, names=lambda setting: list(tasks_of(setting)) if setting.base else [], share=0.0)
