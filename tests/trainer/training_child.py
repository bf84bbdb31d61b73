"""A run that saves every few steps, for `test_training_resume`: started as a process, killed, and started again.

``python -m tests.trainer.training_child FOLDER MODE`` resumes from the newest whole checkpoint, if any, and writes
``result.json`` at its end: the adapter's digest, the choices, and the step it began at. ``steps.log`` has every step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sapo_kernels.files import write_json
from sapo_peft import SapoConfig, last_good_checkpoint
from tests.trainer.training_helpers import AtSteps, adapter_digest, choices, colours, curve, sapo_trainer

STEPS, SAVE = 24, 3


def config(mode: str) -> SapoConfig:
    return SapoConfig(
        mode=mode, temperature=0.5, floor=0.1, decay=0.3, every_steps=7, each_epoch=True, drift=0.3, drift_cooldown=1,
        probe_examples=3,
    )  # fmt: skip


def make(folder, mode: str, **options):
    return sapo_trainer(
        folder, config=config(mode), data=colours(18), max_steps=STEPS, save_strategy="steps", save_steps=SAVE,
        gradient_accumulation_steps=2, learning_rate=3e-2, save_total_limit=3, **options,
    )  # fmt: skip


def result(trainer, callback, began: int) -> dict:
    return {
        "adapter": adapter_digest(trainer.model),
        "choices": [[scoring.step, scoring.reason, scoring.losses, scoring.chosen] for scoring in callback.history],
        "switches": callback.switches,
        "curve": curve(trainer),
        "probs": callback.choice.state.probs.tolist(),
        "began": began,
    }


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    trainer, callback = make(folder, mode)
    newest = last_good_checkpoint(folder)
    with open(folder / "steps.log", "a") as log:
        log.write(f"begin {newest.split('-')[-1] if newest else 0}\n")
        log.flush()
        trainer.add_callback(AtSteps(lambda step: log.write(f"{step}\n") and log.flush()))
        trainer.train(resume_from_checkpoint=newest)
    assert choices(callback)
    write_json(folder / "result.json", result(trainer, callback, int(newest.split("-")[-1]) if newest else 0))


if __name__ == "__main__":
    main()
