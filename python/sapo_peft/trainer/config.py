"""SapoConfig: when to score again, and what to do with the result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from sapo_kernels.scoring.race import Race
from sapo_kernels.scoring.render import Template
from sapo_kernels.scoring.turns import check_role

MODES = ("hard", "soft")
AUTO, TRIE, PADDED = PACKINGS = ("auto", "trie", "padded")


@dataclass(frozen=True)
class SapoConfig:
    """How SAPO runs inside a trainer; everything has a default.

    Attributes:
        mode: "hard" trains each task on the prompt with the lowest loss (the paper); "soft" draws a prompt for every
            example by the state's probabilities.
        temperature: nats per token, for "soft": ``probs = softmax(-loss / temperature)`` mixed with `floor`.
        floor: share of probability that is spread evenly, 0 to 1.
        decay: what earlier scorings count when scored again, 0 (the newest only) to 1.
        at_start: score before the first step.
        every_steps: score again after that many optimizer steps; None: not by steps.
        each_epoch: score again at the start of every later epoch.
        drift: score again when the training loss has left the course it took after the last scoring by so many
            standard errors (4: about one false alarm in 100 runs of 300 logged losses); None: never.
        drift_cooldown: logged losses in each of the two means that are compared, see `drift.Drift`: at the earliest
            the losses of twice as many ``logging_steps`` after a scoring lead to the next.
        probe_examples: training examples of each task to score on when no probe is given.
        max_source: longest context in tokens; a longer one loses the end of its input. For scoring and training.
        max_target: response tokens of an example that are scored, the first ones (128: the paper).
        train_max_target: response tokens that are trained on; None: all, with the end of the turn. TRL's ``max_length``
            does not apply.
        max_tokens: new tokens per forward when scoring, see `score_prompts`.
        packing: "trie" computes the tokens that the rows of a batch share once, without padding, in training and in
            evaluation of the loss: the same loss and gradients, usually in less than half of the time. "auto" does so
            where loss and gradients of the first batch are those of its padded rows, else it pads and says why.
            "padded" never does. LoRA dropout draws one mask for a token that rows share.
        train_max_tokens: trie tokens per forward when training; a batch with more goes in several, whose gradients are
            added up; None: one forward a batch, which never computes more tokens than the padded one.
        template: layout of a cell, see `sapo_kernels.scoring.render.Renderer`.
        instruction_role: "user": in the last user turn, the paper's; "system": in the system turn, behind a text
            that an example has there.
        now: what chat templates that show a date are shown, in scoring and training; None: when the process began (that
            of rank 0). A run that is resumed keeps the one it began with.
        seed: of the draws in mode "soft".
        race: a `sapo_kernels.Race`: score in rounds, and only what is needed to find the best prompt; None: every cell.
            In mode "hard" with decay 0. What is chosen is the race's winner. The loss of a prompt that was dropped
            early is an estimate from the examples that it shares with the winner, and so are the losses that are logged
            and written beside the adapter. Each scoring takes the examples in an order of its own.

    Raises:
        ValueError: naming the option, what was expected and what was got.
    """

    mode: str = "hard"
    temperature: float = 0.05
    floor: float = 0.0
    decay: float = 0.0
    at_start: bool = True
    every_steps: int | None = None
    each_epoch: bool = False
    drift: float | None = None
    drift_cooldown: int = 5
    probe_examples: int = 64
    max_source: int = 1536
    max_target: int = 128
    train_max_target: int | None = None
    max_tokens: int | None = None
    packing: str = "auto"
    train_max_tokens: int | None = None
    template: Template = None
    instruction_role: str = "user"
    now: datetime | None = None
    seed: int = 0
    race: Race | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {self.mode!r}")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing: expected one of {PACKINGS}, got {self.packing!r}")
        for name in ("floor", "decay"):
            _check_number(name, getattr(self, name), 1.0)
        _check_number("temperature", self.temperature, math.inf)
        if self.drift is not None:
            _check_number("drift", self.drift, math.inf)
        for name in ("at_start", "each_epoch"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        check_role(self.instruction_role)
        if not isinstance(self.now, (datetime, type(None))):
            raise ValueError(f"now: expected a datetime or None, got {self.now!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed: expected a whole number, got {self.seed!r}")
        for name in ("drift_cooldown", "probe_examples", "max_source", "max_target"):
            _check_count(name, getattr(self, name))
        for name in ("every_steps", "max_tokens", "train_max_target", "train_max_tokens"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if self.race is not None:
            self._check_race()

    def _check_race(self) -> None:
        if not isinstance(self.race, Race):
            raise ValueError(f"race: expected a sapo_kernels.Race or None, got {self.race!r}")
        if self.mode != "hard":
            raise ValueError(
                f"race: expected mode 'hard', got {self.mode!r}: draws go by the loss of every prompt, and a race "
                "measures no more than which is the lowest"
            )
        if self.decay:
            raise ValueError(
                f"race: expected decay 0, got {self.decay!r}: earlier losses in the mean could overturn its winner"
            )

    @property
    def scores(self) -> bool:
        """Whether anything is ever scored."""
        return self.at_start or self.each_epoch or self.every_steps is not None or self.drift is not None


def _check_number(name: str, value, most: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0.0 <= value <= most and math.isfinite(value)):
        raise ValueError(f"{name}: expected a number from 0 to {most:g}, got {value!r}")


def _check_count(name: str, value) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
