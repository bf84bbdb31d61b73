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

from ..terminal import plain
from .faults import describe

HELP = "check the environment, end to end on a tiny model"
TOLERANCE = 1e-4


def options(add: Callable) -> None:
    """`sapo doctor` has none."""


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
    ("scoring", _scoring),
    ("training", _training),
)
