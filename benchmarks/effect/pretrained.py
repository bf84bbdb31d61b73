"""Runs of the effect experiment on a pretrained model, see pretrained_design.py.

Single-task runs keep the weights in bfloat16 and adapters in float32, as on a GPU, and go over tries. Sequences are run
as `run_sequence` is by its users, in float32, where it finds the trie to be exact and takes it.
"""

from __future__ import annotations

import copy
import difflib
import gc
import hashlib
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import sapo_kernels as sk
from sapo_kernels.training.trie_batch import TrieBatch
from sapo_peft.gguf import MODELS
from sapo_peft.sequence import SequenceConfig, SequenceTask, read_tasks, run_sequence

from ..workload import cut, load_pretrained, with_lora
from . import pretrained_design as design
from . import rows

REDUCTIONS = ("token", "example", "batch")


@dataclass(frozen=True)
class Setting:
    """A base, the data folder and where to run. part: (i, n) takes every n-th group of runs, from the i-th on.

    rate: the learning rate of single-task runs, instead of the base's.
    """

    base: str
    data: Path
    device: str
    part: tuple[int, int]
    rate: float | None = None

    def kind(self, kind: str) -> str:
        """The name of the rows: ``single_smollm2``, ``single_smollm2_0.0005``."""
        return f"{kind}_{self.base}" + (f"_{self.rate:g}" if self.rate else "")

    @property
    def single(self) -> design.SingleConfig:
        """The options of its single-task runs."""
        config = design.single_config(self.base)
        return replace(config, learning_rate=self.rate) if self.rate else config

    def made_by(self) -> dict[str, Any]:
        """What decides the rows."""
        import peft
        import transformers

        names = sorted({*design.EARLIER, *design.TRAINED, *design.ORDER})
        digests = "".join(task.digest() for task in read_tasks(self.data, names))
        machine = torch.cuda.get_device_name() if self.device == "cuda" else f"{platform.machine()}, CPU"
        return {
            "base": MODELS[self.base].sha256,
            "data": hashlib.sha256(digests.encode()).hexdigest(),
            "single": {**asdict(self.single), "warm_steps": design.WARM_STEPS, "input_tokens": design.INPUT_TOKENS},
            "sequence": {**design.SEQUENCE_OPTIONS, "order": list(design.ORDER)},
            "versions": {one.__name__: one.__version__ for one in (torch, transformers, peft)},
            "machine": machine,
        }  # fmt: skip

    def load(self) -> tuple[Any, Any]:
        """(model in float32, tokenizer)."""
        return load_pretrained(self.base, self.device)

    def tasks(self, names: tuple[str, ...], seed: int, tokenizer: Any) -> dict[str, SequenceTask]:
        """Tasks with short inputs, their training rows in an order drawn by the seed."""
        found = {}
        for task in read_tasks(self.data, names):
            train = list(task.train)
            random.Random(f"{seed}/{task.name}").shuffle(train)
            train = train[: max(design.SINGLE.max_steps * design.SINGLE.batch_size, design.SINGLE.probe_examples)]
            test = list(task.test[: design.SINGLE.test_examples])
            train, test = (cut(part, tokenizer, design.INPUT_TOKENS) for part in (train, test))
            found[task.name] = SequenceTask.build(task.name, train, test, task.pool)
        return found


def cache_of(tokenizer: Any, task: SequenceTask, prompts: list[str], examples: Any) -> sk.ResponseCache:
    return sk.ResponseCache.build(
        tokenizer, prompts, list(examples), suffix=task.pool.suffix, max_target=design.TARGET_TOKENS
    )


def trie_loss(model: Any, batch: list) -> torch.Tensor:
    """The mean over response tokens, over the trie of the batch."""
    packed = TrieBatch.pack(*zip(*batch, strict=True)).to(next(model.parameters()).device)
    return -sk.tree_logprobs(model, packed, verify=False).mean()


def rows_of(cache: sk.ResponseCache) -> list[tuple[list[int], list[int]]]:
    return list(zip(cache.contexts[0], cache.responses[0], strict=True))


def trained(base: Any, rows: list[tuple[list[int], list[int]]], seed: int, config: design.SingleConfig):
    """(a copy of the base with a trained adapter, mean training loss of the last quarter of the steps).

    rows: context and response in token ids, in the order of training, as often as needed.
    """
    from transformers import get_cosine_schedule_with_warmup

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = with_lora(copy.deepcopy(base), config.lora_r, config.lora_alpha, task_type="CAUSAL_LM")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * config.max_steps), config.max_steps)
    losses = []
    for start in range(0, config.max_steps * config.batch_size, config.batch_size):
        loss = trie_loss(model, [rows[i % len(rows)] for i in range(start, start + config.batch_size)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    late = losses[-max(1, len(losses) // 4) :]
    return model.eval(), math.fsum(late) / len(late)


def warm_start(
    model: Any, tokenizer: Any, tasks: dict[str, SequenceTask], seed: int, config: design.SingleConfig
) -> Any:
    """`model` after it has learned the earlier tasks, a batch of each in turn; merged, in bfloat16."""
    streams, size = [], config.batch_size
    for name in design.EARLIER:
        task = tasks[name]
        streams.append(rows_of(cache_of(tokenizer, task, [task.pool.prompts[0]], task.train)))
    mixed = [row for step in range(design.WARM_STEPS) for stream in streams for row in stream[step * size :][:size]]
    steps = design.WARM_STEPS * len(streams)
    model, _ = trained(model.bfloat16(), mixed, seed, replace(config, max_steps=steps))
    return model.float().merge_and_unload().bfloat16().eval()


class Damage:
    """Test texts of all tasks under their original instructions, packed once."""

    def __init__(self, tokenizer: Any, tasks: dict[str, SequenceTask]):
        self.caches = {
            name: cache_of(tokenizer, task, [task.pool.prompts[0]], task.test) for name, task in tasks.items()
        }

    def losses(self, model: Any) -> dict[str, float]:
        """Loss of each task by name, nats per token."""
        return {name: float(score(model, cache).loss[0]) for name, cache in self.caches.items()}


@torch.no_grad()
def score(model: Any, cache: sk.ResponseCache) -> sk.PromptScores:
    """`score_prompts` over tries, prompt by prompt, without its comparison with the plain model.

    In bfloat16 the comparison fails: two plain ways of running SmolLM2, padded and alone, differ by up to 0.6 nats a
    sequence, and so does the trie. Of means over rows that is a hundredth of a nat a token, and it is the same text for
    every prompt that is compared.
    """
    nll, tokens = [], []
    for contexts, responses in zip(cache.contexts, cache.responses, strict=True):
        packed = TrieBatch.pack(contexts, responses).to(next(model.parameters()).device)
        parts = sk.tree_logprobs(model, packed, verify=False).cpu().double().split(packed.sequence_ptr.diff().tolist())
        nll.append(torch.stack([-part.sum() for part in parts]))
        tokens.append(torch.tensor([len(part) for part in parts]))
    return sk.PromptScores(torch.stack(nll), torch.stack(tokens), [f"prompt {k}" for k in range(len(nll))])


def before_learning(model: Any, cache: sk.ResponseCache) -> list[dict[str, float]]:
    """What a policy can see of each prompt: losses on so many rows, and how sure the difference to the original is."""
    scores = score(model, cache)
    found: list[dict[str, float]] = [{} for _ in scores.prompts]
    for count in design.PROBES:
        part = sk.PromptScores(scores.nll[:, :count], scores.tokens[:, :count], scores.prompts)
        for kind in REDUCTIONS:
            for one, loss in zip(found, part.reduce(kind).tolist(), strict=True):
                one[f"pre_{kind}_{count}"] = loss
        # Of the token mean's difference to the original: all prompts have the same number of tokens.
        error = (part.nll - part.nll[:1]).std(1) * math.sqrt(count) / part.tokens[0].sum()
        for one, value in zip(found, error.tolist(), strict=True):
            one[f"pre_error_{count}"] = value
    return found


def run_singles(setting: Setting, work: Path, until: float) -> int:
    """All single-task runs that are missing; returns how many still are when the time is up."""
    mark, kind, left, state = setting.made_by(), setting.kind("single"), 0, None
    for at, (task, seed) in enumerate(design.single_runs()):
        names = {k: f"{task}_{seed}_{k:02d}" for k in design.prompts_of(task)}
        missing = [k for k, name in names.items() if not rows.done(work, kind, name, mark)]
        if at % setting.part[1] != setting.part[0] or not missing:
            continue
        if time.time() > until:
            left += len(missing)
            continue
        if state is None or state.seed != seed:
            state = None
            gc.collect()
            state = Warm(setting, seed)
        for k, row in state.run(task, list(names), missing, until):
            rows.put(work, kind, names[k], mark, [rows.rounded(row)])
            missing.remove(k)
        left += len(missing)
    return left


class Warm:
    """A model that has learned the earlier tasks, and what is measured on it."""

    def __init__(self, setting: Setting, seed: int):
        self.seed, self.config, started = seed, setting.single, time.perf_counter()
        base, self.tokenizer = setting.load()
        self.tasks = setting.tasks((*design.EARLIER, *design.TRAINED), seed, self.tokenizer)
        self.damage = Damage(self.tokenizer, self.tasks)
        self.cold = base.bfloat16()
        self.model = warm_start(self.cold, self.tokenizer, self.tasks, seed, setting.single)
        self.before = self.damage.losses(self.model)
        learned = ", ".join(f"{name.partition('_')[0]} {loss:.2f}" for name, loss in self.before.items())
        print(f"warm start, seed {seed}: {time.perf_counter() - started:.0f} s; losses {learned}", flush=True)

    def run(self, name: str, chosen: list[int], wanted: list[int], until: float) -> Iterator[tuple[int, dict]]:
        """(prompt, its row) for each wanted one of the `chosen` prompts, until the time is up."""
        task, config = self.tasks[name], self.config
        prompts = [task.pool.prompts[k] for k in chosen]
        probe = cache_of(self.tokenizer, task, prompts, task.train[: config.probe_examples])
        seen = before_learning(self.model, probe)
        few = cache_of(self.tokenizer, task, prompts, task.train[: design.PROBES[0]])
        cold = score(self.cold, few).loss.tolist()
        steps = task.train[: config.max_steps * config.batch_size]
        for place, k in enumerate(chosen):
            if k not in wanted or time.time() > until:
                continue
            started = time.perf_counter()
            given = rows_of(cache_of(self.tokenizer, task, [prompts[place]], steps))
            model, last = trained(self.model, given, self.seed, config)
            seconds = time.perf_counter() - started
            # The adapter too: on a CPU half of the time of a forward would go into turning numbers to float32 and back.
            model = model.bfloat16()
            after = self.damage.losses(model)
            test = cache_of(self.tokenizer, task, [prompts[place]], task.test)
            own = float(score(model, test).loss[0])
            rise = {other: after[other] - self.before[other] for other in after}
            row = {
                "task": name, "seed": self.seed, "prompt": k, "pre": seen[place][f"pre_token_{design.PROBES[-1]}"],
                "last_train": last, "own": own, "forgetting": fmean(rise[other] for other in design.EARLIER),
                "others": fmean(rise[other] for other in design.TRAINED if other != name),
                **{f"rise_{other.partition('_')[0]}": value for other, value in rise.items() if other != name},
                **seen[place], f"pre_cold_{design.PROBES[0]}": cold[place],
                "near": likeness(prompts[0], prompts[place]), "seconds": seconds,
            }  # fmt: skip
            print(
                f"{name.partition('_')[0]} {self.seed} {k}: before {row['pre']:.2f}, own {own:.2f}, forgetting "
                f"{row['forgetting']:+.3f}, others {row['others']:+.3f}; {seconds:.0f} of "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
            yield k, row


def likeness(one: str, other: str) -> float:
    """How much of two instructions is the same words in the same order, 0 to 1."""
    return difflib.SequenceMatcher(None, one.lower().split(), other.lower().split()).ratio()


def run_sequences(setting: Setting, work: Path, until: float) -> int:
    """All sequence runs that are missing; returns how many still are when the time is up."""
    mark, kind, left, pair = setting.made_by(), setting.kind("sequences"), 0, None
    for at, run in enumerate(design.sequence_runs()):
        if at % setting.part[1] != setting.part[0] or rows.done(work, kind, run.name, mark):
            continue
        if time.time() > until:
            left += 1
            continue
        pair = pair or setting.load()
        model, tokenizer = pair
        tasks = list(setting.tasks(design.ORDER, run.seed, tokenizer).values())
        config = SequenceConfig(**run._asdict(), **design.SEQUENCE_OPTIONS)
        result = run_sequence((model, tokenizer), tasks, None, config, name=setting.base, progress=False)
        metrics = {name: rows.rounded(entry) for name, entry in result.metrics.items()}
        chosen = [choice["index"] for choice in result.choices]
        rows.put(work, kind, run.name, mark, [
            {**run._asdict(), "order": "a", **metrics, "prompts": chosen, "cost": rows.rounded(result.cost)}
        ])  # fmt: skip
        print(f"{run.name}: loss AP {metrics['loss']['AP']:.3f}, {result.cost}", flush=True)
    return left
