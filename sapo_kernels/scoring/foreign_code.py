"""Whose code runs in a model's forward.

Packing is right for layers that look at other tokens through their attention alone. Code of the libraries below is
taken at its word, and every call of `score_prompts` verifies that word on its own cells (verification.py). Code from
anywhere else (a hook, a patched forward, an attention function, a module class of the user's own) may look at
whatever else is in its batch in ways that no sample of cells would show, so such a model is scored sequence by
sequence. It is looked for where people put it; what is hidden on purpose is left to verification.
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
        "torch", "transformers", "peft", "trl", "accelerate", "liger_kernel", "bitsandbytes", "torchao", "optimum",
        "gptqmodel", "auto_gptq", "compressed_tensors", "flash_attn", "xformers", "deepspeed", "huggingface_hub",
        "triton", "fla", "mamba_ssm", "wandb", "sapo_kernels", "sapo_peft",
    )
)  # fmt: skip
# Where decorators come from; what they wrap is looked at.
_DECORATORS = frozenset(("contextlib", "functools", "typing", "typing_extensions", "warnings"))
# Operators that come with torch or with us, by the first part of their name.
_NAMESPACES = frozenset(("aten", "prims", "prim", "quantized", "onednn", "mkldnn", "sapo_kernels"))
# Methods that no forward calls, and people replace or add.
_NOT_IN_FORWARD = frozenset(
    (
        "__init__", "generate", "state_dict", "load_state_dict", "save_pretrained", "from_pretrained", "push_to_hub",
        "loss_function", "_loss_function", "prepare_inputs_for_generation", "configure_optimizers", "training_step",
        "validation_step", "compute_loss", "_init_weights", "__repr__", "extra_repr", "__deepcopy__", "__reduce__",
    )
)  # fmt: skip
_DATA = frozenset((bool, int, float, str, type(None), torch.Tensor, torch.dtype, torch.device, torch.Size))
_BUILTIN = (
    types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)  # fmt: skip
_CONTAINERS = (dict, OrderedDict, list, tuple)
# How deep wrappers, and calls of library functions by one another, are followed; how much of a container.
_DEPTH, _CALLS, _ITEMS = 6, 5, 64


def foreign_code(model: nn.Module, configs: list) -> str | None:
    """The first piece of code in a model's forward that is not from `LIBRARIES`, in words; None if there is none.

    Looked at: hooks and instance attributes of every module, the functions of its class and what its forward calls by
    name, the classes of its parameters; the attention, mask and experts functions of `configs`; torch's functions, its
    global hooks and modes.
    """
    return _Scan(model).all(configs)


def foreign_in_training(model: nn.Module, loss: Any = None) -> str | None:
    """The same of what only training runs: hooks of a backward pass, and the model's loss function where it counts."""
    from torch.nn.modules import module as modules

    scan = _Scan(model)
    everywhere = (*modules._global_backward_hooks.values(), *modules._global_backward_pre_hooks.values())
    found = [("a backward hook of all modules", hook) for hook in everywhere]
    for name, module in model.named_modules():
        for hooks in (module._backward_hooks, module._backward_pre_hooks):
            found += [(f"a backward hook of {name or type(module).__name__!r}", hook) for hook in hooks.values()]
    for what, value in (*found, ("its loss function", loss)):
        if value is not None and (where := scan.code(value)):
            return f"{what} ({where})"
    return None


def foreign_callable(value: Any) -> str | None:
    """The same for one callable, with what it wraps."""
    return _Scan(None).code(value)


def foreign_module(module: nn.Module) -> str | None:
    """The same for a wrapper alone, without what it wraps."""
    scan = _Scan(module)
    scan.seen.update(map(id, module.modules()))
    return scan.module(module)


class _Scan:
    """One look at a model; nothing is looked at twice."""

    def __init__(self, model: nn.Module | None):
        self.model, self.seen = model, set()

    def all(self, configs: list) -> str | None:
        own = list(self.model.named_modules())
        self.seen.update(id(module) for _, module in own)
        for name, module in own:
            if where := self.module(module):
                return where.replace("{}", repr(name or type(module).__name__))
        for what, value in _of_process(configs):
            if where := self.code(value, calls=_CALLS):
                return f"{what} ({where})"
        return None

    def module(self, module: nn.Module) -> str | None:
        """Of one module: its hooks, attributes and class; "{}" stands for its name."""
        if isinstance(module, torch.jit.ScriptModule):
            return "the compiled script {}"
        for what, value in _of_instance(module):
            if where := self.code(value):
                return f"{what} of {{}} ({where})"
        for parameter in module.__dict__["_parameters"].values():
            if type(parameter) not in (nn.Parameter, torch.Tensor, type(None)) and (where := self.cls(type(parameter))):
                return f"a parameter of {{}} ({where})"
        return self.cls(type(module))

    def cls(self, cls: type) -> str | None:
        for base in cls.__mro__:
            if base in _BASES or id(base) in self.seen:
                continue
            self.seen.add(id(base))
            for name, value in vars(base).items():
                if name in _NOT_IN_FORWARD or isinstance(value, type):
                    continue
                value = value.fget if isinstance(value, property) else value
                value = getattr(value, "__func__", getattr(value, "func", value))
                calls = _CALLS if base.__module__.startswith("transformers.models.") else 0
                if callable(value) and (where := self.code(value, calls=calls)):
                    return f"{base.__name__}.{name} ({where})"
        return None

    def code(self, value: Any, depth: int = _DEPTH, calls: int = 0) -> str | None:
        """Where a callable, or one that it wraps or calls, is defined, if that is no library; else None."""
        if id(value) in self.seen or (id(value), calls > 0) in self.seen or not depth:
            return None
        if isinstance(value, nn.Module):
            self.seen.add(id(value))
            return (self.module(value) or "").replace("{}", repr(type(value).__name__)) or next(
                filter(None, (self.code(child, depth - 1) for child in value.children())), None
            )
        if isinstance(value, type):
            return self.cls(value)
        if isinstance(value, functools.partial):
            parts = (value.func, *value.args, *value.keywords.values())
            return self.first((part for part in parts if callable(part)), depth, calls)
        if isinstance(value, types.MethodType):
            owner = value.__self__
            return self.first(
                (value.__func__, *([owner] if isinstance(owner, (nn.Module, type)) else [])), depth, calls
            )
        if isinstance(value, types.FunctionType):
            return self.function(value, depth, calls)
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            space = str(value).partition(".")[0].partition("::")[0]
            return None if space in _NAMESPACES else f"the operator {value}"
        if isinstance(value, _BUILTIN):
            root = str(getattr(value, "__module__", None)).partition(".")[0]
            return None if root in LIBRARIES | {"None"} else "a builtin"
        home = type(value).__module__
        if home.partition(".")[0] in LIBRARIES | _DECORATORS | {"builtins"}:
            return self.first(
                (inner for inner in getattr(value, "__dict__", {}).values() if _is_code(inner)), depth, calls
            )
        return f"a {type(value).__name__} defined in {home}"

    def function(self, function: types.FunctionType, depth: int, calls: int) -> str | None:
        self.seen.add((id(function), calls > 0))
        # Where its code was compiled: `__module__` is copied by functools.wraps.
        home = str(function.__globals__.get("__name__", "?"))
        root = home.partition(".")[0]
        if root not in LIBRARIES | _DECORATORS:
            return f"defined in {home}"
        if where := self.first(filter(_is_code, map(_contents, function.__closure__ or ())), depth, calls):
            return where
        # Torch's own functions are looked at where people replace them, `_of_process`.
        if root != "transformers" or not calls:
            return None
        called = (function.__globals__.get(name) for name in function.__code__.co_names)
        return self.first(
            (one for one in called if _is_code(one) and not isinstance(one, _BUILTIN)), _DEPTH + 1, calls - 1
        )

    def first(self, values: Any, depth: int, calls: int) -> str | None:
        return next(filter(None, (self.code(value, depth - 1, calls) for value in values)), None)


_BASES = frozenset((*nn.Module.__mro__, *nn.Parameter.__mro__))


def _of_instance(module: nn.Module) -> Iterator[tuple[str, Any]]:
    values = module.__dict__
    for hooks in (values["_forward_hooks"], values["_forward_pre_hooks"]):
        for hook in hooks.values():
            yield "a forward hook", hook
    for hook in getattr(values.get("_hf_hook"), "hooks", [values.get("_hf_hook")]):
        if hook is not None:
            yield "accelerate's hook", hook.pre_forward
            yield "accelerate's hook", hook.post_forward
    if type(module).__module__.startswith("torch.nn.modules."):
        # There are thousands; their own forward calls nothing of the instance's.
        names = ("forward", "_compiled_call_impl", "_old_forward")
        yield from ((repr(name), values[name]) for name in names if values.get(name))
        return
    for name, value in values.items():
        if name[:1] == "_" and name in _REGISTERED or name in _NOT_IN_FORWARD or type(value) in _DATA:
            continue
        if type(value) in _CONTAINERS:
            items = list(value.values() if isinstance(value, dict) else value)[:_ITEMS]
            yield from ((repr(name), item) for item in items if isinstance(item, nn.Module) or _is_code(item))
        elif name != "_hf_hook" and callable(value):
            yield repr(name), value


_REGISTERED = frozenset(vars(nn.Module()))


def _of_process(configs: list) -> Iterator[tuple[str, Any]]:
    from torch.nn.modules import module as modules
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    for hooks in (modules._global_forward_hooks, modules._global_forward_pre_hooks):
        for hook in hooks.values():
            yield "a forward hook of all modules", hook
    for mode in _get_current_function_mode_stack():
        yield "a torch function mode", type(mode).__torch_function__
    for mode in _get_current_dispatch_mode_stack():
        yield "a torch dispatch mode", type(mode).__torch_dispatch__
    for owner in (torch, torch.nn.functional, torch.Tensor, nn.Module):
        for name, value in vars(owner).items():
            if not _is_code(value) or isinstance(value, _BUILTIN) or name in _NOT_IN_FORWARD:
                continue
            # Hundreds that torch brought along and that hold no other code: `code` would find nothing in them.
            own = isinstance(value, types.FunctionType) and str(value.__globals__.get("__name__")).startswith("torch.")
            if not own or value.__closure__:
                yield f"{owner.__name__}.{name}", value
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError:
        return
    tables = (
        ("attention", "_attn_implementation", ALL_ATTENTION_FUNCTIONS),
        ("mask", "_attn_implementation", ALL_MASK_ATTENTION_FUNCTIONS),
        ("experts", "_experts_implementation", ALL_EXPERTS_FUNCTIONS),
    )
    for what, option, table in tables:
        for name in {getattr(config, option, None) for config in configs}:
            if name in table:
                yield f"the {what} function {name!r}", table[name]


def _contents(cell) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _is_code(value: Any) -> bool:
    return type(value) not in _DATA and callable(value) and not isinstance(value, type)
