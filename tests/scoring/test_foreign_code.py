"""Whose code runs in a model's forward: the user's own is found behind any wrapper, that of libraries is let be."""

from __future__ import annotations

import functools

import pytest
import torch

from sapo_kernels.scoring import fingerprint, foreign_code
from tests.families import build

pytest.importorskip("transformers")


@functools.wraps(torch.nn.functional.silu)
def disguised(x):
    return x


class Callable:
    def __call__(self, module, args, out):
        return out


@pytest.mark.parametrize(
    "code",
    [
        lambda *a: None, disguised, functools.partial(disguised), functools.partial(functools.partial, disguised),
        Callable(), Callable().__call__, torch.no_grad()(lambda *a: None), torch.compile(disguised, backend="eager"),
        print, torch.autocast("cpu")(disguised),
    ],
)  # fmt: skip
def test_code_of_the_users_own_is_found_behind_any_wrapper(code):
    model = build("qwen3")
    model.model.layers[1].mlp.register_forward_hook(code)
    assert "a forward hook of 'model.layers.1.mlp'" in foreign_code.foreign_code(model, [])


def test_code_of_libraries_is_not_foreign():
    accelerate, peft = pytest.importorskip("accelerate"), pytest.importorskip("peft")
    model = build("qwen3")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    accelerate.hooks.add_hook_to_module(model.model.layers[0], accelerate.hooks.ModelHook())
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    inner = model.get_base_model()
    assert foreign_code.foreign_code(model, fingerprint.configurations(model)) is None
    inner.lm_head = torch.nn.utils.parametrizations.weight_norm(inner.lm_head)
    assert foreign_code.foreign_code(model, []) is None

    class Own(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return output

    accelerate.hooks.add_hook_to_module(inner.model.layers[1], accelerate.hooks.ModelHook())
    accelerate.hooks.add_hook_to_module(inner.model.layers[1], Own(), append=True)
    assert "accelerate's hook of 'base_model.model.model.layers.1'" in foreign_code.foreign_code(model, [])
