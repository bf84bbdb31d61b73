"""How far scores of pretrained models are from those of other programs: a row a comparison.

    python -m benchmarks.exactness --model smollm2 gemma3-270m --csv benchmarks/results/exactness.csv

Bundled tasks, three prompts with three examples each in float32. ``alone`` is the plain model on each sequence,
``padded`` the plain loop in batches of 8, ``trainer`` `Trainer.evaluate` for each prompt, ``lm-eval``
lm-evaluation-harness on the same strings (where it is installed). A difference is the largest over cells, in nats per
response token; of ``trainer`` over prompts. The file is written again after every model.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

import sapo_kernels as sk
from sapo_kernels.files import atomic_write
from sapo_kernels.scoring.render import Renderer
from sapo_peft.assets import BUNDLED_DIR
from sapo_peft.plain_loop import plain_scores
from sapo_peft.sequence import read_tasks

from .ops.end_to_end import alone
from .peers.loops import trainer_loop
from .rows import csv_text
from .workload import load_pretrained

TASKS = ("task04_active_to_passive", "task01_product_note_polarity")
PROMPTS, EXAMPLES = 3, 3


@dataclass(frozen=True)
class Difference:
    """One comparison: `largest` nats per response token."""

    model: str
    layout: str
    against: str
    path: str
    cells: int
    largest: float


def plain_layout(tokenizer):
    """The layout of a model without a chat template, as a template that gives context and response."""
    renderer = Renderer(tokenizer)
    renderer.chat = False

    def template(prompt: str, example) -> tuple[str, str]:
        made = renderer.render(prompt, example)
        return made.context, made.response

    return template


def harness(model, tokenizer, texts: list[tuple[str, str]]) -> torch.Tensor:
    """[len(texts)] nats, by lm-evaluation-harness from strings."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    made = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2)
    requests = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]
    return -torch.tensor([logprob for logprob, _ in made.loglikelihood(requests, disable_tqdm=True)])


def compared(name: str) -> list[Difference]:
    """Every comparison of one model, in every layout that it has."""
    model, tokenizer = load_pretrained(name)
    found = []
    for layout in ("chat", "plain") if tokenizer.chat_template else ("plain",):
        template = None if layout == "chat" else plain_layout(tokenizer)
        for task in read_tasks(BUNDLED_DIR, TASKS):
            prompts, rows = list(task.pool.prompts[:PROMPTS]), list(task.train[:EXAMPLES])
            cache = sk.ResponseCache.build(tokenizer, prompts, rows, template)
            ours = sk.score_prompts(model, cache, progress=False)
            others = {"alone": alone(model, cache).view_as(ours.nll), "padded": plain_scores(model, cache)}
            if layout == "plain" and importlib.util.find_spec("lm_eval"):
                texts = [template(prompt, row) for prompt in prompts for row in rows]
                others["lm-eval"] = harness(model, tokenizer, texts).view_as(ours.nll)
            far = {other: float(((nll - ours.nll).abs() / ours.tokens).max()) for other, nll in others.items()}
            far["trainer"] = float((trainer_loop(model, cache) - ours.reduce("batch")).abs().max())
            found += [
                Difference(name, layout, other, ours.stats["path"], ours.nll.numel(), value)
                for other, value in far.items()
            ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["smollm2"])
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Difference] = []
    for name in args.model:
        rows += compared(name)
        for row in rows[-8:]:
            print(f"{row.model:12s} {row.layout:6s} {row.against:8s} {row.path} {row.cells} cells: {row.largest:.1e}")
        if args.csv:
            atomic_write(args.csv, csv_text(rows))


if __name__ == "__main__":
    main()
