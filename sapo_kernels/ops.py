"""Schemas, fake kernels and dispatch of ``torch.ops.sapo_kernels.*``: the contracts on one screen.

The documented functions are in ``<op>/api.py``. Backends are imported on first use, so that importing the package
needs neither Triton nor a GPU. ``impl`` is the name of a backend; "auto" is resolved by `resolve_impl`. The in-place
operators have no ``impl``: compiled kernels are registered for their device by csrc/ops.cpp and csrc/cuda/ops.cpp, and
where there are none the dispatcher takes the plain-torch ones.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os

import torch

from . import native

BACKENDS = {
    "tree_attention": ("triton", "sdpa", "reference"),
    "linear_logprob": ("triton", "torch", "reference"),
}

_library = torch.library.Library("sapo_kernels", "FRAGMENT")

# position, subtree_end: [Tk] int32. block_start, span_ptr: [B + 1] int32. span: [S, 2] int32. See trie.TriePass.
# tiles: its tiles of `tile_tokens` queries, made from these where there are none. past_k, past_v: keys and values in
# front of those of the pass, which k and v then are alone; without gradients. pieces: for the backward pass.
_library.define(
    "tree_attention(Tensor q, Tensor k, Tensor v, Tensor position, Tensor subtree_end, Tensor block_start, "
    "Tensor span_ptr, Tensor span, Tensor? sinks, float scale, int? window, float? softcap, int block_tokens, "
    "str impl, bool with_lse, Tensor? tiles=None, int tile_tokens=0, Tensor? past_k=None, "
    "Tensor? past_v=None, Tensor? pieces=None) "
    "-> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# lse: [Tq, Hq], the log-sum-exp of each row's logits, nats; [0] unless `with_lse`. dsinks: [0] without sinks.
_library.define(
    "tree_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor position, "
    "Tensor subtree_end, Tensor block_start, Tensor span_ptr, Tensor span, Tensor? sinks, float scale, int? window, "
    "float? softcap, int block_tokens, str impl, Tensor? tiles=None, int tile_tokens=0, "
    "Tensor? pieces=None) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# targets: [P] int64 sorted by row; target_ptr: [R + 1] int64. mean: [R, D] if `with_mean`, else [0, D]: what the
# backward pass needs where only hidden wants a gradient; it has none of its own. See linear_logprob/gradient.py.
_library.define(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor targets, Tensor target_ptr, Tensor? bias, float scale, "
    "float? softcap, str impl, bool with_mean=False) -> (Tensor logprob, Tensor lse, Tensor mean)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Gradients of hidden, weight and bias; None where the mask is false.
_library.define(
    "linear_logprob_backward(Tensor? grad_logprob, Tensor? grad_lse, Tensor logprob, Tensor lse, Tensor mean, "
    "Tensor hidden, Tensor weight, Tensor targets, Tensor target_ptr, Tensor? bias, float scale, float? softcap, "
    "str impl, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

# Written in place, nothing returned. See accumulate/api.py and reweight/api.py for shapes.
_library.define(
    "accumulate_(Tensor(a!) nll, Tensor(b!) tokens, Tensor logprob, Tensor cell_target, Tensor cell_ptr, int start) "
    "-> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "reweight_(Tensor(a!) mean, Tensor(b!) weight, Tensor(c!) probs, Tensor(d!) best, Tensor(e!) effective, "
    "Tensor live, Tensor nll, Tensor tokens, float decay, float temperature, float floor) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
IN_PLACE = ("accumulate_", "reweight_")


def triton_status(device: torch.device) -> tuple[bool, str]:
    """Whether Triton kernels can run on `device`, and why (not)."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, "TRITON_INTERPRET=1: interpreter, for tests"
    if device.type != "cuda":
        return False, f"no Triton kernels for device type {device.type!r}"
    return True, "CUDA or ROCm device"


def resolve_impl(op: str, impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that `impl` means on `device`; an explicit one that cannot run raises."""
    choices = BACKENDS[op]
    if impl == "auto":
        # The kernels compute in float32, so float64 tensors go where float64 is kept.
        usable = triton_status(device)[0] and device.type != "cpu" and dtype != torch.float64
        return "triton" if usable else choices[1]
    if impl not in choices:
        raise ValueError(f"{op}: impl: expected 'auto' or one of {choices}, got {impl!r}")
    if impl == "triton":
        usable, why = triton_status(device)
        if not usable:
            raise RuntimeError(f"{op}: impl='triton' cannot run on {device}: {why}")
    return impl


def _backend(op: str, impl: str, example: torch.Tensor, backward: bool = False):
    return _function_of(op, resolve_impl(op, impl, example.device, example.dtype), backward)


def _function_of(op: str, name: str, backward: bool = False):
    function = f"{op}_backward_{name}" if backward else f"{op}_{name}"
    return getattr(importlib.import_module(f"{__package__}.{op}.{name}"), function)


def attention_shape(q: torch.Tensor, v: torch.Tensor) -> tuple[int, int, int]:
    """[Tq, Hq, Dv], the shape of tree_attention's result."""
    return q.shape[0], q.shape[1], v.shape[2]


@torch.library.impl(_library, "tree_attention", "CompositeExplicitAutograd")
def _tree_attention(q, k, v, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap,
                    block_tokens, impl, with_lse, tiles=None, tile_tokens=0, past_k=None, past_v=None,
                    pieces=None):  # fmt: skip
    if q.shape[0] == 0:
        return _tree_attention_fake(q, k, v, *[None] * 11, with_lse)
    name = resolve_impl("tree_attention", impl, q.device, q.dtype)
    walk = (tiles, tile_tokens, past_k, past_v)
    if name != "triton":
        walk = ()
        if past_k is not None:
            k, v = torch.cat([past_k, k]), torch.cat([past_v, v])
    run = _function_of("tree_attention", name)
    return run(q, k, v, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap, block_tokens,
               with_lse, *walk)  # fmt: skip


@torch.library.register_fake("sapo_kernels::tree_attention", lib=_library)
def _tree_attention_fake(q, k, v, position, subtree_end, block_start, span_ptr, span, sinks, scale, window, softcap,
                         block_tokens, impl, with_lse, *walk):  # fmt: skip
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(attention_shape(q, v)), q.new_empty(q.shape[:2] if with_lse else 0, dtype=dtype)


@torch.library.impl(_library, "tree_attention_backward", "CompositeExplicitAutograd")
def _tree_attention_backward(grad, q, k, v, out, lse, position, subtree_end, block_start, span_ptr, span, sinks, scale,
                             window, softcap, block_tokens, impl, tiles=None, tile_tokens=0, pieces=None):  # fmt: skip
    if q.shape[0] == 0:
        return tuple(t.zero_() for t in _tree_attention_backward_fake(grad, q, k, v, *[None] * 7, sinks))
    name = resolve_impl("tree_attention", impl, q.device, q.dtype)
    run = _function_of("tree_attention", name, backward=True)
    walk = (tiles, tile_tokens, pieces) if name == "triton" else ()
    # An expanded or transposed gradient is read row by row.
    *found, dsinks = run(grad.contiguous(), q, k, v, out, lse, position, subtree_end, block_start, span_ptr, span,
                         sinks, scale, window, softcap, block_tokens, *walk)  # fmt: skip
    return *found, q.new_empty(0) if dsinks is None else dsinks


@torch.library.register_fake("sapo_kernels::tree_attention_backward", lib=_library)
def _tree_attention_backward_fake(grad, q, k, v, *others):
    sinks = others[7]
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsinks


def _attention_context(ctx, inputs, output):
    q, k, v, *plan, sinks, scale, window, softcap, block_tokens, impl, with_lse, tiles, tokens, past, _, pieces = inputs
    ctx.save_for_backward(q, k, v, *output, *plan, sinks, tiles, pieces)
    ctx.options = scale, window, softcap, block_tokens, impl
    ctx.tile_tokens = tokens
    ctx.mark_non_differentiable(output[1])
    ctx.refused = "with_lse=True" if not with_lse else "no past" if past is not None else None


def _attention_gradients(ctx, grad, _):
    if ctx.refused:
        raise RuntimeError(f"sapo_kernels::tree_attention: expected {ctx.refused} for a backward pass")
    q, k, v, out, lse, *plan, sinks, tiles, pieces = ctx.saved_tensors
    *found, dsinks = torch.ops.sapo_kernels.tree_attention_backward(
        grad, q, k, v, out, lse, *plan, sinks, *ctx.options, tiles, ctx.tile_tokens, pieces
    )
    return *found, *[None] * len(plan), None if sinks is None else dsinks, *[None] * 11


torch.library.register_autograd(
    "sapo_kernels::tree_attention", _attention_gradients, setup_context=_attention_context, lib=_library
)


@torch.library.impl(_library, "linear_logprob", "CompositeExplicitAutograd")
def _linear_logprob(hidden, weight, targets, target_ptr, bias, scale, softcap, impl, with_mean=False):
    if hidden.shape[0] == 0:
        return _linear_logprob_fake(hidden, weight, targets)
    run = _backend("linear_logprob", impl, hidden)
    return run(hidden, weight, targets, target_ptr, bias, scale, softcap, with_mean)


@torch.library.register_fake("sapo_kernels::linear_logprob", lib=_library)
def _linear_logprob_fake(hidden, weight, targets, target_ptr=None, bias=None, scale=1.0, softcap=None, impl="auto",
                         with_mean=False):  # fmt: skip
    rows, width = hidden.shape
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    mean = hidden.new_empty(rows if with_mean else 0, width)
    return hidden.new_empty(targets.shape[0], dtype=dtype), hidden.new_empty(rows, dtype=dtype), mean


@torch.library.impl(_library, "linear_logprob_backward", "CompositeExplicitAutograd")
def _linear_logprob_backward(grad_logprob, grad_lse, logprob, lse, mean, hidden, weight, targets, target_ptr, bias,
                             scale, softcap, impl, output_mask):  # fmt: skip
    if hidden.shape[0] == 0:
        found = _linear_logprob_backward_fake(None, None, None, None, None, hidden, weight, *[None] * 6, output_mask)
        return tuple(None if t is None else t.zero_() for t in found)
    run = _backend("linear_logprob", impl, hidden, backward=True)
    return run(grad_logprob, grad_lse, logprob, lse, mean, hidden, weight, targets, target_ptr, bias, scale, softcap,
               output_mask)  # fmt: skip


@torch.library.register_fake("sapo_kernels::linear_logprob_backward", lib=_library)
def _linear_logprob_backward_fake(grad_logprob, grad_lse, logprob, lse, mean, hidden, weight, *rest):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(s) if want else None for s, want in zip(shapes, rest[-1], strict=True))


def _save_linear_logprob(ctx, inputs, output):
    hidden, weight, targets, target_ptr, bias, *ctx.options, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*output, hidden, weight, targets, target_ptr, bias)


def _linear_logprob_gradients(ctx, grad_logprob, grad_lse, _):
    needs = ctx.needs_input_grad
    found = torch.ops.sapo_kernels.linear_logprob_backward(
        grad_logprob, grad_lse, *ctx.saved_tensors, *ctx.options, [needs[0], needs[1], needs[4]]
    )
    return found[0], found[1], None, None, found[2], None, None, None, None


def _no_backward(op: str):
    def backward(ctx, *grads):
        raise NotImplementedError(f"sapo_kernels::{op} has no backward; call it under torch.no_grad()")

    return backward


torch.library.register_autograd(
    "sapo_kernels::linear_logprob", _linear_logprob_gradients, setup_context=_save_linear_logprob, lib=_library
)
for _op in ("tree_attention_backward", "linear_logprob_backward"):
    torch.library.register_autograd(f"sapo_kernels::{_op}", _no_backward(_op), lib=_library)


# Operators whose first call on CUDA has been sent to the compiled kernel.
_served: set[str] = set()


def _plain(op: str):
    folder = op.rstrip("_")

    def run(*args):
        # The CUDA kernels are looked for when CUDA is used, so that importing the package does not start its driver.
        if args[0].device.type == "cuda" and native.load("_C_cuda") == "loaded" and op not in _served:
            _served.add(op)
            return getattr(torch.ops.sapo_kernels, op)(*args)
        module = importlib.import_module(f"{__package__}.{folder}.torch")
        # Tensors that were made in inference mode may be written there only.
        with torch.inference_mode() if args[0].is_inference() else contextlib.nullcontext():
            getattr(module, f"{folder}_torch")(*args)

    return run


def _in_place_fake(op: str):
    names = [argument.name for argument in getattr(torch.ops.sapo_kernels, op).default._schema.arguments]

    # The dispatcher comes here for one meta tensor among others too, and nothing else would refuse that.
    def fake(first, *rest):
        for name, value in zip(names[1:], rest, strict=True):
            if isinstance(value, torch.Tensor) and value.device != first.device:
                raise RuntimeError(
                    f"{op}: {name}: expected it on the device of the other arguments, {first.device}, got "
                    f"{value.device}"
                )

    return fake


def _watched(op: str):
    """What stands in front of every kernel of an in-place operator, as `torch.library.custom_op` puts it there."""
    overload = getattr(torch.ops.sapo_kernels, op).default
    arguments = overload._schema.arguments
    # The schemas begin with the tensors, and those with the written ones.
    tensors = sum(str(a.type) == "Tensor" for a in arguments)
    written = sum(a.alias_info is not None and a.alias_info.is_write for a in arguments)
    redispatch, below = overload._handle.redispatch_boxed, torch._C._after_ADInplaceOrView_keyset
    increment, grad_enabled = torch._C._increment_version, torch.is_grad_enabled

    def run(keyset, *args):
        if grad_enabled():
            for i, value in enumerate(args[:tensors]):
                if value.requires_grad:
                    name = arguments[i].name
                    raise RuntimeError(f"{op}: {name}: expected it without gradient, got requires_grad; detach() it")
        outputs = args[:written]
        for i, value in enumerate(outputs):
            # torch would run the kernel on a copy, and fail after the other arguments have been written.
            if value.is_neg():
                raise RuntimeError(f"{op}: {arguments[i].name}: expected a plain tensor, got a lazily negated view")
        redispatch(keyset & below, *args)
        # A backward pass that saved one of them raises instead of using the new values.
        try:
            increment(outputs)
        except RuntimeError:  # tensors made in inference mode among them have no version
            increment([value for value in outputs if not value.is_inference()])

    return run


for _op in IN_PLACE:
    _library.impl(_op, _plain(_op), "CompositeExplicitAutograd")
    _library.impl(_op, _watched(_op), "ADInplaceOrView", with_keyset=True)
    torch.library.register_fake(f"sapo_kernels::{_op}", _in_place_fake(_op), lib=_library)

native.load("_C")
