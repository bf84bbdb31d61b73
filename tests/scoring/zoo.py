"""Ways to make a model compute something else: each changes one model in place and returns what undoes the rest."""

from __future__ import annotations

import functools
import io
import types

import torch
from torch import nn

# Name -> (family, settings over its row, change).
ZOO: dict[str, tuple[str, dict, object]] = {}


def way(name: str, family: str = "qwen3", **config):
    """Add ``change(model)`` to the zoo; it may return a function that undoes what it did outside the model."""
    return lambda change: ZOO.update({name: (family, config, change)})


def layer(model, i=1):
    return model.model.layers[i]


def replace(owner, name: str, value):
    """Set an attribute of a module or class; returns what sets it back."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


# What hidden states [B, L, D] may become.


def last(h):
    return torch.cat([h[:, :-1], h[:, -1:] + 1.0], 1)


def shift(h, dim=1):
    return h + 0.3 * torch.cat([torch.zeros_like(h.narrow(dim, 0, 1)), h.narrow(dim, 0, h.shape[dim] - 1)], dim)


def centred(h):
    return h - h.mean(1, keepdim=True)


# Attention functions.


def attend(query, key, value, scaling, visible=None, bias=None):
    """Plain attention in which query i sees key j if ``visible(i, j)``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    i, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
    seen = j <= i if visible is None else (j <= i) & visible(i, j)
    scores = scores if bias is None else scores + bias(i, j)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2).contiguous()


def window(i, j):
    return i - j < 16


def function_of(**how):
    def function(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return attend(query, key, value, scaling, **how), None

    return function


def attention(model, name="zoo_attention", **how):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    table = ALL_ATTENTION_FUNCTIONS._global_mapping
    before = dict(table)
    table[name] = function_of(**how)
    model.set_attn_implementation(name)
    return lambda: (table.clear(), table.update(before))


for name, how in {
    "the last 12 and the first 2": {"visible": lambda i, j: (i - j < 12) | (j < 2)},
    "a bias by distance": {"bias": lambda i, j: -0.1 * (i - j)},
    "plain, by another name": {},
    "a window where sdpa was": {"name": "sdpa", "visible": window},
}.items():
    way(f"attention function: {name}")(functools.partial(attention, **how))

# Hooks on every kind of module: name -> (where, what the output, or the input, becomes).
HOOKS = {
    "a layer, less the mean of the sequence": (layer, centred),
    "a layer, the last position steered": (layer, last),
    "a layer, less the mean of the batch": (layer, lambda h: h - h.mean(0, keepdim=True)),
    "a layer, by the length": (layer, lambda h: h * (1 + h.shape[1] / 100)),
    "a layer, position 17": (layer, lambda h: torch.cat([h[:, :17], 2 * h[:, 17:18], h[:, 18:]], 1)),
    "keys, shifted": (lambda m: layer(m).self_attn.k_proj, shift),
    "the head, the mean of the rows": (lambda m: m.lm_head, centred),
    "rotary angles": (lambda m: m.model.rotary_emb, lambda cos: cos.roll(1, 1)),
    "before a layer, shifted": (layer, shift),
    "before the head, the last position": (lambda m: m.lm_head, last),
    "a router, by capacity": (lambda m: layer(m).mlp.gate, lambda x: x * torch.linspace(2, 0, len(x))[:, None]),
    "noise that never repeats": (lambda m: layer(m).mlp, lambda h: h + 0.1 * torch.randn_like(h)),
}


def hook(model, before, where, change):
    if before:
        where(model).register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))
    else:
        where(model).register_forward_hook(
            lambda m, args, out: change(out) if torch.is_tensor(out) else (change(out[0]), *out[1:])
        )


for name, (where, change) in HOOKS.items():
    change_of = functools.partial(hook, before=name.startswith("before"), where=where, change=change)
    way(f"hook: {name}", "mixtral" if "router" in name else "qwen3")(change_of)


@way("hook: of all modules")
def _(model):
    return nn.modules.module.register_module_forward_hook(
        lambda module, args, out: centred(out) if type(module).__name__ == "Qwen3MLP" else None
    ).remove


# Wrapped and patched forwards and functions.


def lowered(logits, ids):
    logits = logits.clone()
    logits[..., 7] -= 20
    return logits


def repeated(logits, ids):
    seen = torch.zeros(logits.shape[-1], dtype=torch.bool)
    seen[ids.flatten()] = True
    return torch.where(seen, logits * 0.8, logits)


def wrapped(model, logits_of):
    forward = model.forward

    @functools.wraps(forward)
    def replaced(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = logits_of(out.logits, kwargs.get("input_ids", args[0] if args else None))
        return out

    model.forward = replaced


for name, logits_of in {
    "one logit lowered by 20": lowered,
    "a penalty for repetition": repeated,
    "the mean of the rows taken off": lambda x, ids: centred(x),
    "the least likely at -inf": lambda x, ids: x.masked_fill(x < x.topk(298).values[..., -1:], -torch.inf),
}.items():
    way(f"wrapped forward: {name}")(functools.partial(wrapped, logits_of=logits_of))


@way("patched forward of a module, as a method")
def _(model):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(centred(x))) * self.up_proj(centred(x)))

    layer(model).mlp.forward = types.MethodType(forward, layer(model).mlp)


@way("patched forward of a class")
def _(model):
    cls = type(layer(model).mlp)
    forward = cls.forward
    return replace(cls, "forward", lambda self, x: forward(self, shift(x)))


@way("patched function of a family's module, two calls deep")
def _(model):
    from transformers.models.qwen3 import modeling_qwen3

    rotate = modeling_qwen3.rotate_half
    return replace(modeling_qwen3, "rotate_half", lambda x: shift(rotate(x), -2))


@way("patched torch function that norms call")
def _(model):
    plain = torch.rsqrt
    return replace(torch, "rsqrt", lambda x: shift(plain(x)) if x.dim() == 3 else plain(x))


@way("patched scaled_dot_product_attention")
def _(model):
    def windowed(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, **kwargs):
        return attend(query, key, value, scale, visible=window).transpose(1, 2)

    return replace(nn.functional, "scaled_dot_product_attention", windowed)


@way("patched call of modules")
def _(model):
    plain = nn.Module._call_impl

    def called(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        return shift(out) if type(self).__name__ == "Qwen3MLP" else out

    return replace(nn.Module, "_call_impl", called)


class Leak(nn.Module):
    def __init__(self, inner, mix):
        super().__init__()
        self.inner, self.mix = inner, mix

    def forward(self, hidden):
        return self.inner(hidden) + self.mix(hidden)


def behind_mlp(model, wrap):
    layer(model).mlp = wrap(layer(model).mlp)


for name, wrap in {
    "a running mean": lambda mlp: Leak(mlp, lambda h: h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None]),
    "the mean of the batch": lambda mlp: Leak(mlp, lambda h: h.mean(0, keepdim=True).expand_as(h)),
    "a pooling of torch's own": lambda mlp: nn.Sequential(mlp, nn.AvgPool2d((3, 1), stride=1, padding=(1, 0))),
    "a convolution of torch's own": lambda mlp: nn.Sequential(
        mlp, nn.Unflatten(1, (1, -1)), nn.Conv2d(1, 1, (3, 1), padding=(1, 0)), nn.Flatten(1, 2)),
}.items():  # fmt: skip
    way(f"module: {name}")(functools.partial(behind_mlp, wrap=wrap))


@way("a layer twice")
def _(model):
    model.model.layers.append(model.model.layers[0])


# Configurations and attributes that change after loading.


def other_experts(model):
    model.config.num_experts_per_tok = 1
    for one in model.model.layers:
        one.mlp.gate.top_k = 1


def growing_rope(model):
    rope = model.model.rotary_emb
    rope.rope_type, rope.original_max_seq_len, rope.max_seq_len_cached = "dynamic", 32, 32
    rope.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    rope.config.max_position_embeddings = 32


def not_causal(model):
    for one in model.model.layers:
        one.self_attn.is_causal = False


NO_WINDOW = {"sliding_window": None}
for name, family, config, change in (
    ("a window", "mistral", NO_WINDOW, lambda m: setattr(m.config, "sliding_window", 16)),
    ("no window", "mistral", {"sliding_window": 16}, lambda m: setattr(m.config, "sliding_window", None)),
    ("another softcap", "gemma2", {}, lambda m: setattr(m.config, "final_logit_softcapping", 1.0)),
    ("other experts", "mixtral", {}, other_experts),
    ("eager attention", "qwen3", {}, lambda m: setattr(m.config, "_attn_implementation", "eager")),
    ("not causal", "qwen3", {}, not_causal),
    ("a window of one layer", "mistral", NO_WINDOW, lambda m: setattr(layer(m).self_attn, "sliding_window", 16)),
    ("another scaling", "qwen3", {}, lambda m: setattr(layer(m).self_attn, "scaling", 0.7)),
    ("a rope that grows", "qwen3", {}, growing_rope),
    ("compiled in place", "qwen3", {}, lambda m: m.compile(backend=lambda graph, inputs: graph.forward)),
    ("int8 activations", "qwen3", {}, lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True)),
):
    way(f"setting after loading: {name}", family, **config)(lambda model, change=change: (change(model), None)[1])


def entered(mode):
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


@way("a function mode")
def _(model):
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return shift(out) if func is nn.functional.silu else out

    return entered(Mode())


@way("a dispatch mode")
def _(model):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return shift(out) if func is torch.ops.aten.silu.default and out.dim() == 3 else out

    return entered(Mode())


# Behind what looks harmless.


class Shifted(nn.Module):
    def forward(self, *args):
        return shift(args[-1])


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return shift(x)


@way("hidden: a hook that is a module")
def _(model):
    layer(model).mlp.register_forward_hook(Shifted())


@way("hidden: an autograd function")
def _(model):
    layer(model).input_layernorm.forward = Function.apply


@way("hidden: a module that is not registered")
def _(model):
    del layer(model).mlp._modules["down_proj"]
    layer(model).mlp.__dict__["down_proj"] = nn.Sequential(nn.Linear(48, 32), Shifted())


@way("hidden: a compiled script")
def _(model):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Shifted(), torch.ones(1, 5, 32)), file)
    layer(model).mlp = torch.jit.load(io.BytesIO(file.getvalue()))


@way("hidden: a parameter of another class")
def _(model):
    class Leaky(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **(kwargs or {}))
            return shift(out) if func is nn.functional.linear else out

    linear = layer(model).mlp.up_proj
    linear._parameters["weight"] = linear.weight.detach().as_subclass(Leaky)
