"""Single-task runs: train one task under one prompt, see what that does to the task and to everything else.

For each task and seed every prompt of the pool is tried on the same base, the same rows in the same order and the
same initial adapter. What is measured is the loss of the targets (nats per token):

- `pre`: of the prompt on the probe rows, before any update; the score SAPO chooses by;
- `own`: of the task's test rows under the trained prompt, after the updates;
- `forgetting`: mean rise of the loss on the skills that the base was trained on at length;
- `others`: mean rise of the loss on the test rows of the other tasks of the sequence, which the base half knows, under
  their original instructions: negative where learning this task helps them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import sapo_kernels as sk
from sapo_peft.tiny_base import sequence_tasks
from tools.bundled_tasks.common import Draw
from tools.tiny_base.corpus import SEQUENCE
from tools.tiny_base.skills import SKILLS

Rows = list[tuple[list[int], list[int]]]
LossOf = Callable[[Any, Rows], torch.Tensor]


@dataclass(frozen=True)
class SingleConfig:
    """Options of the single-task runs, with the names of `SequenceConfig`."""

    max_steps: int
    batch_size: int
    learning_rate: float
    probe_examples: int
    test_examples: int
    skill_examples: int = 4
    warmup: float = 0.05
    lora_r: int = 8
    lora_alpha: int = 32
    max_grad_norm: float = 1.0


class Damage:
    """Test texts of everything but one task, tokenised once."""

    def __init__(self, tokenizer: Any, config: SingleConfig):
        self.tasks: dict[str, sk.ResponseCache] = {}
        for task in sequence_tasks(SEQUENCE, 0, config.test_examples):
            pool = task.pool
            self.tasks[task.name] = _cache(tokenizer, pool.prompts[0], task.test)
        draw = Draw(977)
        self.skills = []
        for skill in SKILLS.values():
            rows = [dict(zip(("input", "target"), skill.make(draw), strict=True)) for _ in range(config.skill_examples)]
            self.skills.append(_cache(tokenizer, draw.pick(skill.instructions()), rows))

    def losses(self, model: Any) -> dict[str, float]:
        """Loss of each bundled task by name and of the skills together, nats per token."""
        found = {name: _loss(model, cache) for name, cache in self.tasks.items()}
        found["skills"] = math.fsum(_loss(model, cache) for cache in self.skills) / len(self.skills)
        return found


def run_task(
    base: Any, tokenizer: Any, name: str, seed: int, prompts: list[int] | None, config: SingleConfig, damage: Damage
) -> list[dict[str, Any]]:
    """One row for each prompt (None: all of the pool), see the module."""
    (task,) = sequence_tasks((name,), seed, config.test_examples)
    pool = task.pool
    probe = list(task.train[: config.probe_examples])
    pre = sk.score_prompts(base, list(pool.prompts), probe, tokenizer=tokenizer, progress=False)
    before = damage.losses(base)
    wanted = [task.train[i % len(task.train)] for i in range(config.max_steps * config.batch_size)]
    rows = []
    for k in range(len(pool.prompts)) if prompts is None else prompts:
        cache = _cache(tokenizer, pool.prompts[k], wanted)
        rows_of_prompt = list(zip(cache.contexts[0], cache.responses[0], strict=True))
        model, last = trained(base, rows_of_prompt, seed, config, padded_loss(tokenizer.pad_token_id))
        after = damage.losses(model)
        own = _loss(model, _cache(tokenizer, pool.prompts[k], task.test))
        rise = {key: after[key] - before[key] for key in before}
        half_known = [rise[key] for key in SEQUENCE if key != name]
        rows.append(
            {
                "task": name,
                "seed": seed,
                "prompt": k,
                "pre": float(pre.loss[k]),
                "last_train": last,
                "own": own,
                "forgetting": rise["skills"],
                "others": math.fsum(half_known) / len(half_known),
                **{f"rise_{key.partition('_')[0]}": value for key, value in rise.items() if key in SEQUENCE},
            }
        )
    return rows


def trained(base: Any, rows: Rows, seed: int, config: SingleConfig, loss_of: LossOf):
    """(a copy of the base with a trained adapter, mean training loss of the last quarter of the steps).

    rows: context and response in token ids, in the order of training, as often as needed.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import get_cosine_schedule_with_warmup

    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), lora).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * config.max_steps), config.max_steps)
    losses = []
    for start in range(0, config.max_steps * config.batch_size, config.batch_size):
        loss = loss_of(model, [rows[i % len(rows)] for i in range(start, start + config.batch_size)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    late = losses[-max(1, len(losses) // 4) :]
    return model.eval(), math.fsum(late) / len(late)


def padded_loss(pad: int) -> LossOf:
    """The mean over response tokens of a padded batch."""

    def loss_of(model: Any, batch: Rows) -> torch.Tensor:
        backbone, head = model.get_base_model().model, model.get_base_model().lm_head
        longest = max(len(context) + len(response) for context, response in batch)
        ids = torch.full((len(batch), longest), pad)
        labels = torch.full_like(ids, -100)
        for i, (context, response) in enumerate(batch):
            end = len(context) + len(response)
            ids[i, :end] = torch.tensor(context + response)
            labels[i, len(context) : end] = torch.tensor(response)
        targets = labels[:, 1:]
        # Right padding under causal attention needs no mask, and only response rows need the head.
        hidden = backbone(input_ids=ids[:, :-1]).last_hidden_state[targets != -100]
        return torch.nn.functional.cross_entropy(head(hidden), targets[targets != -100])

    return loss_of


def _cache(tokenizer: Any, prompt: str, rows: Any) -> sk.ResponseCache:
    return sk.ResponseCache.build(tokenizer, [prompt], list(rows))


def _loss(model: Any, cache: sk.ResponseCache) -> float:
    return float(sk.score_prompts(model, cache, progress=False).loss[0])
