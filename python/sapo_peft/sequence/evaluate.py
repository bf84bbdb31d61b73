"""Answers by batched greedy generation, and the loss of the targets: one row of the matrix of a sequence."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import sapo_kernels as sk
from sapo_kernels.scoring.render import Renderer, special_tokens

from .config import SequenceConfig
from .metrics import exact_match, rouge_l
from .tasks import SequenceTask

logger = logging.getLogger("sapo_peft")

# Stands for an answer where only what follows one is of interest; no template has it in its own text.
_ANSWER = "zqxjk"


@dataclass
class Row:
    """Scores after one task: by metric a value a task, None where it was not asked for; how many examples each.

    notes: sentences about what was cut to the limits of length.
    """

    row: dict[str, list[float | None]]
    examples: list[int]
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


class Evaluator:
    """Evaluates a model on the test examples of all tasks; text is rendered and tokenised once per task and prompt."""

    def __init__(self, tasks: Sequence[SequenceTask], tokenizer: Any, config: SequenceConfig):
        self.tasks, self.tokenizer, self.config = tasks, tokenizer, config
        self._caches: dict[tuple[int, int], sk.ResponseCache] = {}
        self._closings: dict[int, tuple[list[int], str]] = {}

    def cache(self, task: int, prompt: int) -> sk.ResponseCache:
        """The test examples of a task under one of its prompts (both counted from 0)."""
        if (task, prompt) not in self._caches:
            pool, config = self.tasks[task].pool, self.config
            # A task has one prompt at a time; that before the choice is not needed again.
            self._caches = {key: cache for key, cache in self._caches.items() if key[0] != task}
            self._caches[task, prompt] = sk.ResponseCache.build(
                self.tokenizer, [pool.prompts[prompt]], self.tasks[task].test, suffix=pool.suffix,
                text_word=pool.text_word, max_source=config.max_source, max_target=config.max_target,
            )  # fmt: skip
        return self._caches[task, prompt]

    def row(self, model: Any, prompts: Mapping[int, int], tick: Callable[[int], None] | None = None) -> Row:
        """Evaluate the tasks in `prompts` (task -> prompt, from 0); `tick` hears how many examples were done.

        The model is put into eval mode and stays there.
        """
        started = time.perf_counter()
        model.eval()
        names = ["rougeL", "exact_match"] if self.config.generate else []
        names += ["loss"] if self.config.eval_loss else []
        found = Row({name: [None] * len(self.tasks) for name in names}, [0] * len(self.tasks))
        for j in sorted(prompts):
            cache = self.cache(j, prompts[j])
            found.examples[j] = cache.num_examples
            for what, limit in (("inputs", "max_source"), ("targets", "max_target")):
                if cut := cache.stats[f"truncated_{what}"]:
                    found.notes.append(
                        f"task {self.tasks[j].name}: {cut} of {cache.num_examples} test {what} are cut to {limit}"
                    )
            if self.config.eval_loss:
                scores = sk.score_prompts(model, cache, progress=False)
                loss = float(scores.loss[0])
                found.row["loss"][j] = loss if math.isfinite(loss) else None
            if self.config.generate:
                answers = self.answers(model, j, prompts[j], tick)
                pairs = [(answer, row["target"]) for answer, row in zip(answers, self.tasks[j].test, strict=True)]
                for name, score in (("rougeL", rouge_l), ("exact_match", exact_match)):
                    found.row[name][j] = math.fsum(score(*pair) for pair in pairs) / len(pairs)
            elif tick is not None:
                tick(cache.num_examples)
        found.seconds = time.perf_counter() - started
        return found

    def answers(self, model: Any, task: int, prompt: int, tick: Callable[[int], None] | None = None) -> list[str]:
        """The answer to each test example of a task, decoded greedily."""
        cache = self.cache(task, prompt)
        stops, closing = self.closing(task)
        most = self.config.max_new_tokens or int(cache.response_lengths.max())
        contexts = cache.contexts[0]
        answers = [""] * len(contexts)
        for rows, ids in greedy(model, contexts, most, stops, self._pad(), self.config.eval_batch_size):
            for m, answer in zip(rows, ids, strict=True):
                # Spaces before punctuation are part of the targets, so they are of the answers.
                text = self.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                answers[m] = text.partition(closing)[0] if closing else text
            if tick is not None:
                tick(len(rows))
        return answers

    def closing(self, task: int) -> tuple[list[int], str]:
        """(ids that end an answer, text that ends one) for a task.

        What closes the assistant's turn is in the responses that the model is trained on; where it begins with a
        special token, that token ends an answer besides the end-of-sequence token. Other closings end it as text.
        """
        if task not in self._closings:
            tokenizer, pool = self.tokenizer, self.tasks[task].pool
            # Not a target of the task: one of few letters may stand in the closing itself.
            example = {"input": self.tasks[task].test[0]["input"], "target": _ANSWER}
            rendered = Renderer(tokenizer, None, pool.suffix, pool.text_word).render(pool.prompts[0], example)
            closing = rendered.response.rpartition(_ANSWER)[2].lstrip()
            first = max((one for one in special_tokens(tokenizer) if closing.startswith(one)), key=len, default=None)
            stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(first) if first else None} - {None}
            self._closings[task] = sorted(stops), "" if first else closing.strip()
        return self._closings[task]

    def _pad(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(one for one in known if one is not None)


def greedy(
    model: Any, contexts: Sequence[Sequence[int]], max_new_tokens: int, stops: Sequence[int], pad: int, batch_size: int
):
    """Greedy continuations, in batches of similar length: yields (indices into `contexts`, their answers' ids).

    Padding stands on the left under a mask, keys and values are cached, a batch ends when all its rows have. Answers
    end before the first of `stops`. What the model's own ``generation_config`` says (a repetition penalty, tokens that
    are suppressed) is set aside: each token is the most likely one.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    options = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad, use_cache=True,
        eos_token_id=list(stops) or None,
    )  # fmt: skip
    lengths = np.array([len(context) for context in contexts])
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size].tolist()
        width = max(len(contexts[m]) for m in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, m in enumerate(rows):
            ids[i, width - len(contexts[m]) :] = torch.tensor(contexts[m])
            mask[i, width - len(contexts[m]) :] = 1
        with torch.no_grad(), _plain_generation(model):
            made = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=options)
        yield rows, [_until(answer, stops) for answer in made[:, width:].tolist()]


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """`generate` fills in from the model's ``generation_config`` whatever it is not told: meanwhile that is empty."""
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = kept


def _until(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
