"""`sapo doctor`: what is installed and in use here, and whether it works end to end, with times."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

from ..terminal import plain
from .faults import describe

TOLERANCE = 1e-4


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the options of `sapo doctor`."""
    return subparsers.add_parser(
        "doctor", help="check the environment, end to end on a tiny model", description=__doc__, allow_abbrev=False
    )


def run(args: argparse.Namespace) -> int:
    """Print the environment and one line for each check; 1 if one of them failed."""
    from sapo_kernels.__main__ import report

    print(report())
    print("\nchecks")
    failed = 0
    for name, check in CHECKS:
        started = time.perf_counter()
        try:
            # The trainer prints what it logs; here only the outcome is of interest.
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said, mark = check(), "ok"
        except Exception as error:  # whatever it is, the other checks are still expected
            known = isinstance(error, ModuleNotFoundError)
            said, mark = describe(error) if known else f"{type(error).__name__}: {error}", "FAILED"
            failed += 1
        print(plain(f"  {mark:<7}{name:<22}{time.perf_counter() - started:6.2f} s  {said}"))
    return 1 if failed else 0


def _operators() -> str:
    """The operators that are in use against the plain ones."""
    import torch

    import sapo_kernels as sk
    from sapo_kernels.reweight.torch import reweight_torch

    generator = torch.Generator().manual_seed(0)
    states = [sk.PromptState(4, 33), sk.PromptState(4, 33)]
    for _ in range(3):
        tokens = torch.randint(0, 9, (4, 33), generator=generator)
        nll = torch.rand(4, 33, dtype=torch.float64, generator=generator) * tokens
        sk.reweight_(states[0], nll, tokens, 0.9, 0.1, 0.05)
        other = states[1]
        reweight_torch(other.mean, other.weight, other.probs, other.best, other.effective, other.live, nll, tokens,
                       0.9, 0.1, 0.05)  # fmt: skip
    ours, plainly = (state.state_dict() for state in states)
    for name, value in ours.items():
        if not torch.allclose(value, plainly[name], rtol=1e-12, atol=0, equal_nan=True):
            raise RuntimeError(f"reweight_: {name}: expected the numbers of plain torch, got others; build again")
    return "reweight_ has the numbers of plain torch"


def _planner() -> str:
    import numpy as np

    import sapo_kernels as sk
    from sapo_kernels.trie.numpy_planner import plan_numpy

    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 30, 200)
    job = [draw.integers(0, 4, lengths.sum()), np.concatenate([[0], np.cumsum(lengths)]), draw.integers(1, lengths)]
    trie, expected = sk.plan_trie(*job), plan_numpy(*job)
    if any(not np.array_equal(getattr(trie, name), value) for name, value in expected.items()):
        raise RuntimeError("plan_trie: expected the plan of numpy, got another; build again")
    return f"{trie.dense_tokens} tokens in {len(trie)} nodes, as numpy plans them"


def _tiny_job():
    """(model, tokenizer, prompts, examples) of a bundled task."""
    from ..assets import BUNDLED_DIR, task_names
    from ..data.examples import read_examples
    from ..data.prompt_pool import PromptPool
    from ..tiny_random import tiny_model, tiny_tokenizer

    task = task_names()[0]
    examples = read_examples(BUNDLED_DIR, task=task, limit=8)
    return tiny_model(), tiny_tokenizer(), PromptPool.read(BUNDLED_DIR, task), examples


def _scoring() -> str:
    import sapo_kernels as sk

    from ..plain_loop import plain_scores

    model, tokenizer, prompts, examples = _tiny_job()
    cache = sk.ResponseCache.build(tokenizer, prompts.prompts[:4], examples[:4], suffix=prompts.suffix)
    started = time.perf_counter()
    scores = sk.score_prompts(model, cache, progress=False)
    seconds = time.perf_counter() - started
    difference = float(((scores.nll - plain_scores(model, cache)) / scores.tokens).abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"score_prompts: expected at most {TOLERANCE} nats/token off the plain loop, got {difference:.1e}"
        )
    return f"4 prompts x 4 examples in {seconds:.2f} s, {difference:.0e} nats/token off the plain loop"


def _training() -> str:
    """Two steps of LoRA with one scoring."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from ..data.prompt_pool import PromptPool
    from ..trainer.attach import attach_sapo
    from ..trainer.config import SapoConfig

    model, tokenizer, prompts, examples = _tiny_job()
    pool = PromptPool.build(prompts.task, prompts.prompts[0], prompts.prompts[1:4], suffix=prompts.suffix)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        trainer = Trainer(lora, arguments, train_dataset=list(examples), processing_class=tokenizer)
        callback = attach_sapo(trainer, pool, config=SapoConfig(probe_examples=2))
        trainer.train()
        trainer.save_model(folder)
        if not os.path.exists(os.path.join(folder, "sapo_prompts.json")):
            raise RuntimeError("attach_sapo: expected sapo_prompts.json beside the adapter, got none")
    return f"2 steps of LoRA, scored once in {callback.score_seconds:.2f} s"


CHECKS: tuple[tuple[str, Callable[[], str]], ...] = (
    ("in-place operators", _operators),
    ("planner", _planner),
    ("scoring", _scoring),
    ("training", _training),
)
