"""The model is left as it was, also after an exception; low precision and autocast cost no accuracy."""

from __future__ import annotations

import contextlib
import copy
import random

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from tests.families import build, cells, made, per_token_error, plain_nll
from tests.scoring.test_families import vision_language
from tests.tolerances import TOLERANCES

pytest.importorskip("transformers")

TOLERANCE = TOLERANCES["token nll"].atol


@pytest.fixture(scope="module")
def cache():
    return cells()


def snapshot(model) -> dict:
    """Everything about a model and the process that scoring must not change; tensors by identity and by value."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    parts_of = [getattr(c, name, None) for c in configs.values() for name in c.sub_configs]
    configs.update({id(c): c for c in parts_of if c is not None})
    parts = {
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()],
        "attention": [(c._attn_implementation, c.get_text_config()._attn_implementation) for c in configs.values()],
        "config": [c.to_dict() for c in configs.values()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "generators": (torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "process": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads()),
        "buffers": [(n, b.tolist()) for n, b in model.named_buffers(remove_duplicate=False)],
    }
    parts["parameters"] = [(id(p), p._version, id(p.grad)) for p in model.parameters()]
    parts["grads"] = [None if p.grad is None else p.grad.double().sum().item() for p in model.parameters()]
    return parts


def in_training(name: str = "qwen3"):
    """A model in the middle of training: one layer kept in evaluation, one parameter frozen, gradients present."""
    model = made(lambda: vision_language(name)) if name == "gemma3" else build(name)
    ids = torch.arange(5, 25)[None]
    kinds = {"token_type_ids": torch.zeros_like(ids)} if name == "gemma3" else {}
    model(input_ids=ids, labels=ids, **kinds).loss.backward()
    list(model.modules())[4].eval()
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("name", "impl"),
    [("qwen3", "tree"), ("qwen3", "padded"), ("gemma2", "tree"), ("gpt2", "tree"), ("mixtral", "tree"),
     ("gemma3", "tree"), ("dbrx", "tree"), ("mamba2", "auto"), ("bloom", "auto"), ("falcon_h1", "auto")],
)  # fmt: skip
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_left_as_it_was(name, impl, grad, cache):
    model = in_training(name)
    with torch.set_grad_enabled(grad):
        for _ in range(2):  # with the probe and without
            before = snapshot(model)
            scores = sk.score_prompts(model, cache, impl=impl, max_tokens=200)
            after = snapshot(model)
            assert not scores.nll.requires_grad
            for part, value in before.items():
                assert after[part] == value, part


class Bomb:
    """A forward that raises on its n-th call."""

    def __init__(self, forward, calls: int, error: BaseException):
        self.forward, self.calls, self.error = forward, calls, error

    def __call__(self, *args, **kwargs):
        self.calls -= 1
        if self.calls == 0:
            raise self.error
        return self.forward(*args, **kwargs)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt("boom")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("impl", ["tree", "padded"])
@pytest.mark.parametrize("probed", [True, False], ids=["later", "in the probe"])
def test_left_as_it_was_after_an_exception(impl, error, probed, cache, monkeypatch):
    model = in_training("gemma3")
    plain = plain_nll(model, cache)
    if probed:
        sk.score_prompts(model, cache, impl=impl)
    before = snapshot(model)
    layer = model.model.language_model.layers[1].mlp
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", Bomb(layer.forward, 3, error))
        with pytest.raises(type(error), match="boom"):
            sk.score_prompts(model, cache, impl=impl, max_tokens=24)
    after = snapshot(model)
    for part, value in before.items():
        assert after[part] == value, part
    assert per_token_error(sk.score_prompts(model, cache, impl=impl, max_tokens=24), plain) < TOLERANCE


def test_the_model_works_as_before_after_scoring(cache):
    model = build("gemma2").eval()
    ids = torch.arange(5, 45)[None]
    before = model(input_ids=ids).logits
    sk.score_prompts(model, cache)
    assert torch.equal(model(input_ids=ids).logits, before)


def exact_copy(model):
    """The same weights in float64; torch has no grouped product of experts in that type."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    return exact


def assert_no_worse(name: str, paths, dtype=torch.float32, autocast=contextlib.nullcontext):
    """Mean error per token against float64: at most 1.5 times the plain forward's own, plus 1e-3 nats.

    Over three models: one expert routed otherwise after rounding moves the mean of a single one by half.
    """
    own, errors = [], {path: [] for path in paths}
    for seed in range(3):
        model, cache = build(name, seed=seed, dtype=dtype), cells(seed)
        exact, tokens = plain_nll(exact_copy(model), cache), torch.from_numpy(cache.response_lengths)
        with autocast():
            own.append(float(((plain_nll(model, cache) - exact).abs() / tokens.view_as(exact)).mean()))
            for impl, max_tokens, path in paths:
                scores = sk.score_prompts(model, cache, impl=impl, max_tokens=max_tokens)
                assert scores.stats["path"] == path, scores.stats["reason"]
                error = float(((scores.nll - exact).abs() / scores.tokens).mean())
                errors[impl, max_tokens, path].append(error)
    plain = sum(own) / len(own)
    means = {f"{impl}@{size}": sum(e) / len(e) for (impl, size, _), e in errors.items()}
    text = ", ".join(f"{what} {error:.1e}" for what, error in {"plain": plain, **means}.items())
    print(f"\n  {name:14s} {text}", end="")
    assert max(means.values()) <= 1.5 * plain + 1e-3, text


TREE_PATHS = (("auto", 4096, "tree"), ("tree", 24, "tree"), ("padded", 200, "padded"))
PADDED_PATHS = (("auto", 200, "padded"),)


LOW = ["llama-tied", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2", "phi"]


@pytest.mark.parametrize("name", LOW)
def test_bfloat16_is_as_good_as_the_plain_forward(name):
    assert_no_worse(name, TREE_PATHS, torch.bfloat16)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss", "gpt2"])
def test_float16_is_as_good_as_the_plain_forward(name):
    assert_no_worse(name, TREE_PATHS, torch.float16)


@pytest.mark.parametrize("name", ["mamba2", "bloom"])
def test_bfloat16_on_the_padded_path(name):
    assert_no_worse(name, PADDED_PATHS, torch.bfloat16)


@pytest.mark.parametrize("name", LOW)
def test_autocast_is_as_good_as_the_plain_forward_under_autocast(name):
    """As the trainer runs fp32 weights: rotary embeddings leave q and k in fp32 there, v is bf16."""
    assert_no_worse(name, TREE_PATHS, autocast=lambda: torch.autocast("cpu", torch.bfloat16))


def test_autocast_and_plain_scoring_alternate(cache):
    """A verdict under autocast is not one without."""
    model = build("qwen3")
    plain = plain_nll(model, cache)
    with torch.autocast("cpu", torch.bfloat16):
        rough = sk.score_prompts(model, cache)
    assert per_token_error(rough, plain) > 10 * TOLERANCE
    assert per_token_error(sk.score_prompts(model, cache), plain) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "granite_swa", "mimo_v2_flash"])
@pytest.mark.parametrize("scored", [True, False], ids=["scored before", "not scored before"])
def test_forward_that_a_trainer_wrapped_in_autocast(name, scored, cache):
    """Accelerate replaces ``model.forward``: autocast is on inside, off outside, and the logits come out in fp32."""
    accelerate = pytest.importorskip("accelerate")
    model = build(name)
    exact = plain_nll(exact_copy(model), cache)
    if scored:
        assert per_token_error(sk.score_prompts(model, cache), exact) < TOLERANCE
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    own = float((plain_nll(model, cache) - exact).abs().mean())
    assert own > 1e-4
    for path in ("tree", "padded"):
        scores = sk.score_prompts(model, cache, impl=path)
        assert float((scores.nll - exact).abs().mean()) <= 1.5 * own + 1e-3


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend=_no_compiler),
    "compiled in place": lambda model: (model.compile(backend=_no_compiler), model)[1],
    "data parallel": torch.nn.DataParallel,
}


def _no_compiler(graph, inputs):
    raise AssertionError("scoring compiled something")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(wrapper, cache):
    plain = plain_nll(build("qwen3"), cache)
    model = WRAPPERS[wrapper](build("qwen3"))
    for impl in ("tree", "padded"):
        assert per_token_error(sk.score_prompts(model, cache, impl=impl), plain) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
def test_float64(name, cache):
    model = exact_copy(build(name))
    plain = plain_nll(model, cache)
    for impl, max_tokens in (("tree", 24), ("padded", 200)):
        # Norms, rotary angles and routers compute in float32 in every dtype.
        assert per_token_error(sk.score_prompts(model, cache, impl=impl, max_tokens=max_tokens), plain) < 1e-6
