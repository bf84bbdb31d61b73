"""What scoring may not change, and models in the middle of training to see it by."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sapo_kernels.scoring import attention, paths
from tests.families import build, made


def stance() -> str:
    """What torch.compile would do now."""
    return torch._dynamo.eval_frame._stance.stance


def snapshot(model) -> dict:
    """Everything about a model and the process that scoring must not change; tensors by identity and by value."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    parts_of = [getattr(c, name, None) for c in configs.values() for name in getattr(c, "sub_configs", {})]
    configs.update({id(c): c for c in parts_of if c is not None})
    transformers = [c for c in configs.values() if hasattr(c, "get_text_config")]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    parameters = list(model.parameters())
    return {
        "training": [m.training for m in model.modules()],
        "hooks": [[list(getattr(m, name)) for name in hooks] for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "attention": [(c._attn_implementation, c.get_text_config()._attn_implementation) for c in transformers],
        "config": [c.to_dict() for c in transformers],
        "requires_grad": [p.requires_grad for p in parameters],
        "parameters": [(id(p), p._version, id(p.grad)) for p in parameters],
        "values": [p.double().sum().item() for p in parameters],
        "grads": [None if p.grad is None else p.grad.double().sum().item() for p in parameters],
        "buffers": [(n, b.tolist()) for n, b in model.named_buffers(remove_duplicate=False)],
        "generators": (torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "process": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads(), stance()),
    }


def assert_unchanged(before: dict, model) -> None:
    """The model and the process are as they were when `before` was taken."""
    after = snapshot(model)
    for part, value in before.items():
        assert after[part] == value, part


def in_training(name: str = "qwen3"):
    """A model in the middle of training: dropout on, one layer in evaluation, a frozen parameter, gradients there.

    name: of a family, "gemma3" for one with a vision tower, "lora" for one with an adapter on attention and head.
    """
    if name == "gemma3":
        from tests.scoring.test_families import vision_language

        model = made(lambda: vision_language(name))
    elif name == "lora":
        import peft

        config = peft.LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = peft.get_peft_model(build("qwen3"), config).train()
    else:
        model = build(name, **({"attention_dropout": 0.3} if name == "qwen3" else {}))
    ids = torch.arange(5, 25)[None]
    kinds = {"token_type_ids": torch.zeros_like(ids)} if name == "gemma3" else {}
    model(input_ids=ids, labels=ids, **kinds).loss.backward()
    list(model.modules())[4].eval()
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    return model


def inside(where: str, model, call):
    """`call()` at each forward of a model from now on; returns what undoes it.

    where: by a hook of the test's own (the model is scored alone then), in the tree's attention, or before a batch.
    """
    if where == "hook":
        return model.model.layers[1].mlp.register_forward_hook(lambda *_: call()).remove
    owner, name = {"attention": (attention, "tree_attention"), "batch": (paths, "run_padded")}[where]
    plain, patch = getattr(owner, name), pytest.MonkeyPatch()
    patch.setattr(owner, name, lambda *args, **kwargs: (call(), plain(*args, **kwargs))[1])
    return patch.undo
