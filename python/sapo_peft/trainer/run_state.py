"""The state of a run as plain JSON values, and what must be the same for it to be taken up again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch

from sapo_kernels.files import read_text

from .checkpoints import MAX_STATE_BYTES
from .choice import Choice
from .collator import SapoCollator
from .config import SapoConfig
from .records import numbers, unpacked
from .rescoring import Rescorer, Scoring

if TYPE_CHECKING:
    from .callback import SapoCallback

logger = logging.getLogger("sapo_peft")

# The entry of the trainer's state. Not a callback's class name: the trainer would build such a callback anew.
STATE_KEY = "sapo"
STATE_VERSION = 2


class Setup:
    """Fingerprints of what a run was given.

    pools: by task, of its prompts, suffix and text word. rendering: of how the first prompt and an example look to this
    tokenizer and template. probe: of every token that is scored. options: the options themselves, by name.
    """

    def __init__(self, choice: Choice, collator: SapoCollator, rescorer: Rescorer | None, config: SapoConfig):
        self.tasks = list(choice.tasks)
        self.pools = {task: digest(pool) for task, pool in choice.pools.items()}
        example = {"input": "An input.\n{input}", "target": "A target."}
        parts: list[str] = []
        for task, renderer in collator.renderers.items():
            try:
                one = renderer.render(choice.pools[task].prompts[0], example)
                parts += [one.context, one.response]
            except Exception as error:  # a callable of the user's, which may want examples of its kind
                parts.append(type(error).__name__)
        self.rendering = hashed(*parts)
        caches = rescorer.caches.values() if rescorer else ()
        self.probe = hashed(*(array.tobytes() for c in caches for array in (c.ids, c.offsets, c.context_lengths)))
        # A callable has no lasting name; `rendering` knows it by what it makes.
        values = {field.name: getattr(config, field.name) for field in fields(config)}
        self.options = {name: None if callable(value) else value for name, value in values.items()}
        if config.race is not None:
            names = [field.name for field in fields(config.race) if field.name != "memory"]
            self.options["race"] = {name: getattr(config.race, name) for name in names}

    def digests(self) -> dict[str, str]:
        """What the ranks of a run compare: 64 hexadecimal digits by name."""
        return {
            "pools": hashed(json.dumps([self.tasks, self.pools])),
            "template": self.rendering,
            "probe": self.probe,
            "options": hashed(json.dumps(self.options, sort_keys=True)),
        }

    def record(self) -> dict[str, Any]:
        return {"pools": self.pools, "rendering": self.rendering, "probe": self.probe, "options": self.options}

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
        old, new = begun["options"], self.options
        fixed = ("mode", "seed") if new["mode"] == "soft" or old["mode"] == "soft" else ("mode",)
        changed = [name for name in new if name in old and old[name] != new[name]]
        for name in fixed:
            if name in changed:
                raise ValueError(f"checkpoint: {name}: expected {old[name]!r} as before, got {new[name]!r}; {again}")
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


def kept_in(checkpoint: str | os.PathLike) -> Mapping[str, Any] | None:
    """The state in a checkpoint that the trainer wrote; None if it was written without SAPO.

    Raises: `OSError`, `ValueError` if the file cannot be read.
    """
    # The trainer logs NaN as it comes, which the strict reader of this package refuses.
    state = json.loads(read_text(os.path.join(checkpoint, "trainer_state.json"), max_bytes=MAX_STATE_BYTES))
    found = state.get("stateful_callbacks", {}).get(STATE_KEY)
    return found if isinstance(found, dict) else None


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
