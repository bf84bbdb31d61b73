"""What a model's computation is made of: whose code runs in its forward, and one fingerprint of everything else.

Packing is right for layers that look at other tokens through their attention alone. Code of the libraries below is
taken at its word, and every call of `score_prompts` verifies that word on its own cells (verification.py). Code from
anywhere else (a hook, a patched forward, an attention function, a module class of the user's own) may look at
whatever else is in its batch in ways that no sample of cells would show, so such a model is scored sequence by
sequence.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Packages whose layers and hooks act on each token alone, or on others through the attention.
LIBRARIES = frozenset(
    (
        "torch", "transformers", "peft", "trl", "accelerate", "liger_kernel", "bitsandbytes", "torchao", "torchvision",
        "optimum", "gptqmodel", "auto_gptq", "awq", "hqq", "compressed_tensors", "flash_attn", "apex", "deepspeed",
        "kernels", "wandb", "sapo_kernels", "sapo_peft",
    )
)  # fmt: skip
# Of torch's functions, those that a layer's forward is made of and that people replace.
_FUNCTIONAL = (
    "scaled_dot_product_attention", "softmax", "linear", "embedding", "layer_norm", "rms_norm", "silu", "gelu",
)  # fmt: skip
_DATA = frozenset((bool, int, float, str, type(None), torch.Tensor, dict, OrderedDict, list, tuple, set, torch.dtype))
_DEPTH = 6
# Where decorators come from; what they wrap is looked at.
_DECORATORS = frozenset(("contextlib", "functools", "typing", "typing_extensions", "warnings"))
# Of a module's own dictionary, what is said otherwise or decides nothing.
_STRUCTURE = frozenset(
    ("training", "_parameters", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
     "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
     "_load_state_dict_post_hooks", "_non_persistent_buffers_set", "_forward_hooks_with_kwargs",
     "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_is_full_backward_hook", "forward")
)  # fmt: skip


def foreign_code(model: nn.Module, configs: list) -> str | None:
    """The first piece of code in a model's forward that is none of `LIBRARIES`' own, in words; None if there is none.

    Looked at: hooks and instance attributes of every module, the functions of every module's class and what its
    forward calls by name, the attention and mask functions of `configs`, torch's global hooks and function modes.
    """
    classes = set()
    for name, module in model.named_modules():
        for what, function in _of_instance(module):
            if where := _foreign(function):
                return f"{what} of {name or type(module).__name__!r} ({where})"
        classes.update(type(module).__mro__)
    for cls in classes - set(nn.Module.__mro__):
        if where := _foreign_class(cls):
            return f"{cls.__name__}.{where}"
    for what, function in _of_process(configs):
        if where := _foreign(function):
            return f"{what} ({where})"
    return None


def _of_instance(module: nn.Module) -> Iterator[tuple[str, Any]]:
    values = module.__dict__
    for hooks in (values["_forward_hooks"], values["_forward_pre_hooks"]):
        for hook in hooks.values():
            yield "a forward hook", hook
    for hook in getattr(values.get("_hf_hook"), "hooks", [values.get("_hf_hook")]):
        if hook is not None:
            yield "accelerate's hook", type(hook).pre_forward
            yield "accelerate's hook", type(hook).post_forward
    if type(module).__module__.startswith("torch.nn.modules."):
        # There are thousands; their own forward calls nothing of the instance's.
        yield from ((repr(name), values[name]) for name in ("forward", "_compiled_call_impl") if values.get(name))
        return
    for name, value in values.items():
        if type(value) not in _DATA and name != "_hf_hook" and callable(value) and not isinstance(value, nn.Module):
            yield repr(name), value


def _foreign_class(cls: type) -> str | None:
    for name, value in vars(cls).items():
        if isinstance(value, property):
            value = value.fget
        value = getattr(value, "__func__", value)
        if name == "__init__" or not isinstance(value, types.FunctionType):
            continue
        where = _foreign(value)
        if where is None and name == "forward":
            where = next(filter(None, map(_foreign, _called(value))), None)
        if where:
            return f"{name} ({where})"
    return None


def _called(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """The functions that `function`, or what a decorator wraps in it, finds under a global name."""
    for one in _unwrapped(function):
        for name in one.__code__.co_names:
            value = one.__globals__.get(name)
            if isinstance(value, types.FunctionType):
                yield value


def _unwrapped(function: types.FunctionType, depth: int = _DEPTH) -> Iterator[types.FunctionType]:
    yield function
    for cell in function.__closure__ or () if depth else ():
        inner = _contents(cell)
        if isinstance(inner, types.FunctionType):
            yield from _unwrapped(inner, depth - 1)


def _contents(cell) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _of_process(configs: list) -> Iterator[tuple[str, Any]]:
    from torch.nn.modules import module as modules
    from torch.overrides import _get_current_function_mode_stack

    for hooks in (modules._global_forward_hooks, modules._global_forward_pre_hooks):
        for hook in hooks.values():
            yield "a forward hook of all modules", hook
    for mode in _get_current_function_mode_stack():
        yield "a torch function mode", type(mode).__torch_function__
    for name in _FUNCTIONAL:
        yield f"torch.nn.functional.{name}", getattr(torch.nn.functional, name)
    yield "torch.nn.Module.__call__", nn.Module.__call__
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError:
        return
    for name in {getattr(config, "_attn_implementation", None) for config in configs} - {None}:
        for what, table in (("attention", ALL_ATTENTION_FUNCTIONS), ("mask", ALL_MASK_ATTENTION_FUNCTIONS)):
            if name in table:
                yield f"the {what} function {name!r}", table[name]


def _foreign(function: Any, depth: int = _DEPTH) -> str | None:
    """Where a callable, or one that it wraps, is defined, if that is none of the libraries; else None."""
    if isinstance(function, functools.partial):
        parts = (function.func, *function.args, *function.keywords.values())
        return next(filter(None, (_foreign(part, depth - 1) for part in parts if callable(part))), None)
    if isinstance(function, types.MethodType):
        function = function.__func__
    if isinstance(function, (nn.Module, type)):
        return None  # looked at as a module, or made by a library
    if isinstance(function, types.FunctionType):
        # Where its code was compiled: `__module__` is copied by functools.wraps.
        home = str(function.__globals__.get("__name__", "?"))
        if home.partition(".")[0] not in LIBRARIES | _DECORATORS:
            return f"defined in {home}"
        held = map(_contents, function.__closure__ or ()) if depth else ()
        return next(filter(None, (_foreign(one, depth - 1) for one in held if _is_code(one))), None)
    if isinstance(function, (types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType)):
        return None if str(function.__module__).partition(".")[0] in LIBRARIES | {"None"} else "a builtin"
    home = type(function).__module__
    if home.partition(".")[0] in LIBRARIES | {"builtins"}:
        inner = [value for value in getattr(function, "__dict__", {}).values() if _is_code(value)] if depth else []
        return next(filter(None, (_foreign(value, depth - 1) for value in inner)), None)
    return f"a {type(function).__name__} defined in {home}"


def _is_code(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, functools.partial))


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
    """A number that changes with everything that decides how a model may be scored, its weights' values apart.

    Class, dtype and device of every module and parameter; hooks; instance attributes, functions by their identity;
    configuration values and attention implementations; adapters and which are active; autocast; precision of products.
    """
    parts: list[Any] = [impl, str(device), torch.get_float32_matmul_precision(), _autocast(device)]
    for config in configs:
        parts += [type(config), config._attn_implementation_internal, _plain(vars(config))]
    for module in model.modules():
        values = module.__dict__
        parts += (type(module), *values["_forward_hooks"], -1, *values["_forward_pre_hooks"], values.get("forward"))
        for value in values["_parameters"].values():
            if value is not None:
                parts += (type(value), value.dtype, value.device)
        if not type(module).__module__.startswith("torch.nn.modules."):
            parts += [_plain(value) for name, value in values.items() if name not in _STRUCTURE]
    return hash(tuple(parts))


def _kind(value: torch.Tensor) -> tuple:
    return type(value), value.dtype, value.device, value.shape


def _autocast(device: torch.device) -> tuple:
    on = torch.is_autocast_enabled(device.type)
    return on, torch.get_autocast_dtype(device.type) if on else None


def _plain(value: Any) -> Any:
    """Something hashable that changes with the value; tensors count by their kind only."""
    kind = type(value)
    if kind in (bool, int, float, str, type(None)):
        return value
    if kind is dict or kind is OrderedDict:
        return tuple([(str(key), _plain(inner)) for key, inner in value.items()])
    if kind in (list, tuple, set):
        return tuple(map(_plain, value))
    return _kind(value) if isinstance(value, torch.Tensor) else id(value)
