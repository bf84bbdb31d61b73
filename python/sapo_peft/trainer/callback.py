"""SapoCallback: scores when it is time, logs every switch, and keeps its state in the trainer's checkpoints."""

from __future__ import annotations

import logging
import math
import os
import time
import weakref
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from sapo_kernels.scoring.render import reads_clock

from . import ranks as _ranks
from .checkpoints import STATE_KEY, kept_in, seal
from .collator import CARRIED, SapoCollator
from .config import SapoConfig
from .drift import Drift, Trained
from .packing import Packing
from .records import excerpt_line, numbers, unpacked, write_beside_adapter
from .rescoring import Rescorer, Scoring
from .run_state import STATE_VERSION, check_setup, setup_of

logger = logging.getLogger("sapo_peft")
# Of a run's scorings the newest that a checkpoint keeps: each takes some 500 bytes and 50 for each prompt in every one.
HISTORY = 1000


class SapoCallback(TrainerCallback):
    """Re-scores the pools of a run; made by `attach_sapo`.

    Attributes:
        choice: the pools, their state and what is chosen now.
        history: the scorings of this run so far, the newest last; of a resumed run at least the newest 1,000.
        switches: how often a prompt took another's place in this run.
        scorings, score_seconds: of this call of ``train()``: scorings, and the time they took.
    """

    def __init__(
        self,
        trainer: Any,
        collator: SapoCollator,
        rescorer: Rescorer | None,
        config: SapoConfig,
        now: datetime,
    ):
        # The trainer holds its callbacks: so it is freed when its last user lets go of it, not by the cycle collector,
        # which would free the queues of persistent workers before the workers are told to end.
        self._trainer = weakref.ref(trainer)
        self.collator, self.choice, self.rescorer, self.config = collator, collator.choice, rescorer, config
        self.packing = Packing(config.packing, config.train_max_tokens)
        self._render(now)
        self._begin_anew()

    def _render(self, now: datetime) -> None:
        """Scoring, training and evaluation as of that moment; see `SapoConfig.now`."""
        self.now = now
        for renderer in self.collator.renderers.values():
            renderer.now = now
        if self.rescorer:
            self.rescorer.render(now)
        self.setup = setup_of(self.trainer, self.collator, self.rescorer, self.config)

    def _begin_anew(self) -> None:
        self.history: list[Scoring] = []
        self.packing.begin_anew()
        self.drift = Drift(self.config.drift, self.config.drift_cooldown)
        self.trained = Trained()
        self.switches = self.scorings = 0
        self.score_seconds, self._started = 0.0, time.perf_counter()
        self._overhead_logged = False
        self._due: str | None = None
        self._scored_epoch: int | None = None
        # The scoring behind the choice where that is not the newest: the best model is an earlier one.
        self._of_best: Scoring | None = None

    @property
    def trainer(self) -> Any:
        """The trainer that it was attached to; None once that is gone."""
        return self._trainer()

    # When to score. The trainer fetches a step's batches after on_step_end and on_epoch_begin, so that what is chosen
    # there is what the next step trains on.

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # A run is a new one unless it is resumed, also on a trainer that has run before.
        self._begin_anew()
        self.choice.reset()
        kept = state.stateful_callbacks.get(STATE_KEY)
        if state.global_step and isinstance(kept, dict):
            self.load_state(kept)
        elif self.config.at_start:
            self._score(model, "start")
        if state.global_step >= state.max_steps > 0:
            control.should_training_stop = True

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        epoch = int((state.epoch or 0.0) + 1e-6)
        self.choice.clock[1] = epoch
        # A step that closed the epoch may have been scored just now: the model is the same.
        scored = self._scored_epoch == epoch or (self.history and self.history[-1].step == state.global_step)
        if self.config.each_epoch and epoch > 0 and not scored:
            self._score(model, f"epoch {epoch}")
        self._scored_epoch = epoch

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.trained.steps += 1
        if state.global_step >= state.max_steps > 0:
            # Nothing will be trained on a new choice.
            return
        every = self.config.every_steps
        if every and state.global_step % every == 0:
            self._due = f"every {every} steps"
        if self._due:
            self._score(model, self._due)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # The trainer's own log of the training loss, which all ranks make; others may come from one rank alone.
        if not {"loss", "learning_rate"} <= set(logs or ()):
            return
        self.check_finite()
        if self.config.drift is not None:
            excess = self.trained.excess()
            if excess is not None and self.drift.seen(excess):
                self._due = f"drift of {self.drift.distance():+.1f} standard errors"

    def on_save(self, args, state, control, **kwargs):
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        # Each rank writes files of its own.
        _ranks.wait()
        if args.should_save and os.path.isdir(folder):
            seal(folder)

    def on_epoch_end(self, args, state, control, **kwargs):
        # Not in on_train_end: reporters are called before this callback, and some have closed their run by then.
        if control.should_training_stop:
            self._log_overhead()

    def on_train_end(self, args, state, control, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._take_best(state.best_model_checkpoint)
        self.keep()
        if not self._overhead_logged:  # an evaluation after the epoch's end stopped the run
            self._log_overhead()
        total, share = self._overhead()
        self._say(
            f"SAPO: {self.scorings} scorings took {self.score_seconds:.2f} s of {total:.2f} s ({share:.1%}); "
            f"{self.switches} switches in all{self.packing.saved()}"
        )

    def on_push_begin(self, args, state, control, **kwargs):
        # What is pushed while training is copied from a checkpoint, but for these.
        if state.is_world_process_zero:
            write_beside_adapter(args.output_dir, self.prompts())

    def _take_best(self, checkpoint: str) -> None:
        """The trainer has loaded the weights of an earlier step: they go with what was chosen then."""
        try:
            kept = kept_in(checkpoint)
            if kept is None:
                raise ValueError("it was written without SAPO")
        except (OSError, ValueError) as error:
            logger.warning("the best model is from %s, without its prompts; the last ones stay: %s", checkpoint, error)
            return
        switches = self.choice.load(kept, clock=False)
        self._of_best = Scoring.of_record(kept["history"][-1]) if kept["history"] else None
        for task, _, new in switches:
            prompt = excerpt_line(self.choice.pools[task].prompts[new])
            self._say(f"SAPO: the best model goes with prompt {new} of task {excerpt_line(task)}: {prompt}")

    # Scoring.

    def _score(self, model: Any, reason: str) -> None:
        self._due = None
        if self.rescorer is None:
            return
        scoring = self.rescorer.score(model, self.trainer.state.global_step, reason)
        self.history.append(scoring)
        self.switches += len(scoring.switches)
        self.scorings, self.score_seconds = self.scorings + 1, self.score_seconds + scoring.seconds
        self.drift.restart()
        self.trained = Trained()
        for task, old, new in scoring.switches:
            losses = scoring.losses[task]
            self._say(
                f"SAPO step {scoring.step} ({reason}): task {excerpt_line(task)} from prompt {old} ({losses[old]:.4f}) "
                f"to prompt {new} ({losses[new]:.4f} nats/token): {excerpt_line(self.choice.pools[task].prompts[new])}"
            )
        self._log(self.metrics(scoring))

    def newest(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch that is going to be trained on, under the choice in force now and without what it carries."""
        if CARRIED not in batch:
            got = sorted(map(str, batch))[:20]
            raise ValueError(f"trainer: expected batches of its data_collator, got one made without it: {got}")
        batch = self.collator.newest(batch)
        self.trained.batch(batch.pop(CARRIED).counts, self.history[-1].losses if self.history else {})
        return batch

    def check_finite(self) -> None:
        """Raise FloatingPointError if training has left a weight that is no number, on any rank."""
        name = _not_finite(self.trainer.model)
        if any(_ranks.gathered(name)):
            where = "on another rank" if name is None else f"{name}, the first one"
            raise FloatingPointError(
                f"step {self.trainer.state.global_step}: expected finite weights, got NaN or infinity ({where}): "
                "training has diverged, nothing is saved; a lower learning rate may help"
            )

    # Messages, logs and times.

    def metrics(self, scoring: Scoring) -> dict[str, float]:
        """What is logged after a scoring: means over tasks, in nats per token; the entropy in nats."""
        best = [scoring.losses[task][k] for task, k in scoring.chosen.items()]
        original = [losses[0] for losses in scoring.losses.values()]
        entropy = float(torch.special.entr(self.choice.state.probs).sum(1).mean())
        found = {
            "sapo/best_loss": math.fsum(best) / len(best),
            "sapo/original_loss": math.fsum(original) / len(original),
            "sapo/switches": float(self.switches),
            "sapo/entropy": max(0.0, entropy),
            "sapo/score_seconds": scoring.seconds,
        }
        if scoring.cells_saved is not None:
            found["sapo/cells_saved"] = scoring.cells_saved
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _log(self, metrics: dict[str, float]) -> None:
        # A log takes back the trainer's intention to log, and then the loss of this very step would be missing.
        intended = self.trainer.control.should_log
        # The base method: TRL's own would empty its running means.
        Trainer.log(self.trainer, metrics)
        self.trainer.control.should_log = intended

    def _say(self, line: str) -> None:
        if self.trainer.is_world_process_zero():
            _ranks.say(line)

    def _log_overhead(self) -> None:
        self._overhead_logged = True
        self._log({"sapo/score_seconds": self.score_seconds, "sapo/overhead_fraction": self._overhead()[1]})

    def _overhead(self) -> tuple[float, float]:
        """Seconds since the run began, and the share of them that scoring took."""
        total = time.perf_counter() - self._started
        return total, self.score_seconds / total if total > 0 else 0.0

    # State: plain JSON values in the trainer's own state, so that they are in every checkpoint that it writes. No
    # `ExportableState`: the trainer would make a new callback of it.

    def keep(self) -> None:
        """Put the state where the trainer's next checkpoint takes it from."""
        self.trainer.state.stateful_callbacks[STATE_KEY] = self.state()

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs to choose as this one would; plain JSON values."""
        return {
            "version": STATE_VERSION,
            # The rows of everything below; the trainer sorts the keys of dictionaries.
            "tasks": list(self.choice.tasks),
            "setup": self.setup,
            "now": self.now.isoformat(),
            **self.choice.record(),
            "scored_epoch": self._scored_epoch,
            "due": self._due,
            "switches": self.switches,
            "drift": {name: list(getattr(self.drift, name)) for name in ("first", "newest", "squares")},
            "trained": numbers(vars(self.trained)),
            "history": [scoring.record() for scoring in self.history[-HISTORY:]],
        }

    def load_state(self, kept: Mapping[str, Any]) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: the checkpoint was written with other pools, another probe or by another version.
        """
        now = datetime.fromisoformat(kept["now"]) if "now" in kept else self.now
        if now != self.now and reads_clock(self.collator.tokenizer):
            self._render(now)
        self.now = now
        check_setup(kept, self.choice.tasks, self.setup)
        self.choice.load(kept)
        self._scored_epoch, self._due, self.switches = kept["scored_epoch"], kept["due"], kept["switches"]
        vars(self.drift).update({name: list(values) for name, values in kept["drift"].items()})
        self.trained = Trained(**unpacked(kept["trained"]))
        self.history = [Scoring.of_record(one) for one in kept["history"]]

    def prompts(self) -> dict[str, Any]:
        """What whoever loads the adapter needs to know: the content of ``sapo_prompts.json``.

        For each task the prompt that is chosen, its loss and the original's, and how to render it.
        """
        choice, template, tasks = self.choice, self.config.template, {}
        last = self._of_best or (self.history[-1] if self.history else None)
        for p, (task, pool) in enumerate(choice.pools.items()):
            index = int(choice.chosen[p])
            losses = last.losses[task] if last else []
            tasks[task] = {
                "prompt": pool.prompts[index],
                "index": index,
                "original": pool.prompts[0],
                "suffix": pool.suffix,
                "text_word": pool.text_word,
                "instruction_role": self.config.instruction_role,
                "loss": numbers(losses[index]) if losses else None,
                "original_loss": numbers(losses[0]) if losses else None,
                "prompts": len(pool.prompts),
            }
            if template is not None:
                named = getattr(template, "__qualname__", type(template).__name__)
                tasks[task]["template"] = template if isinstance(template, str) else f"<{named}>"
            if choice.mode == "soft":
                tasks[task]["probs"] = choice.state.probs[p, : len(pool.prompts)].tolist()
        return {"version": 1, "mode": choice.mode, "step": last.step if last else None, "tasks": tasks}


@torch.no_grad()
def _not_finite(model: Any) -> str | None:
    """The first trained weight of which an entry is not finite."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # One look at the device for all of them. Sharded ones: this rank's part.
    parts = [p.to_local() if hasattr(p, "to_local") else p for _, p in named]
    found = [torch.isfinite(part.sum(dtype=torch.float32)) for part in parts]
    if not found or bool(torch.stack([one.to(found[0].device) for one in found]).all()):
        return None
    # A sum can also overflow.
    return next((name for (name, _), part in zip(named, parts, strict=True) if not part.isfinite().all()), None)
