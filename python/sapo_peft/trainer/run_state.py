"""What a run was given, as fingerprints: ranks compare them, and a run that is resumed must have them again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from .collator import SapoCollator
from .config import SapoConfig
from .rescoring import Rescorer

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


def setup_of(trainer: Any, collator: SapoCollator, rescorer: Rescorer | None, config: SapoConfig) -> dict[str, Any]:
    """What a checkpoint keeps of what a run was given.

    "pools": by task, a fingerprint of its prompts, suffix and text word. "rendering": of how the first prompt and an
    example look to this tokenizer and template now. "probe": of every token that is scored. "options": the options
    themselves, by name; "training": those of the trainer that decide what is learnt; "adapters": by name, the
    configuration of each.
    """
    # A callable has no lasting name; "rendering" knows it by what it makes, and the moment too.
    options = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "now"}
    options = {name: None if callable(value) else value for name, value in options.items()}
    if config.race is not None:
        options["race"] = dict(vars(config.race))
    pools, parts = collator.choice.pools, []
    for task, renderer in collator.renderers.items():
        try:
            one = renderer.render(pools[task].prompts[0], {"input": "An input.\n{input}", "target": "A target."})
            parts += [one.context, one.response]
        except Exception as error:  # a callable of the user's, which may want examples of its kind
            parts.append(type(error).__name__)
    caches = rescorer.caches.values() if rescorer else ()
    return _plain({
        "pools": {task: hashed(pool.suffix, pool.text_word, *pool.prompts)[:16] for task, pool in pools.items()},
        "options": options,
        "training": {name: getattr(trainer.args, name, None) for name in LEARNING},
        "adapters": {
            name: {key: value for key, value in sorted(adapter.to_dict().items()) if key not in _OF_PLACE}
            for name, adapter in (getattr(trainer.model, "peft_config", None) or {}).items()
        },
        "rendering": hashed(*parts),
        "probe": hashed(*(array.tobytes() for c in caches for array in (c.ids, c.offsets, c.context_lengths))),
    })  # fmt: skip


def alike(tasks: Sequence[str], setup: Mapping[str, Any]) -> dict[str, Any]:
    """What the ranks of a run compare, by name."""
    found = {"pools": [tasks, setup["pools"]], "template": setup["rendering"]}
    return {**found, "probe": setup["probe"], "options": setup["options"]}


def check_setup(kept: Mapping[str, Any], tasks: Sequence[str], own: Mapping[str, Any]) -> None:
    """Compare the state of a checkpoint with what this run was given.

    Options that only say when and how to score may differ: a log line.

    Raises:
        ValueError: naming what the run was begun with and what it has now.
    """
    if kept.get("version") != STATE_VERSION:
        raise ValueError(
            f"checkpoint: sapo state: expected version {STATE_VERSION}, got {kept.get('version')!r}; "
            "resume with the sapo_peft that wrote it or start a new run"
        )
    begun, again = kept["setup"], "resume with the same or start a new run"
    if begun["pools"] != own["pools"]:
        other = sorted({*own["pools"].items()} ^ {*begun["pools"].items()})[0][0]
        raise ValueError(
            f"checkpoint: task {other!r}: expected the prompts that the run began with, got others; {again}"
        )
    if kept["tasks"] != tasks:
        raise ValueError(
            f"checkpoint: expected the tasks in the order that the run began with, {kept['tasks'][:20]}, got "
            f"{tasks[:20]}; {again}"
        )
    for name, what in (("rendering", "template and tokenizer"), ("probe", "probe")):
        if begun[name] != own[name]:
            raise ValueError(f"checkpoint: expected the {what} that the run began with, got another; {again}")
    changed = _differences("", begun["options"], own["options"])
    soft = "soft" in (begun["options"]["mode"], own["options"]["mode"])
    fixed = [one for one in changed if one[0] == "mode" or (soft and one[0] == "seed")]
    for name, adapter in begun.get("adapters", {}).items():
        now = own["adapters"].get(name)
        place = f"adapter {name!r}"
        fixed += [(place, "it", "none")] if now is None else _differences(f"{place}: ", adapter, now)
    for what, old, new in fixed:
        raise ValueError(f"checkpoint: {what}: expected {old!r} as before, got {new!r}; {again}")
    changed += _differences("the trainer's ", begun.get("training", {}), own["training"])
    if changed:
        said = ", ".join(f"{what} {old!r} -> {new!r}" for what, old, new in changed)
        logger.warning("resuming with options that have changed since the run began: %s", said[:500])


def _differences(place: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key behind `place`, value in `old`, value in `new`) of those in both that differ."""
    return [(f"{place}{key}", old[key], new[key]) for key in sorted({*old} & {*new}) if old[key] != new[key]]


def _plain(value: Any) -> Any:
    """The value as JSON has it: sets and tuples as lists, enumerations and types by name."""

    def other(value: Any) -> Any:
        return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))

    return json.loads(json.dumps(value, default=other))


def hashed(*parts: str | bytes) -> str:
    """SHA-256 of the parts, each with its length, as 64 hexadecimal digits."""
    made = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        made.update(len(data).to_bytes(8, "little") + data)
    return made.hexdigest()
