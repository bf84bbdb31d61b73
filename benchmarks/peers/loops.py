"""Loops that other packages have: the published one on `Trainer.evaluate`, lm-evaluation-harness, TRL's fused head."""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile

import torch

from .plain import cells_of, longest_first, padded

logging.getLogger("lm_eval").setLevel(logging.ERROR)


def trainer_loop(model, cache, batch_size: int = 8) -> torch.Tensor:
    """[K] float64, each prompt's ``eval_loss``: what `PromptScores.reduce("batch", batch_size)` gives.

    Left padding shifts the position ids of a row by its padding, as in the published code; rotary models do not see it.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            prediction_loss_only=True,
            report_to=[],
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            remove_unused_columns=False,
            log_level="error",
        )
        trainer = Trainer(model=model, args=options, data_collator=_padded_left)
        trainer.remove_callback(PrinterCallback)
        losses = []
        for contexts, responses in zip(cache.contexts, cache.responses, strict=True):
            rows = [{"context": c, "response": r} for c, r in zip(contexts, responses, strict=True)]
            losses.append(trainer.evaluate(eval_dataset=rows)["eval_loss"])
    return torch.tensor(losses, dtype=torch.float64)


def _padded_left(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["context"]) + len(row["response"]) for row in rows)
    made = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        context, response = row["context"], row["response"]
        pad = width - len(context) - len(response)
        made["input_ids"].append([0] * pad + context + response)
        made["attention_mask"].append([0] * pad + [1] * (width - pad))
        made["labels"].append([-100] * (width - len(response)) + response)
    return {name: torch.tensor(values) for name, values in made.items()}


@functools.lru_cache(maxsize=2)
def _scorer(model, batch_size: int):
    """The harness around the model, built once, in the warm-up. Log-softmax in fp32: in bf16 it alone would be off by
    0.03 nats. The tokenizer is never asked to tokenise."""
    from lm_eval.models.huggingface import HFLM

    from sapo_peft.tiny_random import tiny_tokenizer

    options = {"backend": "causal", "batch_size": batch_size, "softmax_dtype": "float32"}
    return HFLM(pretrained=model, tokenizer=tiny_tokenizer(), **options)


def lm_eval_harness(model, cache, batch_size: int = 8) -> torch.Tensor:
    """``HFLM.loglikelihood`` without its tokenisation: sorted by length, right padding, full log-softmax.

    The ids are ours, so that every peer scores the same cells; what is left out (tokenising strings) only helps it.
    """
    requests = [(("", ""), context, response) for context, response in cells_of(cache)]
    found = _scorer(model, batch_size)._loglikelihood_tokens(requests, disable_tqdm=True)
    return torch.tensor([-logprob for logprob, _ in found], dtype=torch.float64)


@contextlib.contextmanager
def _patched(model):
    """The head added for the block; `model.forward` is the class's own again afterwards."""
    from trl.trainer.utils import add_fused_lm_head

    own = vars(model).get("forward")
    add_fused_lm_head(model)
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def trl_fused_head(model, cache, batch_size: int = 8) -> torch.Tensor:
    """``model(..., labels=labels, fused_lm_head=True).log_probs``; on a CPU it projects every row, not only labels."""

    def score(part):
        # One token more than is needed elsewhere: the head shifts the labels itself.
        ids, mask, rows = padded([(c, [*r, 0]) for c, r in part], "cpu")
        labels = torch.where(rows.roll(1, 1) & mask.bool(), ids, -100)
        labels[:, 0] = -100
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        made = model(**{n: t.to(model.device) for n, t in given.items()}, fused_lm_head=True)
        return -made.log_probs.double().sum(1).cpu()

    with _patched(model):
        return longest_first(cells_of(cache), batch_size, score)
