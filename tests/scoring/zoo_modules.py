"""More of the zoo: modules of other kinds, settings that change after loading, code behind what looks harmless."""

from __future__ import annotations

import torch
from torch import nn

from tests.scoring.zoo import layer, shift, shift2, way

# Modules of other kinds.


class Leak(nn.Module):
    def __init__(self, inner, mix):
        super().__init__()
        self.inner, self.mix = inner, mix

    def forward(self, hidden):
        return self.inner(hidden) + self.mix(hidden)


def running_mean(h):
    return h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None]


for name, mix in {
    "a running mean": running_mean,
    "the mean of the sequence": lambda h: h.mean(1, keepdim=True).expand_as(h),
    "the mean of the batch": lambda h: h.mean(0, keepdim=True).expand_as(h),
    "the last token": lambda h: h[:, -1:].expand_as(h),
}.items():

    @way(f"module: {name}")
    def _(model, mix=mix):
        layer(model).mlp = Leak(layer(model).mlp, mix)


@way("module: a convolution over the sequence of torch's own")
def _(model):
    width = model.config.hidden_size
    mix = nn.Conv1d(width, width, 3, padding=1)
    layer(model).mlp = nn.Sequential(layer(model).mlp, Transposed(), mix, Transposed())


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@way("module: a pooling of torch's own, nothing foreign")
def _(model):
    layer(model).mlp = nn.Sequential(layer(model).mlp, nn.AvgPool2d((3, 1), stride=1, padding=(1, 0)))


# Configurations and attributes that change after loading.


@way("config: a window after loading", "mistral", sliding_window=None)
def _(model):
    model.config.sliding_window = 16


@way("config: no window after loading", "mistral", sliding_window=16)
def _(model):
    model.config.sliding_window = None


@way("config: a smaller window after loading", "gemma2")
def _(model):
    model.config.sliding_window = 5


@way("config: another softcap", "gemma2")
def _(model):
    model.config.final_logit_softcapping = 1.0


@way("config: other experts", "mixtral")
def _(model):
    model.config.num_experts_per_tok = 1
    for one in model.model.layers:
        one.mlp.gate.top_k = 1


@way("config: eager attention")
def _(model):
    model.config._attn_implementation = "eager"


@way("attribute: not causal")
def _(model):
    for one in model.model.layers:
        one.self_attn.is_causal = False


@way("attribute: a window of one layer", "mistral", sliding_window=None)
def _(model):
    layer(model).self_attn.sliding_window = 16


@way("attribute: scaling")
def _(model):
    layer(model).self_attn.scaling *= 2


@way("attribute: frequencies")
def _(model):
    model.model.rotary_emb.inv_freq *= 0.5


@way("attribute: a rope that grows")
def _(model):
    rope = model.model.rotary_emb
    rope.rope_type, rope.original_max_seq_len, rope.max_seq_len_cached = "dynamic", 32, 32
    rope.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    rope.config.max_position_embeddings = 32


@way("layers in another order")
def _(model):
    model.model.layers = nn.ModuleList(list(model.model.layers)[::-1])


@way("a layer twice")
def _(model):
    model.model.layers.append(model.model.layers[0])


# Compiled, quantised, adapted, and what does not repeat itself.


def eager(graph, inputs):
    return graph.forward


@way("compiled in place")
def _(model):
    model.compile(backend=eager)


@way("a compiled layer")
def _(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend=eager)


@way("int8 activations")
def _(model):
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


@way("a function mode")
def _(model):
    class Shifted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return shift(out) if func is torch.nn.functional.silu else out

    mode = Shifted()
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


@way("noise that never repeats")
def _(model):
    layer(model).mlp.register_forward_hook(lambda m, args, out: out + 0.1 * torch.randn_like(out))


@way("a counter")
def _(model):
    count = []
    layer(model).mlp.register_forward_hook(lambda m, args, out: (count.append(1), out * (1 + len(count) % 3))[1])


# Behind what looks harmless.


class Steering(nn.Module):
    """A hook that is a module."""

    def forward(self, module, args, out):
        return shift(out)


class Shifted(nn.Module):
    def forward(self, x):
        return shift(x)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return shift(x)


class Callable:
    def __call__(self, x):
        return shift(x)


@way("hidden: a hook that is a module")
def _(model):
    layer(model).mlp.register_forward_hook(Steering())


@way("hidden: a bound method of another module")
def _(model):
    layer(model).mlp.forward = Shifted().__call__


@way("hidden: an autograd function")
def _(model):
    layer(model).input_layernorm.forward = Function.apply


@way("hidden: a module that is not registered")
def _(model):
    del layer(model).mlp._modules["down_proj"]
    layer(model).mlp.__dict__["down_proj"] = nn.Sequential(nn.Linear(48, 32), Shifted())


@way("hidden: a forward under accelerate's hook")
def _(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    norm = layer(model).mlp.up_proj
    forward = norm.forward
    norm.forward = lambda x: forward(shift(x))
    add_hook_to_module(norm, ModelHook())


@way("hidden: accelerate's hook with a function of its own")
def _(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    own = ModelHook()
    own.post_forward = lambda module, output: shift(output)
    add_hook_to_module(layer(model).mlp, own)


@way("hidden: a callable that is no function")
def _(model):
    layer(model).input_layernorm.forward = torch.compiler.disable(Callable())


@way("hidden: a compiled script")
def _(model):
    import io

    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Shifted(), torch.ones(1, 5, 32)), file)
    layer(model).mlp = torch.jit.load(io.BytesIO(file.getvalue()))


@way("hidden: a function two calls deep")
def _(model):
    from transformers.models.qwen3 import modeling_qwen3

    rotate = modeling_qwen3.rotate_half
    modeling_qwen3.rotate_half = lambda x: shift2(rotate(x))
    return lambda: setattr(modeling_qwen3, "rotate_half", rotate)


@way("hidden: a torch function that norms call")
def _(model):
    plain = torch.rsqrt
    torch.rsqrt = lambda x: shift(plain(x)) if x.dim() == 3 else plain(x)
    return lambda: setattr(torch, "rsqrt", plain)


@way("hidden: a parameter of another class")
def _(model):
    class Leaky(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **(kwargs or {}))
            return shift(out) if func is torch.nn.functional.linear else out

    linear = layer(model).mlp.up_proj
    linear._parameters["weight"] = linear.weight.detach().as_subclass(Leaky)


@way("hidden: a dispatch mode")
def _(model):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return shift(out) if func is torch.ops.aten.silu.default and out.dim() == 3 else out

    mode = Mode()
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


@way("hidden: how torch calls modules")
def _(model):
    plain = nn.Module._call_impl

    def called(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        return shift(out) if type(self).__name__ == "Qwen3MLP" else out

    nn.Module._call_impl = called
    return lambda: setattr(nn.Module, "_call_impl", plain)


@way("layers of torch's own that look back")
def _(model):
    back = nn.Sequential(nn.ZeroPad2d((0, 0, 2, 0)), nn.AvgPool2d((3, 1), stride=1))
    layer(model).mlp = nn.Sequential(layer(model).mlp, back)
