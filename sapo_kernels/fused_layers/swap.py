"""Modules whose forward has a fused counterpart, and the switch to it for the length of a block.

Modules of transformers' own families only, and only unpatched ones: a forward on the instance (accelerate,
Liger, a user) or another class stays as it is. A counterpart is used where it computes what the module's own forward
does (`agrees`), for the dtypes and shapes at hand. Linear layers are called as modules, so adapters take part.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..widened import in_float64
from . import triton as kernels

# What was decided, by everything that it may depend on; the number of model classes in a process bounds it.
_decided: dict[tuple, Any] = {}
_ROTARY = "apply_rotary_pos_emb"
# The error against float64 may be that of the own forward, up to what another order of a sum makes of it.
SLACK = 1.1
# How often an element may be off by a rounding more: the largest of few errors is a matter of luck.
LARGEST = 2.0


def fused_layers(inner: nn.Module):
    """Fused counterparts on the modules of a model for the block, without gradients."""
    return swapped_in(counterparts(inner))


def counterparts(inner: nn.Module) -> list[tuple[nn.Module, Callable]]:
    """Modules of a model and the forwards that stand in for theirs."""
    copies: dict[types.FunctionType, types.FunctionType] = {}
    kinds = (_norm_forward, _gated_forward, _attention_forward)
    found = ((m, next(filter(None, (one(m, copies) for one in kinds)), None)) for m in inner.modules() if _is_stock(m))
    return [(module, forward) for module, forward in found if forward is not None]


@contextlib.contextmanager
def swapped_in(pairs: list[tuple[nn.Module, Callable]]):
    """What `counterparts` found, on its modules for the block."""
    swapped: list[nn.Module] = []
    try:
        for module, forward in pairs:
            vars(module)["forward"] = forward
            swapped.append(module)
        yield
    finally:
        for module in swapped:
            vars(module).pop("forward", None)


def _is_stock(module: nn.Module) -> bool:
    values = vars(module)
    return (
        type(module).__module__.startswith("transformers.models.")
        and "forward" not in values
        and values.get("_compiled_call_impl") is None
        and type(type(module).forward) is types.FunctionType
    )


def _decide(key: tuple, sample: torch.Tensor, choices, test: Callable[[Any], bool]) -> Any:
    """The first of `choices` that passes `test`, or None; asked once for a key and the kind of `sample`."""
    key = (*key, sample.dtype, sample.device.type, torch.is_autocast_enabled(sample.device.type))
    if key not in _decided:
        _decided[key] = next(filter(test, choices), None)
    return _decided[key]


def _stand_in(module: nn.Module, **parts: dict) -> nn.Module:
    """A copy of the module with other parameters or children; the module itself is not changed."""
    other = object.__new__(type(module))
    vars(other).update(vars(module))
    vars(other).update(parts)
    return other


def _norm_forward(module: nn.Module, copies: dict) -> Callable | None:
    """RMSNorm: one weight, one epsilon, one argument."""
    values = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    epsilons = [name for name in ("variance_epsilon", "eps") if isinstance(values.get(name), float)]
    plain = all(isinstance(value, (bool, int, float, str, tuple, torch.Size)) for value in values.values())
    weight = module._parameters.get("weight")
    if len(epsilons) != 1 or not plain or weight is None or weight.dim() != 1 or len(module._parameters) != 1:
        return None
    if module._buffers or module._modules or len(_parameters(type(module).forward)) != 2:
        return None
    own, epsilon, width = type(module).forward, values[epsilons[0]], len(weight)
    key = (type(module), width, weight.dtype, *sorted(values.items()))

    def test(choice: tuple) -> bool:
        rows = numbers(48, width, like=sample, seed=0)
        # Some so small that the epsilon counts, one of zeros.
        rows = rows * torch.logspace(-5, 2, 48, device=rows.device)[:, None].to(rows.dtype)
        rows[-1] = 0
        factor = nn.Parameter(numbers(width, like=weight, seed=1), requires_grad=False)
        stand_in = _stand_in(module, _parameters={"weight": factor})
        return agrees(lambda x: kernels.rms_norm(x, factor, epsilon, *choice), lambda x: own(stand_in, x), rows)

    sample: torch.Tensor = weight

    def forward(x: torch.Tensor) -> torch.Tensor:
        nonlocal sample
        weight, sample = module.weight, x
        if type(weight) not in (nn.Parameter, torch.Tensor) or not _dense(x) or width > kernels.LARGEST_ROW:
            return own(module, x)
        dtypes = dict.fromkeys((x.dtype, torch.promote_types(x.dtype, weight.dtype), torch.float32))
        choices = [(first, plus, dtype) for dtype in dtypes for first in (True, False) for plus in (False, True)]
        choice = _decide(key, x, choices, test)
        return own(module, x) if choice is None else kernels.rms_norm(x, weight, epsilon, *choice)

    return forward


def _dense(x: torch.Tensor) -> bool:
    return type(x) is torch.Tensor and x.dtype in kernels.DTYPES and x.numel() > 0 and x.is_contiguous()


class _Given(nn.Module):
    """A stand-in for a linear layer: returns a given result, and refuses any input but the expected one."""

    def __init__(self, value: torch.Tensor, expected: torch.Tensor):
        super().__init__()
        self.value, self.expected = value, expected

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x is not self.expected:
            raise ValueError("expected the module's own input")
        return self.value


class _Times4(nn.Module):
    """Stands for the last linear layer; rounds nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 4 * x


def _gated_forward(module: nn.Module, copies: dict) -> Callable | None:
    """``down_proj(act(gate_proj(x)) * up_proj(x))``, also with gate and up of one matrix."""
    children = module._modules
    acts = [name for name in ("act_fn", "activation_fn") if children.get(name) is not None]
    if len(acts) != 1 or module._parameters or module._buffers:
        return None
    joined = set(children) == {"gate_up_proj", "down_proj", *acts}
    if not joined and set(children) != {"gate_proj", "up_proj", "down_proj", *acts}:
        return None
    act = children[acts[0]]
    if type(act).__module__.partition(".")[0] not in ("transformers", "torch") or act._forward_hooks:
        return None
    own = type(module).forward
    if len(_parameters(own)) != 2:
        return None
    key = (type(module), joined, type(act), *_scalars(module), *_scalars(act))

    def test(choice) -> bool:
        gate, up = (numbers(6, 64, like=sample, seed=seed) * 3 for seed in (2, 3))
        x = numbers(6, 8, like=sample, seed=4)

        def through_own(gate, up):
            given = {acts[0]: act, "down_proj": _Times4()}
            if joined:
                given["gate_up_proj"] = _Given(torch.cat([gate, up], -1), x)
            else:
                given |= {"gate_proj": _Given(gate, x), "up_proj": _Given(up, x)}
            return own(_stand_in(module, _modules=given), x)

        return agrees(lambda gate, up: 4 * kernels.gated(gate, up, choice), through_own, gate, up)

    sample: torch.Tensor = torch.empty(0)

    def forward(x: torch.Tensor) -> torch.Tensor:
        nonlocal sample
        # What its linear layers will give.
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        sample = x.new_empty(0, dtype=dtype)
        choice = _decide(key, sample, kernels.ACTIVATIONS, test) if dtype in kernels.DTYPES else None
        if choice is None:
            return own(module, x)
        if joined:
            gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = module.gate_proj(x), module.up_proj(x)
        fits = all(type(t) is torch.Tensor and t.dtype == dtype for t in (gate, up)) and gate.dim() > 1
        fits = fits and gate.shape == up.shape and gate.numel() > 0
        return module.down_proj(kernels.gated(gate, up, choice) if fits else act(gate) * up)

    return forward


def _scalars(module: nn.Module) -> list[tuple]:
    kinds = (bool, int, float, str, types.FunctionType, types.BuiltinFunctionType)
    return sorted(
        ((name, value if not callable(value) else id(value)) for name, value in vars(module).items()
         if isinstance(value, kinds) and name != "training"),
        key=lambda item: item[0],
    )  # fmt: skip


def _attention_forward(module: nn.Module, copies: dict) -> Callable | None:
    """An attention layer whose forward calls its file's `apply_rotary_pos_emb`: a copy of it that calls ours."""
    function = type(module).forward
    if function not in copies:
        rotary = function.__globals__.get(_ROTARY)
        stock = isinstance(rotary, types.FunctionType) and rotary.__module__.startswith("transformers.models.")
        if (
            not stock
            or _ROTARY not in function.__code__.co_names
            or _parameters(rotary)[:4] != ("q", "k", "cos", "sin")
        ):
            copies[function] = None
        else:
            space = {**function.__globals__, _ROTARY: _fused_rotary(rotary)}
            copy = types.FunctionType(
                function.__code__, space, function.__name__, function.__defaults__, function.__closure__
            )
            copy.__kwdefaults__ = function.__kwdefaults__
            copies[function] = copy
    copy = copies[function]
    return None if copy is None else types.MethodType(copy, module)


@functools.cache
def _parameters(function: types.FunctionType) -> tuple[str, ...]:
    """Names, looked up once for a function that thousands of modules share."""
    return tuple(inspect.signature(function).parameters)


def _fused_rotary(own: types.FunctionType) -> Callable:
    def rotary(q, k, cos, sin, *rest, **options):
        fits = (
            not rest and not options and q.dim() == k.dim() == 4 and len(q) == len(k) == 1
            and type(q) is type(cos) is torch.Tensor and q.dtype == k.dtype and cos.dtype == sin.dtype
            and q.dtype in kernels.DTYPES and cos.dtype in kernels.DTYPES and q.numel() > 0
            and q.shape[2:] == k.shape[2:] and cos.shape == sin.shape and cos.dim() == 3
            and cos.shape[:2] == (1, q.shape[2]) and cos.shape[2] % 2 == 0 and 0 < cos.shape[2] <= q.shape[3]
            and all(t.stride(-1) == 1 for t in (q, k, cos, sin))
        )  # fmt: skip
        if not fits:
            return own(q, k, cos, sin, *rest, **options)

        def test(dtype) -> bool:
            some = [numbers(1, heads, 5, q.shape[3], like=q, seed=heads) for heads in (4, 2)]
            turns = [numbers(1, 5, cos.shape[2], like=cos, seed=seed) for seed in (5, 6)]
            return agrees(lambda *given: kernels.rotary(*given, dtype), own, *some, *turns)

        choices = dict.fromkeys((q.dtype, torch.promote_types(q.dtype, cos.dtype)))
        dtype = _decide((own, q.shape[3], cos.shape[2], cos.dtype), q, choices, test)
        return own(q, k, cos, sin) if dtype is None else kernels.rotary(q, k, cos, sin, dtype)

    return rotary


def agrees(fused: Callable, own: Callable, *inputs: torch.Tensor) -> bool:
    """Whether `fused` gives tensors of the shapes and dtypes of `own`, as close to float64 as `own`'s are."""
    try:
        plain, found = tree_leaves(own(*inputs)), tree_leaves(fused(*inputs))
        with torch.autocast(inputs[0].device.type, enabled=False), in_float64():
            exact = tree_leaves(own(*inputs))
    except Exception:  # what a compiler or a stand-in refuses is not fused
        return False
    return len(found) == len(plain) and all(map(_as_close, found, plain, exact))


def _as_close(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> bool:
    if (found.shape, found.dtype) != (plain.shape, plain.dtype):
        return False
    scale = exact.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    error, usual = (((t.double() - exact) / scale).abs() for t in (found, plain))
    # A module that errs by nothing leaves room for the last bits.
    ground = torch.finfo(found.dtype).eps / 8
    close = error.square().mean().sqrt() <= SLACK * usual.square().mean().sqrt() + ground
    return bool(close & (error.max() <= LARGEST * usual.max() + ground))


def numbers(*shape: int, like: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal numbers of like's dtype and device, the same each time; torch's own generators are not touched."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(like.device, like.dtype)
