"""Answers by batched greedy generation, and the loss of the targets: one row of the matrix of a sequence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import numpy as np
import torch

import sapo_kernels as sk
from sapo_kernels.scoring.model_support import (
    adapter_by_row,
    length_dependent,
    padding_matters,
    tree_refusal,
    unwrap,
)
from sapo_kernels.scoring.render import MARKER, Renderer, generation_ends, special_tokens

from ..trainer.collator import padding_token
from .config import SequenceConfig
from .metrics import SCORES, best
from .schema import Evaluation, KeptAnswer, finite
from .tasks import SequenceTask

# What is kept of the answers to a task, so that a reader sees a few before and after.
MAX_ANSWERS, MAX_TEXT = 5, 2000


class Evaluator:
    """Evaluates a model on the test examples of all tasks; text is rendered and tokenised once per task and prompt.

    model: as it is before the first task; its generation configuration says which tokens end an answer. now: what
    templates that show a date are shown.
    """

    def __init__(
        self, model: Any, tasks: Sequence[SequenceTask], tokenizer: Any, config: SequenceConfig,
        now: datetime | None = None,
    ):  # fmt: skip
        self.tasks, self.tokenizer, self.config, self.now = tasks, tokenizer, config, now
        self._ends = end_tokens(model, tokenizer)
        self._caches: dict[int, tuple[int, sk.ResponseCache]] = {}

    def cache(self, task: int, prompt: int) -> sk.ResponseCache:
        """The test examples of a task under one of its prompts (both counted from 0)."""
        # A task has one prompt at a time; that before the choice is not needed again.
        known, cache = self._caches.get(task, (None, None))
        if known != prompt:
            pool, config = self.tasks[task].pool, self.config
            cache = sk.ResponseCache.build(
                self.tokenizer, [pool.prompts[prompt]], self.tasks[task].test, suffix=pool.suffix,
                text_word=pool.text_word, max_source=config.max_source, max_target=config.max_target,
                instruction_role=config.instruction_role, now=self.now,
            )  # fmt: skip
            self._caches[task] = prompt, cache
        return cache

    def evaluate(self, model: Any, prompts: Mapping[int, int], tick: Callable[[int], None] | None = None) -> Evaluation:
        """Evaluate the tasks in `prompts` (task -> prompt, from 0); `tick` hears how many examples were done.

        The model is put into eval mode and stays there.
        """
        started = time.perf_counter()
        model.eval()
        config, count = self.config, len(self.tasks)
        names = [*(SCORES if config.generate else ()), *(["loss"] if config.eval_loss else [])]
        row: dict[str, list] = {name: [None] * count for name in names}
        examples, notes, kept = [0] * count, [], [[] for _ in self.tasks]
        for j in sorted(prompts):
            task, cache = self.tasks[j], self.cache(j, prompts[j])
            examples[j] = cache.num_examples
            for what, limit in (("inputs", "max_source"), ("targets", "max_target")):
                if cut := cache.stats[f"truncated_{what}"]:
                    notes.append(f"task {task.name}: {cut} of {cache.num_examples} test {what} are cut to {limit}")
            if config.eval_loss:
                row["loss"][j] = finite(float(sk.score_prompts(model, cache, progress=False).loss[0]))
            if config.generate:
                answers = self.answers(model, j, prompts[j], tick)
                for name, score in SCORES.items():
                    scores = [best(score, *pair) for pair in zip(answers, task.references, strict=True)]
                    row[name][j] = math.fsum(scores) / len(scores)
                for example, answer in zip(task.test[:MAX_ANSWERS], answers, strict=False):
                    texts = example["input"], example["target"], answer
                    # A model may say what no file may hold.
                    texts = (text[:MAX_TEXT].replace("\0", "\ufffd") for text in texts)
                    kept[j].append(KeptAnswer(**dict(zip(("input", "target", "answer"), texts, strict=True))))
            elif tick is not None:
                tick(cache.num_examples)
        return Evaluation(
            row=row, examples=examples, seconds=time.perf_counter() - started, notes=notes,
            answers=kept if config.generate else None,
        )  # fmt: skip

    def answers(self, model: Any, task: int, prompt: int, tick: Callable[[int], None] | None = None) -> list[str]:
        """The answer to each test example of a task, decoded greedily."""
        cache = self.cache(task, prompt)
        stops, closings = self.closing(task)
        most = self.config.max_new_tokens or int(cache.response_lengths.max())
        contexts = cache.contexts[0]
        answers = [""] * len(contexts)
        pad = padding_token(self.tokenizer)
        for rows, ids in greedy(model, contexts, most, stops, pad, self.config.eval_batch_size):
            for m, answer in zip(rows, ids, strict=True):
                answers[m] = answer_of(self.tokenizer, answer, closings)
            if tick is not None:
                tick(len(rows))
        return answers

    def closing(self, task: int) -> tuple[list[int], list[str]]:
        """`closing` of a task of the sequence."""
        pool, role = self.tasks[task].pool, self.config.instruction_role
        renderer = Renderer(self.tokenizer, None, pool.suffix, pool.text_word, instruction_role=role)
        return closing(renderer, pool.prompts[0], self.tasks[task].test[0], self._ends)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The end tokens of the tokenizer and of the model's generation configuration."""
    return {tokenizer.eos_token_id, *generation_ends(model)} - {None}


def closing(renderer: Renderer, prompt: str, example: Mapping[str, Any], ends: set[int]) -> tuple[list[int], list[str]]:
    """(ids that end an answer, texts that end one).

    What closes the assistant's turn is in the responses that the model is trained on; some templates only begin the
    next one. Where either begins with a special token, that token ends an answer besides `ends`; else its text does.
    """
    tokenizer = renderer.tokenizer
    # Not a target of the task: one of few letters may stand in the closing itself.
    rendered = renderer.render(prompt, {**example, "target": MARKER})
    stops, texts = set(ends), []
    # The end token that stands behind what does not close the turn is among the ends already.
    closed = rendered.response.rpartition(MARKER)[2].removesuffix(tokenizer.eos_token or "")
    for end in (closed.strip(), _next_turn(tokenizer)):
        first = [one for one in special_tokens(tokenizer) if end.startswith(one)]
        if first:
            stops.add(tokenizer.convert_tokens_to_ids(max(first, key=len)))
        elif end:
            texts.append(end)
    return sorted(stops), texts


def answer_of(tokenizer: Any, ids: Sequence[int], closings: Sequence[str]) -> str:
    """The text of an answer, up to the first of `closings`."""
    # Spaces before punctuation are part of the targets, so they are of the answers.
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return min((text.partition(end)[0] for end in closings), key=len, default=text)


def _next_turn(tokenizer: Any) -> str:
    """What the chat template puts between an answer and the next question, or nothing."""
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", MARKER), ("user", "zzz"))]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # no template, or one for a single turn
        return ""
    return text.rpartition(MARKER)[2].partition("zzz")[0].strip() if MARKER in text else ""


def greedy(
    model: Any, contexts: Sequence[Sequence[int]], max_new_tokens: int, stops: Sequence[int], pad: int, batch_size: int
):
    """Greedy continuations, in batches of similar length: yields (indices into `contexts`, their answers' ids).

    Padding stands on the left under a mask, keys and values are cached, a batch ends when all its rows have. A model
    that may see the padding (`padding_shows`) gets batches of one length, and its cache is used only if it gives a few
    tokens of two rows as the model without it does: so an answer does not depend on the batch. Answers end before the
    first of `stops`. What the model's own ``generation_config`` says (a repetition penalty, tokens that are suppressed)
    is set aside: each token is the most likely one.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device

    def continued(rows: Sequence[int], count: int, use_cache: bool) -> list[list[int]]:
        options = GenerationConfig(
            max_new_tokens=count, do_sample=False, num_beams=1, pad_token_id=pad, use_cache=use_cache,
            eos_token_id=list(stops) or None,
        )  # fmt: skip
        width = max(len(contexts[m]) for m in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, m in enumerate(rows):
            ids[i, width - len(contexts[m]) :] = torch.tensor(contexts[m])
            mask[i, width - len(contexts[m]) :] = 1
        with torch.no_grad(), _plain_generation(model):
            made = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=options)
        return [_until(answer, stops) for answer in made[:, width:].tolist()]

    lengths = np.array([len(context) for context in contexts])
    order, careful = np.argsort(-lengths, kind="stable"), padding_shows(model, lengths.max() + max_new_tokens)
    # Where one length ends and the next begins.
    parts = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1 if careful else [])
    batches = [part[i : i + batch_size].tolist() for part in parts for i in range(0, len(part), batch_size)]
    use_cache = True
    if careful:
        few, count = max(batches, key=len)[:2], min(max_new_tokens, 4)
        try:
            use_cache = continued(few, count, True) == continued(few, count, False)
        except Exception:  # of a cache that does not work; of anything else it is raised again below
            use_cache = False
    for rows in batches:
        yield rows, continued(rows, max_new_tokens, use_cache)


def padding_shows(model: Any, longest: int) -> bool:
    """Whether tokens of padding on the left could change an answer of up to `longest` tokens with its context.

    As for scoring: state from token to token, positions that are not given, rope by the longest row, keys by a top-k,
    adapters that count their row's tokens.
    """
    outer, inner = unwrap(model)
    reasons = (tree_refusal(inner), length_dependent(inner, int(longest)), adapter_by_row(outer))
    return any(reasons) or padding_matters(inner)


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
