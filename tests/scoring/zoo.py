"""Ways to make a model compute something else: each changes one model in place and returns what undoes the rest."""

from __future__ import annotations

import functools
import io
import types

import torch
from torch import nn

ZOO: dict[str, tuple[str, dict, object]] = {}


def way(name: str, family: str = "qwen3", **config):
    """Add ``change(model)`` to the zoo; it may return a function that undoes what it did outside the model."""

    def add(change):
        ZOO[name] = (family, config, change)
        return change

    return add


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


for name, how in {
    "the last 12 and the first 2": {"visible": lambda i, j: (i - j < 12) | (j < 2)},
    "a bias by distance": {"bias": lambda i, j: -0.1 * (i - j)},
    "plain, by another name": {},
    "blocks of 32": {"visible": lambda i, j: i // 32 == j // 32},
}.items():

    @way(f"attention function: {name}")
    def _(model, how=how):
        from transformers import AttentionInterface

        AttentionInterface.register("zoo_attention", function_of(**how))
        model.set_attn_implementation("zoo_attention")
        return lambda: AttentionInterface._global_mapping.pop("zoo_attention", None)


@way("attention function: a window where sdpa was")
def _(model):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"]
    ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"] = function_of(visible=window)
    return lambda: ALL_ATTENTION_FUNCTIONS._global_mapping.update(sdpa=before)


# Hooks on every kind of module: name -> (where, what the output becomes).
HOOKS = {
    "a layer, less the mean of the sequence": (layer, centred),
    "a layer, the last position steered": (layer, last),
    "a layer, the first position cleared": (layer, lambda h: torch.cat([0 * h[:, :1], h[:, 1:]], 1)),
    "a layer, less the mean of the batch": (layer, lambda h: h - h.mean(0, keepdim=True)),
    "a layer, by the length": (layer, lambda h: h * (1 + h.shape[1] / 100)),
    "a layer, position 17": (layer, lambda h: torch.cat([h[:, :17], 2 * h[:, 17:18], h[:, 18:]], 1)),
    "the output of attention, the last": (lambda m: layer(m).self_attn.o_proj, last),
    "keys, shifted": (lambda m: layer(m).self_attn.k_proj, shift),
    "the embedding, shifted": (lambda m: m.model.embed_tokens, shift),
    "the head, the mean of the rows": (lambda m: m.lm_head, centred),
    "rotary angles": (lambda m: m.model.rotary_emb, lambda cos: cos.roll(1, 1)),
    "before a layer, shifted": (layer, shift),
    "before the head, the last position": (lambda m: m.lm_head, last),
    "a router, by capacity": (lambda m: layer(m).mlp.gate, lambda x: x * torch.linspace(2, 0, len(x))[:, None]),
}
for name, (where, change_of) in HOOKS.items():

    @way(f"hook: {name}", "mixtral" if "router" in name else "qwen3")
    def _(model, name=name, where=where, change_of=change_of):
        if name.startswith("before"):
            where(model).register_forward_pre_hook(lambda m, args: (change_of(args[0]), *args[1:]))
        else:
            where(model).register_forward_hook(
                lambda m, args, out: change_of(out) if torch.is_tensor(out) else (change_of(out[0]), *out[1:])
            )


@way("hook: of all modules")
def _(model):
    from torch.nn.modules.module import register_module_forward_hook

    return register_module_forward_hook(
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


for name, logits_of, signature in (
    ("one logit lowered by 20", lowered, False),
    ("one logit lowered by 20, signature kept", lowered, True),
    ("a penalty for repetition", repeated, True),
    ("a temperature", lambda x, ids: x / 0.7, False),
    ("the mean of the rows taken off", lambda x, ids: centred(x), True),
    ("the least likely at -inf", lambda x, ids: x.masked_fill(x < x.topk(298).values[..., -1:], -torch.inf), False),
):

    @way(f"wrapped forward: {name}")
    def _(model, logits_of=logits_of, signature=signature):
        forward = model.forward

        def replaced(*args, **kwargs):
            out = forward(*args, **kwargs)
            out.logits = logits_of(out.logits, kwargs.get("input_ids", args[0] if args else None))
            return out

        model.forward = functools.wraps(forward)(replaced) if signature else replaced


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


for name, mix in {
    "a running mean": lambda h: h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None],
    "the mean of the batch": lambda h: h.mean(0, keepdim=True).expand_as(h),
    "the last token": lambda h: h[:, -1:].expand_as(h),
}.items():

    @way(f"module: {name}")
    def _(model, mix=mix):
        layer(model).mlp = Leak(layer(model).mlp, mix)


for name, modules in {
    "a pooling": lambda: [nn.AvgPool2d((3, 1), stride=1, padding=(1, 0))],
    "layers that look back": lambda: [nn.ZeroPad2d((0, 0, 2, 0)), nn.AvgPool2d((3, 1), stride=1)],
    "a convolution": lambda: [nn.Unflatten(1, (1, -1)), nn.Conv2d(1, 1, (3, 1), padding=(1, 0)), nn.Flatten(1, 2)],
}.items():

    @way(f"module: {name} of torch's own, nothing foreign")
    def _(model, modules=modules):
        layer(model).mlp = nn.Sequential(layer(model).mlp, *modules())


@way("a layer twice")
def _(model):
    model.model.layers.append(model.model.layers[0])


# Configurations and attributes that change after loading: name -> (family, its options, change).
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


SETTINGS = {
    "a window after loading": ("mistral", {"sliding_window": None}, lambda m: setattr(m.config, "sliding_window", 16)),
    "no window after loading": ("mistral", {"sliding_window": 16}, lambda m: setattr(m.config, "sliding_window", None)),
    "another softcap": ("gemma2", {}, lambda m: setattr(m.config, "final_logit_softcapping", 1.0)),
    "other experts": ("mixtral", {}, other_experts),
    "eager attention": ("qwen3", {}, lambda m: setattr(m.config, "_attn_implementation", "eager")),
    "not causal": ("qwen3", {}, not_causal),
    "a window of one layer": (
        "mistral", {"sliding_window": None}, lambda m: setattr(layer(m).self_attn, "sliding_window", 16)),
    "another scaling": ("qwen3", {}, lambda m: setattr(layer(m).self_attn, "scaling", 2 * layer(m).self_attn.scaling)),
    "other frequencies": ("qwen3", {}, lambda m: m.model.rotary_emb.inv_freq.mul_(0.5)),
    "a rope that grows": ("qwen3", {}, growing_rope),
}  # fmt: skip
for name, (family, config, change) in SETTINGS.items():
    way(f"setting: {name}", family, **config)(lambda model, change=change: (change(model), None)[1])


@way("compiled in place")
def _(model):
    model.compile(backend=lambda graph, inputs: graph.forward)


@way("int8 activations")
def _(model):
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


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


@way("noise that never repeats")
def _(model):
    layer(model).mlp.register_forward_hook(lambda m, args, out: out + 0.1 * torch.randn_like(out))


@way("a counter")
def _(model):
    count = []
    layer(model).mlp.register_forward_hook(lambda m, args, out: (count.append(1), out * (1 + len(count) % 3))[1])


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
