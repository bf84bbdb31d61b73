"""One number that changes with everything that decides how a model may be scored, its weights' values apart."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import Any

import torch
from torch import nn

# Entries of a module's own dictionary that are covered elsewhere or decide nothing.
_STRUCTURE = frozenset(vars(nn.Module())) | {"forward"}
# How deep and how much of a container is looked at.
_LEVELS, _ITEMS = 4, 256
_SIMPLE = frozenset((bool, int, float, str, type(None)))


def configurations(model: nn.Module) -> list:
    """Every transformers configuration that a module holds, and those inside them, once each."""
    found: dict[int, Any] = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "_attn_implementation_internal") and id(config) not in found:
            found[id(config)] = config
            # A switch of the attention reaches parts of a configuration that no module holds.
            waiting.extend(getattr(config, name, None) for name in config.sub_configs)
    return list(found.values())


def fingerprint(model: nn.Module, device: torch.device, configs: list, impl: str) -> int:
    """A number that changes when a model is used or changed in another way than training does.

    Of every module its class, hooks, own forward and, unless it is torch's own, its attributes (functions by their
    identity); class, dtype and device of every parameter and whether it is trained; configuration values and attention
    implementations; adapters and which are active; autocast; precision of products.
    """
    parts: list[Any] = [impl, str(device), torch.get_float32_matmul_precision(), autocast_of(device)]
    for config in configs:
        parts += [type(config), config._attn_implementation_internal, _plain(vars(config))]
    for module in model.modules():
        values = module.__dict__
        parts += (type(module), *values["_forward_hooks"], -1, *values["_forward_pre_hooks"], id(values.get("forward")))
        parts += (-1, *values["_backward_hooks"], -1, *(values["_backward_pre_hooks"] or ()))
        for value in values["_parameters"].values():
            if value is not None:
                parts += (type(value), value.dtype, value.device, value.requires_grad)
        if not type(module).__module__.startswith("torch.nn.modules."):
            parts += [_plain(value) for name, value in values.items() if name not in _STRUCTURE]
    return hash(tuple(parts))


def _kind(value: torch.Tensor) -> tuple:
    return type(value), value.dtype, value.device, value.shape


def autocast_of(device: torch.device) -> tuple:
    on = torch.is_autocast_enabled(device.type)
    return on, torch.get_autocast_dtype(device.type) if on else None


def _plain(value: Any, levels: int = _LEVELS) -> Any:
    """Something hashable that changes with the value; tensors count by their kind only."""
    kind = type(value)
    if kind in _SIMPLE:
        return value
    if levels > 0 and kind in (dict, OrderedDict):
        found: list[Any] = [len(value)]
        # Hundreds of times in every round of a race: most entries are told from here, without a call.
        for key, one in islice(value.items(), _ITEMS):
            found += (
                key if type(key) in _SIMPLE else _plain(key, levels - 2),
                one if type(one) in _SIMPLE else _plain(one, levels - 2),
            )
        return tuple(found)
    if levels > 0 and kind in (list, tuple, set):
        return len(value), *(_plain(one, levels - 1) for one in islice(value, _ITEMS))
    return _kind(value) if isinstance(value, torch.Tensor) else id(value)
