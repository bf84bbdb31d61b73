"""The published loop: `Trainer.evaluate` once for each prompt, batches of 8 in order, padded on the left."""

from __future__ import annotations

import tempfile

import torch


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
