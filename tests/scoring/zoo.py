"""Ways to make a model compute something else: each changes one model in place and returns what undoes the rest.

Attention functions, hooks and replaced forwards here; modules, settings and hidden code in `zoo_modules`.
"""

from __future__ import annotations

import functools
import types

import torch

ZOO: dict[str, tuple[str, dict, object]] = {}


def way(name: str, family: str = "qwen3", **config):
    """Add ``change(model)`` to the zoo; it may return a function that undoes what it did outside the model."""

    def add(change):
        ZOO[name] = (family, config, change)
        return change

    return add


# Attention functions.


def attend(module, query, key, value, scaling, visible=None, bias=None):
    """Plain attention in which query i sees key j if ``visible(i, j)``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    i = torch.arange(query.shape[2])[:, None]
    j = torch.arange(key.shape[2])[None]
    seen = j <= i
    if visible is not None:
        seen = seen & visible(i, j)
    if bias is not None:
        scores = scores + bias(i, j)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def attention(name: str, **how):
    def function(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return attend(module, query, key, value, scaling, **how)

    @way(f"attention function: {name}")
    def change(model):
        from transformers import AttentionInterface

        AttentionInterface.register("zoo_attention", function)
        model.set_attn_implementation("zoo_attention")
        return lambda: AttentionInterface._global_mapping.pop("zoo_attention", None)


attention("the last 12 and the first 2", visible=lambda i, j: (i - j < 12) | (j < 2))
attention("a local window of 16", visible=lambda i, j: i - j < 16)
attention("a bias by distance", bias=lambda i, j: -0.1 * (i - j))
attention("plain, by another name", visible=None)
attention("blocks of 32", visible=lambda i, j: i // 32 == j // 32)


@way("attention function: a window where sdpa was")
def _(model):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def function(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return attend(module, query, key, value, scaling, visible=lambda i, j: i - j < 16)

    before = ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"]
    ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"] = function
    return lambda: ALL_ATTENTION_FUNCTIONS._global_mapping.update(sdpa=before)


# Hooks on every kind of module.


def hook(name: str, where, change_of, family: str = "qwen3", pre: bool = False):
    @way(f"hook: {name}", family)
    def change(model):
        module = where(model)
        if pre:
            module.register_forward_pre_hook(lambda m, args: (change_of(args[0]), *args[1:]))
        else:
            module.register_forward_hook(
                lambda m, args, out: change_of(out) if torch.is_tensor(out) else (change_of(out[0]), *out[1:])
            )


def last(h):
    return torch.cat([h[:, :-1], h[:, -1:] + 1.0], 1)


def first(h):
    return torch.cat([0 * h[:, :1], h[:, 1:]], 1)


def shift(h):
    return h + 0.3 * torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)


def layer(model, i=1):
    return model.model.layers[i]


hook("a layer, less the mean of the sequence", layer, lambda h: h - h.mean(1, keepdim=True))
hook("a layer, the last position steered", layer, last)
hook("a layer, the first position cleared", layer, first)
hook("a layer, shifted by a token", layer, shift)
hook("a layer, steered everywhere", layer, lambda h: h + 0.1)
hook("a layer, less the mean of the batch", layer, lambda h: h - h.mean(0, keepdim=True))
hook("a layer, by the length", layer, lambda h: h * (1 + h.shape[1] / 100))
hook("a layer, position 17", layer, lambda h: torch.cat([h[:, :17], 2 * h[:, 17:18], h[:, 18:]], 1))
hook("before a layer, shifted", layer, shift, pre=True)
hook("the mlp, less the mean", lambda m: layer(m).mlp, lambda h: h - h.mean(1, keepdim=True))
hook("the output of attention, the last", lambda m: layer(m).self_attn.o_proj, last)
hook("a norm, less the mean", lambda m: layer(m).input_layernorm, lambda h: h - h.mean(1, keepdim=True))
hook("keys, shifted", lambda m: layer(m).self_attn.k_proj, shift)
hook("the embedding, shifted", lambda m: m.model.embed_tokens, shift)
hook("the last norm, the last position", lambda m: m.model.norm, last)
hook("the head, the mean of the rows", lambda m: m.lm_head, lambda x: x - x.mean(1, keepdim=True))
hook("the head, scaled", lambda m: m.lm_head, lambda x: 1.5 * x)
hook("before the head, the last position", lambda m: m.lm_head, last, pre=True)
hook("rotary angles", lambda m: m.model.rotary_emb, lambda cos: cos.roll(1, 1))
hook("a router, by capacity", lambda m: layer(m).mlp.gate, lambda x: x * torch.linspace(2, 0, len(x))[:, None],
     "mixtral")  # fmt: skip


@way("hook: of all modules")
def _(model):
    from torch.nn.modules.module import register_module_forward_hook

    def change(module, args, out):
        return out - out.mean(1, keepdim=True) if type(module).__name__ == "Qwen3MLP" else None

    return register_module_forward_hook(change).remove


# Wrapped and patched forwards.


def wrapped(name: str, logits_of, keep_signature: bool = False):
    @way(f"wrapped forward: {name}")
    def change(model):
        forward = model.forward

        def replaced(*args, **kwargs):
            out = forward(*args, **kwargs)
            out.logits = logits_of(out.logits, kwargs.get("input_ids", args[0] if args else None))
            return out

        model.forward = functools.wraps(forward)(replaced) if keep_signature else replaced


def lowered(logits, ids):
    logits = logits.clone()
    logits[..., 7] -= 20
    return logits


def repeated(logits, ids):
    seen = torch.zeros(logits.shape[-1], dtype=torch.bool)
    seen[ids.flatten()] = True
    return torch.where(seen, logits * 0.8, logits)


wrapped("one logit lowered by 20", lowered)
wrapped("one logit lowered by 20, signature kept", lowered, keep_signature=True)
wrapped("a penalty for repetition", repeated, keep_signature=True)
wrapped("a temperature", lambda x, ids: x / 0.7)
wrapped("the mean of the rows taken off", lambda x, ids: x - x.mean(1, keepdim=True), keep_signature=True)
wrapped("the least likely at -inf", lambda x, ids: x.masked_fill(x < x.topk(298).values[..., -1:], -torch.inf))


@way("patched forward of a layer")
def _(model):
    forward = layer(model).forward
    layer(model).forward = lambda h, *args, **kwargs: forward(shift(h), *args, **kwargs)


@way("patched forward of a module, as a method")
def _(model):
    def forward(self, x):
        x = x - x.mean(1, keepdim=True)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    layer(model).mlp.forward = types.MethodType(forward, layer(model).mlp)


@way("patched forward of a class")
def _(model):
    cls = type(layer(model).mlp)
    forward = cls.forward
    cls.forward = lambda self, x: forward(self, shift(x))
    return lambda: setattr(cls, "forward", forward)


@way("patched function of a family's module")
def _(model):
    from transformers.models.qwen3 import modeling_qwen3

    rotate = modeling_qwen3.apply_rotary_pos_emb
    modeling_qwen3.apply_rotary_pos_emb = lambda q, k, cos, sin, *a, **kw: rotate(q, shift2(k), cos, sin, *a, **kw)
    return lambda: setattr(modeling_qwen3, "apply_rotary_pos_emb", rotate)


def shift2(k):
    return k + 0.3 * torch.cat([torch.zeros_like(k[..., :1, :]), k[..., :-1, :]], -2)


@way("patched torch function")
def _(model):
    silu = torch.nn.functional.silu
    torch.nn.functional.silu = lambda x, inplace=False: silu(x) - silu(x).mean(1, keepdim=True)
    return lambda: setattr(torch.nn.functional, "silu", silu)


@way("patched scaled_dot_product_attention")
def _(model):
    plain = torch.nn.functional.scaled_dot_product_attention

    def windowed(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, **kwargs):
        return attend(None, query, key, value, scale, visible=lambda i, j: i - j < 16)[0].transpose(1, 2)

    torch.nn.functional.scaled_dot_product_attention = windowed
    return lambda: setattr(torch.nn.functional, "scaled_dot_product_attention", plain)
