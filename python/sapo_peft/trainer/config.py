"""SapoConfig: when to score again, and what to do with the result."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError, create_model

from sapo_kernels.scoring.race import Race
from sapo_kernels.scoring.render import Template

from ..data.schema import first_fault

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def check_fields(options: Any) -> None:
    """Check the fields of a dataclass by their types, as pydantic does in strict mode.

    Raises: ValueError naming the first field that does not fit, what was expected and what was got.
    """
    try:
        _model_of(type(options))(**vars(options))
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None


@functools.cache
def _model_of(kind: type) -> type[BaseModel]:
    hints = get_type_hints(kind, include_extras=True)
    config = ConfigDict(strict=True, allow_inf_nan=False)
    return create_model("Options", __config__=config, **{f.name: (hints[f.name], f.default) for f in fields(kind)})


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
            where loss and gradients of the first batch, and of longer ones, are those of its padded rows, with a
            ``compute_loss`` of the trainer's own as well; else it pads and says why. "padded" never does. LoRA dropout
            draws one mask for a token that rows share.
        train_max_tokens: trie tokens per forward when training; a batch with more goes in several, whose gradients are
            added up, unless the trainer or hooks do more in a step, which is said; None: one forward a batch, which
            never computes more tokens than the padded one.
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

    mode: Literal["hard", "soft"] = "hard"
    temperature: Amount = 0.05
    floor: Share = 0.0
    decay: Share = 0.0
    at_start: bool = True
    every_steps: Count | None = None
    each_epoch: bool = False
    drift: Amount | None = None
    drift_cooldown: Count = 5
    probe_examples: Count = 64
    max_source: Count = 1536
    max_target: Count = 128
    train_max_target: Count | None = None
    max_tokens: Count | None = None
    packing: Literal["auto", "trie", "padded"] = "auto"
    train_max_tokens: Count | None = None
    template: Template = None
    instruction_role: Literal["user", "system"] = "user"
    now: datetime | None = None
    seed: int = 0
    race: InstanceOf[Race] | None = None

    def __post_init__(self):
        check_fields(self)
        if self.race is not None and self.mode != "hard":
            raise ValueError(
                f"race: expected mode 'hard', got {self.mode!r}: draws need the loss of every prompt, and a race "
                "finds only the lowest"
            )
        if self.race is not None and self.decay:
            raise ValueError(
                f"race: expected decay 0, got {self.decay!r}: earlier losses in the mean could overturn its winner"
            )

    @property
    def scores(self) -> bool:
        """Whether anything is ever scored."""
        return self.at_start or self.each_epoch or self.every_steps is not None or self.drift is not None
