"""SapoCollator: from raw examples to model inputs, each under the prompt that is chosen when it is rendered."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sapo_kernels.scoring.render import Renderer, Template, check_examples
from sapo_kernels.scoring.response_cache import CellBuilder
from sapo_kernels.training.trie_batch import TrieBatch, padded_rows

from .choice import Choice

logger = logging.getLogger("sapo_peft")

# The keys under which a batch carries what it was made of (until the step's batches are fetched), and its `TrieBatch`.
CARRIED, PACKED = "sapo", "trie"


@dataclass(frozen=True)
class Carried:
    """What a batch was made of and the round it was rendered in; opaque to data loaders and devices.

    counts: response tokens by (task, prompt).
    """

    examples: list[dict[str, str]]
    tasks: list[str]
    round: tuple[int, int]
    counts: dict[tuple[str, int], int]


class SapoCollator:
    """Renders and tokenises examples with the prompts chosen now; a data collator for any PyTorch DataLoader.

    The tokens are exactly those that `score_prompts` scores. Labels stand on the response (with the tokens that close
    the assistant's turn); everything else is -100.

    Args:
        tokenizer: a transformers tokenizer.
        choice: the pools and what is chosen.
        max_source, template, instruction_role: see `SapoConfig`.
        max_target: longest response in tokens; None: whole. One that is cut loses its end, hence the tokens that close
            the turn, which is said once.
        packed: add the batch as a `sapo_kernels.TrieBatch`, "trie", for `sapo_kernels.tree_logprobs`.
        carry: add what `attach_sapo` needs to render a batch again whose choice is no longer the newest.
        sample: in mode "soft", draw a prompt for each example; False: the best one for all, as evaluation wants it.

    Called with a list of mappings with "input" and "target" (or "sentence"/"label", "prompt"/"completion", or messages:
    "messages", or TRL's lists of them as "prompt" and "completion") and, with several tasks, "task". Returns input_ids,
    attention_mask, labels: [B, L] int64, padded on the right.

    Staleness: in a DataLoader of its own a batch is rendered when it is fetched, so it may be older than the newest
    choice by the loader's prefetch (one batch without workers under Accelerate, ``workers * prefetch_factor + 1``
    with). Under `attach_sapo` it is rendered again when it is older: never stale.
    """

    def __init__(
        self,
        tokenizer: Any,
        choice: Choice,
        *,
        max_source: int = 1536,
        max_target: int | None = None,
        template: Template = None,
        instruction_role: str = "user",
        packed: bool = False,
        carry: bool = False,
        sample: bool = True,
    ):
        self.tokenizer, self.choice, self.sample = tokenizer, choice, sample
        self.packed, self.carry = packed, carry
        self.max_source, self.max_target = max_source, max_target
        self._said: set[str] = set()
        self.renderers = {
            task: Renderer(tokenizer, template, pool.suffix, pool.text_word, instruction_role=instruction_role)
            for task, pool in choice.pools.items()
        }
        self.pad = padding_token(tokenizer)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if torch.utils.data.get_worker_info() is not None:
            # The tokenizer's thread pool does not survive a fork: a worker that waits for it waits for ever.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tasks = [self.choice.task_of(feature) for feature in features]
        return self.render(check_examples(features), tasks)

    def render(self, examples: list[dict[str, str]], tasks: list[str]) -> dict[str, Any]:
        """The batch of checked examples under the prompts chosen now."""
        # Read first: if the choice changes meanwhile, the mark is old and the batch is rendered again.
        now = self.choice.round
        groups: dict[tuple[str, int], list[int]] = {}
        for i, (task, example) in enumerate(zip(tasks, examples, strict=True)):
            groups.setdefault((task, self.choice.prompt_for(task, example, self.sample)), []).append(i)
        rows: list[tuple[list[int], list[int]]] = [([], [])] * len(examples)
        limit = sys.maxsize if self.max_target is None else self.max_target
        for (task, prompt), members in groups.items():
            text, some = self.choice.pools[task].prompts[prompt], [examples[i] for i in members]
            builder = CellBuilder(self.renderers[task], [text], some, self.max_source, limit, warn=False)
            for i, (context, response) in zip(members, builder.cells(), strict=True):
                rows[i] = (context.tolist(), response.tolist())
            self._say(builder.stats)
        batch = padded_rows(rows, self.pad)
        if self.packed:
            batch[PACKED] = TrieBatch.pack(*zip(*rows, strict=True))
        if self.carry:
            counts = {key: sum(len(rows[i][1]) for i in members) for key, members in groups.items()}
            batch[CARRIED] = Carried(examples, tasks, now, counts)
        return batch

    def newest(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`batch`, rendered again if the choice has changed since."""
        carried: Carried = batch[CARRIED]
        if carried.round == self.choice.round:
            return batch
        where = batch["input_ids"].device
        fresh = self.render(carried.examples, carried.tasks)
        return {**batch, **{name: value if name == CARRIED else value.to(where) for name, value in fresh.items()}}

    def _say(self, stats: dict[str, int]) -> None:
        """What was cut, once for each kind; in each worker, for it has its own memory."""
        for what, cut, option in (("responses", "targets", "train_max_target"), ("inputs", "inputs", "max_source")):
            if stats[f"truncated_{cut}"] and what not in self._said:
                self._said.add(what)
                limit = self.max_source if option == "max_source" else self.max_target
                logger.warning("%s are cut to %s=%d tokens and lose their end", what, option, limit)


def padding_token(tokenizer: Any) -> int:
    """The id that rows are padded with; it is masked, so any will do where there is none."""
    return next(one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None)
