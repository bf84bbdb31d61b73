"""SapoCallback: scores when it is time, logs every switch, and keeps its state in the trainer's checkpoints."""

from __future__ import annotations

import hashlib
import logging
import math
import time
import weakref
from dataclasses import asdict
from typing import Any

import torch
from transformers import TrainerCallback

from .choice import Choice
from .config import SapoConfig
from .records import excerpt_line, numbers, prompt_record, unpacked
from .rescoring import Drift, Rescorer, Scoring

logger = logging.getLogger("sapo_peft")

# The entry of the trainer's state. Not a callback's class name: the trainer would build such a callback anew.
STATE_KEY = "sapo"
STATE_VERSION = 1
MOST_HISTORY = 1000


class SapoCallback(TrainerCallback):
    """Re-scores the pools of a run; made by `attach_sapo`.

    Attributes:
        choice: the pools, their state and what is chosen now.
        history: the scorings so far, the newest last (at most 1,000 are kept).
    """

    def __init__(self, trainer: Any, choice: Choice, rescorer: Rescorer | None, config: SapoConfig):
        # The trainer holds its callbacks; see `attach._wrap`.
        self._trainer = weakref.ref(trainer)
        self.choice, self.rescorer, self.config = choice, rescorer, config
        self.history: list[Scoring] = []
        self.drift = Drift(config.drift, config.drift_cooldown)
        self.switches = 0
        # Of this call of train().
        self.scorings, self.score_seconds, self._overhead_logged = 0, 0.0, False
        self._due: str | None = None
        self._started = time.perf_counter()
        self._scored_epoch: int | None = None
        self._scored_step: int | None = None

    @property
    def trainer(self) -> Any:
        return self._trainer()

    # When to score. The trainer fetches a step's batches after on_step_end and on_epoch_begin, so that what is chosen
    # there is what the next step trains on.

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._started, self.scorings, self.score_seconds = time.perf_counter(), 0, 0.0
        self._overhead_logged, self._scored_step = False, None
        kept = state.stateful_callbacks.get(STATE_KEY)
        if state.global_step and isinstance(kept, dict):
            self.load_state(kept)
        elif self.config.at_start:
            self._score(model, "start")
        if state.global_step >= state.max_steps > 0:
            control.should_training_stop = True
        self._keep()

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        epoch = int((state.epoch or 0.0) + 1e-6)
        self.choice.set_epoch(epoch)
        # A step that closed the epoch may have been scored just now: the model is the same.
        new = self._scored_epoch != epoch and self._scored_step != state.global_step
        if self.config.each_epoch and epoch > 0 and new:
            self._score(model, f"epoch {epoch}")
        self._scored_epoch = epoch
        self._keep()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        every = self.config.every_steps
        last = state.max_steps > 0 and state.global_step >= state.max_steps
        if last:
            # Nothing will be trained on a new choice.
            return
        if every and state.global_step % every == 0:
            self._due = f"every {every} steps"
        if self._due:
            self._score(model, self._due)
            self._keep()

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if isinstance(loss, (int, float)) and self.drift.seen(float(loss)):
            self._due = f"drift of {self.drift.distance():+.1f} standard errors"
        self._keep()

    def on_epoch_end(self, args, state, control, **kwargs):
        # Not in on_train_end: reporters are called before this callback, and some have closed their run by then.
        if control.should_training_stop:
            self._log_overhead()

    def on_train_end(self, args, state, control, **kwargs):
        if not self._overhead_logged:  # an evaluation after the epoch's end stopped the run
            self._log_overhead()
        total, share = self._overhead()
        if state.is_world_process_zero:
            print(
                f"SAPO: {self.scorings} scorings took {self.score_seconds:.2f} s of {total:.2f} s ({share:.1%}); "
                f"{self.switches} switches in all"
            )

    def _overhead(self) -> tuple[float, float]:
        """Seconds since the run began, and the share of them that scoring took."""
        total = time.perf_counter() - self._started
        return total, self.score_seconds / total if total > 0 else 0.0

    def _log_overhead(self) -> None:
        self._overhead_logged = True
        self._log({"sapo/score_seconds": self.score_seconds, "sapo/overhead_fraction": self._overhead()[1]})

    def _score(self, model: Any, reason: str) -> None:
        self._due = None
        if self.rescorer is None:
            return
        scoring = self.rescorer.score(model, self.trainer.state.global_step, reason, self._agree)
        self.history = [*self.history, scoring][-MOST_HISTORY:]
        self.switches += len(scoring.switches)
        self.scorings, self.score_seconds = self.scorings + 1, self.score_seconds + scoring.seconds
        self._scored_step = scoring.step
        self.drift.restart(*scoring.predicted)
        for task, old, new in scoring.switches:
            losses = scoring.losses[task]
            logger.info(
                "SAPO step %d (%s): task %s from prompt %d (%.4f) to prompt %d (%.4f nats/token): %s",
                scoring.step, reason, excerpt_line(task), old, losses[old], new, losses[new],
                excerpt_line(self.choice.pools[task].prompts[new]),
            )  # fmt: skip
        self._log(self.metrics(scoring))

    def _agree(self, sums: torch.Tensor) -> torch.Tensor:
        """Rank 0's sums on every rank: rounding may differ between devices, the choice must not."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return sums
        on_device = sums.to(self.trainer.args.device)
        torch.distributed.broadcast(on_device, 0)
        return on_device.to(sums.device)

    def metrics(self, scoring: Scoring) -> dict[str, float]:
        """What is logged after a scoring: means over tasks, in nats per token; the entropy in nats."""
        best = [scoring.losses[task][k] for task, k in scoring.chosen.items()]
        original = [losses[0] for losses in scoring.losses.values()]
        probs = self.choice.state.probs
        entropy = -(probs * probs.clamp(min=1e-300).log()).sum(1).mean()
        found = {
            "sapo/best_loss": math.fsum(best) / len(best),
            "sapo/original_loss": math.fsum(original) / len(original),
            "sapo/switches": float(self.switches),
            "sapo/entropy": max(0.0, float(entropy)),
            "sapo/score_seconds": scoring.seconds,
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _log(self, metrics: dict[str, float]) -> None:
        from transformers import Trainer

        # A log takes back the trainer's intention to log, and then the loss of this very step would be missing.
        intended = self.trainer.control.should_log
        # The base method: TRL's own would empty its running means.
        Trainer.log(self.trainer, metrics)
        self.trainer.control.should_log = intended

    # State: plain JSON values in the trainer's own state, so that they are in every checkpoint that it writes.

    def _keep(self) -> None:
        self.trainer.state.stateful_callbacks[STATE_KEY] = self.state()

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs to choose as this one would."""
        tensors = {name: numbers(value) for name, value in self.choice.state.state_dict().items()}
        return {
            "version": STATE_VERSION,
            # The rows of everything below; the trainer sorts the keys of dictionaries.
            "tasks": list(self.choice.tasks),
            "pools": {task: digest(pool) for task, pool in self.choice.pools.items()},
            "state": tensors,
            "chosen": self.choice.chosen.tolist(),
            "clock": self.choice.clock.tolist(),
            "scored_epoch": self._scored_epoch,
            "due": self._due,
            "switches": self.switches,
            "drift": {"predicted": numbers(self.drift.predicted), "error": numbers(self.drift.error),
                      "losses": self.drift.losses},
            "history": [numbers(asdict(scoring)) for scoring in self.history],
        }  # fmt: skip

    def load_state(self, kept: dict[str, Any]) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: the checkpoint was written with other pools or by another version.
        """
        if kept.get("version") != STATE_VERSION:
            raise ValueError(f"checkpoint: sapo state: wanted version {STATE_VERSION}, got {kept.get('version')!r}")
        pools = {task: digest(pool) for task, pool in self.choice.pools.items()}
        if kept["pools"] != pools:
            other = sorted({*pools.items()} ^ {*kept["pools"].items()})[0][0]
            raise ValueError(
                f"checkpoint: task {other!r}: wanted the prompts that the run began with, got others; resume with the "
                "same pools or start a new run"
            )
        if kept["tasks"] != self.choice.tasks:
            raise ValueError(
                f"checkpoint: wanted the tasks in the order that the run began with, {kept['tasks'][:20]}, got "
                f"{self.choice.tasks[:20]}"
            )
        own = self.choice.state.state_dict()
        self.choice.state.load_state_dict(
            {
                name: torch.tensor(unpacked(kept["state"][name]), dtype=own[name].dtype).view(own[name].shape)
                for name in own
            }
        )
        self.choice.chosen.copy_(torch.tensor(kept["chosen"]))
        self.choice.clock.copy_(torch.tensor(kept["clock"]))
        self._scored_epoch, self._due, self.switches = kept["scored_epoch"], kept["due"], kept["switches"]
        drift = unpacked(kept["drift"])
        self.drift.predicted, self.drift.error, self.drift.losses = drift["predicted"], drift["error"], drift["losses"]
        self.history = [Scoring(**unpacked(one)) for one in kept["history"]]
        self._scored_step = self.history[-1].step if self.history else None

    def prompts(self) -> dict[str, Any]:
        """What whoever loads the adapter needs to know: the content of ``sapo_prompts.json``."""
        last = self.history[-1] if self.history else None
        return prompt_record(self.choice, last)


def digest(pool: Any) -> str:
    """Fingerprint of what a pool renders: prompts in order, suffix, the word in front of the input."""
    text = "\0".join((pool.suffix, pool.text_word, *pool.prompts))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
