"""The state of a run as plain JSON values, and what must be the same for it to be taken up again."""

from __future__ import annotations

import enum
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

import torch

from sapo_kernels.scoring.render import reads_clock

from .choice import Choice
from .collator import SapoCollator
from .config import SapoConfig
from .records import numbers, unpacked
from .rescoring import Rescorer, Scoring

if TYPE_CHECKING:
    from .callback import SapoCallback

logger = logging.getLogger("sapo_peft")

STATE_VERSION = 2
# Arguments of a trainer that decide what is learnt.
LEARNING = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim", "optim_args",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "max_steps", "seed", "data_seed", "bf16", "fp16",
)  # fmt: skip
# Of an adapter's configuration, what says where it is and who wrote it.
_OF_PLACE = frozenset(("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"))


class Setup:
    """Fingerprints of what a run was given.

    pools: by task, of its prompts, suffix and text word. rendering: of how the first prompt and an example look to this
    tokenizer and template. probe: of every token that is scored. options: the options themselves, by name; training:
    those of the trainer that decide what is learnt; adapters: by name, the configuration of each. now: what templates
    that read the clock read in all of it.
    """

    def __init__(
        self, choice: Choice, collators: Sequence[SapoCollator], rescorer: Rescorer | None, config: SapoConfig,
        trainer: Any, now: datetime,
    ):  # fmt: skip
        self._choice, self._collators, self._rescorer = choice, collators, rescorer
        self.adapters = {
            name: {key: _plain(value) for key, value in sorted(adapter.to_dict().items()) if key not in _OF_PLACE}
            for name, adapter in (getattr(trainer.model, "peft_config", None) or {}).items()
        }
        self.training = {name: _plain(getattr(trainer.args, name, None)) for name in LEARNING}
        self.tasks = list(choice.tasks)
        self.pools = {task: digest(pool) for task, pool in choice.pools.items()}
        self._as_of(now)
        # A callable has no lasting name; `rendering` knows it by what it makes, and the moment too.
        values = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "now"}
        self.options = {name: None if callable(value) else value for name, value in values.items()}
        if config.race is not None:
            names = [field.name for field in fields(config.race) if field.name != "memory"]
            self.options["race"] = {name: getattr(config.race, name) for name in names}

    def show(self, now: datetime) -> None:
        """Render everything as of another moment: that of the run which is resumed."""
        if self._rescorer and now != self.now and reads_clock(self._rescorer.tokenizer):
            self._rescorer.render(now)
        self._as_of(now)

    def _as_of(self, now: datetime) -> None:
        self.now = now
        for renderer in (one for collator in self._collators for one in collator.renderers.values()):
            renderer.now = now
        example = {"input": "An input.\n{input}", "target": "A target."}
        parts: list[str] = []
        for task, renderer in self._collators[0].renderers.items():
            try:
                one = renderer.render(self._choice.pools[task].prompts[0], example)
                parts += [one.context, one.response]
            except Exception as error:  # a callable of the user's, which may want examples of its kind
                parts.append(type(error).__name__)
        self.rendering = hashed(*parts)
        caches = self._rescorer.caches.values() if self._rescorer else ()
        self.probe = hashed(*(array.tobytes() for c in caches for array in (c.ids, c.offsets, c.context_lengths)))

    def digests(self) -> dict[str, str]:
        """What the ranks of a run compare: 64 hexadecimal digits by name."""
        return {
            "pools": hashed(json.dumps([self.tasks, self.pools])),
            "template": self.rendering,
            "probe": self.probe,
            "options": hashed(json.dumps(self.options, sort_keys=True)),
        }

    def record(self) -> dict[str, Any]:
        names = ("pools", "rendering", "probe", "options", "training", "adapters")
        return {name: getattr(self, name) for name in names}

    def check(self, kept: Mapping[str, Any]) -> None:
        """Compare with the state of a checkpoint. Options that only say when and how to score may differ: a log line.

        Raises:
            ValueError: naming what the run was begun with and what it has now.
        """
        if kept.get("version") != STATE_VERSION:
            raise ValueError(
                f"checkpoint: sapo state: expected version {STATE_VERSION}, got {kept.get('version')!r}; "
                "resume with the sapo_peft that wrote it or start a new run"
            )
        begun = kept["setup"]
        again = "resume with the same or start a new run"
        if begun["pools"] != self.pools:
            other = sorted({*self.pools.items()} ^ {*begun["pools"].items()})[0][0]
            raise ValueError(
                f"checkpoint: task {other!r}: expected the prompts that the run began with, got others; {again}"
            )
        if kept["tasks"] != self.tasks:
            raise ValueError(
                f"checkpoint: expected the tasks in the order that the run began with, {kept['tasks'][:20]}, got "
                f"{self.tasks[:20]}; {again}"
            )
        for name, what in (("rendering", "template and tokenizer"), ("probe", "probe")):
            if begun[name] != getattr(self, name):
                raise ValueError(f"checkpoint: expected the {what} that the run began with, got another; {again}")
        for name, old in begun.get("adapters", {}).items():
            new = self.adapters.get(name, {})
            for key in sorted({*old, *new}):
                if old.get(key) != new.get(key):
                    raise ValueError(
                        f"checkpoint: adapter {name!r}: {key}: expected {old.get(key)!r} as before, got "
                        f"{new.get(key)!r}; {again}"
                    )
        old, new = dict(begun["options"]), dict(self.options)
        fixed = ("mode", "seed") if new["mode"] == "soft" or old["mode"] == "soft" else ("mode",)
        changed = [name for name in new if name in old and old[name] != new[name]]
        for name in fixed:
            if name in changed:
                raise ValueError(f"checkpoint: {name}: expected {old[name]!r} as before, got {new[name]!r}; {again}")
        for kept, values in ((old, begun.get("training", {})), (new, self.training)):
            kept |= {f"the trainer's {name}": value for name, value in values.items()}
        changed = [name for name in new if name in old and old[name] != new[name]]
        if changed:
            said = ", ".join(f"{name} {old[name]!r} -> {new[name]!r}" for name in changed)
            logger.warning("resuming with other options than the run began with: %s", said[:500])


def state_of(callback: SapoCallback) -> dict[str, Any]:
    """Everything that a resumed run needs to choose as this one would."""
    choice, drift, trained = callback.choice, callback.drift, callback.trained
    return {
        "version": STATE_VERSION,
        # The rows of everything below; the trainer sorts the keys of dictionaries.
        "tasks": list(choice.tasks),
        "setup": callback.setup.record(),
        "now": callback.setup.now.isoformat(),
        "state": {name: numbers(value) for name, value in choice.state.state_dict().items()},
        "chosen": choice.chosen.tolist(),
        "clock": choice.clock.tolist(),
        "scored_epoch": callback._scored_epoch,
        "due": callback._due,
        "switches": callback.switches,
        "drift": {name: list(getattr(drift, name)) for name in ("first", "newest", "squares")},
        "trained": numbers({**vars(trained), "loss": float(trained.loss)}),
        "history": list(callback._records),
    }


def restore(callback: SapoCallback, kept: Mapping[str, Any]) -> None:
    """Take over what `state_of` returned.

    Raises:
        ValueError: see `Setup.check`.
    """
    if "now" in kept:
        callback.setup.show(datetime.fromisoformat(kept["now"]))
    callback.setup.check(kept)
    choice = callback.choice
    choice.state.load_state_dict(_tensors(kept, choice))
    choice.chosen.copy_(torch.tensor(kept["chosen"]))
    choice.clock.copy_(torch.tensor(kept["clock"]))
    callback._scored_epoch, callback._due, callback.switches = kept["scored_epoch"], kept["due"], kept["switches"]
    for name, value in kept["drift"].items():
        setattr(callback.drift, name, list(value))
    for name, value in unpacked(kept["trained"]).items():
        setattr(callback.trained, name, value)
    callback._records = list(kept["history"])
    callback.history = [scoring_from(one) for one in callback._records]
    callback._scored_step = callback.history[-1].step if callback.history else None


def take_choice(callback: SapoCallback, kept: Mapping[str, Any]) -> Scoring | None:
    """Take over only what is chosen in `kept`, of the same run, and return the scoring that led to it."""
    choice = callback.choice
    choice.state.load_state_dict(_tensors(kept, choice))
    choice.take(kept["chosen"])
    return scoring_from(kept["history"][-1]) if kept["history"] else None


def scoring_record(scoring: Scoring) -> dict[str, Any]:
    record = asdict(scoring)
    if scoring.cells_saved is None:
        del record["cells_saved"]
    return numbers(record)


def scoring_from(record: Mapping[str, Any]) -> Scoring:
    return Scoring(**unpacked(record))


def _tensors(kept: Mapping[str, Any], choice: Choice) -> dict[str, torch.Tensor]:
    own = choice.state.state_dict()
    return {
        name: torch.tensor(unpacked(kept["state"][name]), dtype=own[name].dtype).view(own[name].shape) for name in own
    }


def _plain(value: Any) -> Any:
    """The value as JSON has it: sets and tuples as lists, enumerations and types by name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, enum.Enum):
        return value.value
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def digest(pool: Any) -> str:
    """Fingerprint of what a pool renders: prompts in order, suffix, the word in front of the input."""
    return hashed(pool.suffix, pool.text_word, *pool.prompts)[:16]


def hashed(*parts: str | bytes) -> str:
    """SHA-256 of the parts, each with its length, as 64 hexadecimal digits."""
    made = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        made.update(len(data).to_bytes(8, "little") + data)
    return made.hexdigest()
