"""The model is left as it was, also after an exception; low precision and autocast cost no accuracy."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

import sapo_kernels as sk
from tests.families import TOLERANCE, build, cells, per_token_error, plain_nll
from tests.scoring.snapshots import assert_unchanged, in_training, inside, snapshot

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("name", "impl"),
    [("qwen3", "tree"), ("qwen3", "padded"), ("lora", "tree"), ("mixtral", "tree"), ("gemma3", "tree"),
     ("dbrx", "tree"), ("mamba2", "auto"), ("bloom", "auto")],
)  # fmt: skip
def test_left_as_it_was(name, impl, cache):
    model = in_training(name)
    plain = plain_nll(model, cache)
    for grad in (True, False):  # verified for the first time, and again
        with torch.set_grad_enabled(grad):
            before = snapshot(model)
            scores = sk.score_prompts(model, cache, impl=impl, max_tokens=200)
            assert_unchanged(before, model)
            assert not scores.nll.requires_grad and per_token_error(scores, plain) < TOLERANCE
    assert torch.equal(plain_nll(model, cache), plain)


@pytest.mark.parametrize("where", ["hook", "attention", "batch"])
@pytest.mark.parametrize(("error", "at"), [(KeyboardInterrupt, 3), (RuntimeError("broken"), 1)], ids=repr)
def test_an_exception_restores_everything(error, at, where, cache):
    model = in_training("qwen3")
    plain, before = plain_nll(model, cache), snapshot(model)
    left = [at]

    def count():
        left[0] -= 1
        if left[0] == 0:
            raise error

    undo = inside(where, model, count)
    during = snapshot(model)
    impl = "padded" if where == "batch" else "auto"
    try:
        if isinstance(error, type) or where == "hook":
            with pytest.raises(error if isinstance(error, type) else RuntimeError):
                sk.score_prompts(model, cache, impl=impl, max_tokens=48)
        else:  # the next path is taken
            scores = sk.score_prompts(model, cache, impl=impl, max_tokens=48)
            assert "broken" in scores.stats["reason"]
    finally:
        assert_unchanged(during, model)
        undo()
    assert_unchanged(before, model)
    scores = sk.score_prompts(model, cache, impl=impl)
    assert scores.stats["path"] == ("padded" if where == "batch" else "tree")
    assert per_token_error(scores, plain) < TOLERANCE


def exact_copy(model):
    """The same weights in float64; torch has no grouped product of experts in that type."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    return exact


def assert_no_worse(name: str, paths, dtype=torch.float32, autocast=contextlib.nullcontext):
    """Mean error per token against float64: at most 1.5 times the plain forward's own, plus 1e-3 nats.

    Over two models: one expert routed otherwise after rounding moves the mean of a single one by half.
    """
    own, errors = [], {path: [] for path in paths}
    for seed in range(2):
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
    assert max(means.values()) <= 1.5 * plain + 1e-3, (plain, means)


TREE_PATHS = (("auto", 4096, "tree"), ("tree", 24, "tree"), ("padded", 200, "padded"))
LOW_CASES = [
    *((name, "bfloat16", TREE_PATHS) for name in ("llama-tied", "gemma2", "gpt_oss", "deepseek_v3", "gpt2", "phi")),
    # As the trainer runs fp32 weights: rotary embeddings leave q and k in fp32 there, v is bf16.
    *((name, "autocast", TREE_PATHS) for name in ("qwen3", "gemma3_text", "deepseek_v3")),
    *((name, "float16", TREE_PATHS) for name in ("qwen3", "gpt_oss")),
    ("mamba2", "bfloat16", (("auto", 200, "padded"),)),
]


@pytest.mark.parametrize(("name", "dtype", "paths"), LOW_CASES, ids=[f"{n}-{d}" for n, d, _ in LOW_CASES])
def test_low_precision_is_as_good_as_the_plain_forward(name, dtype, paths):
    if dtype == "autocast":
        assert_no_worse(name, paths, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    else:
        assert_no_worse(name, paths, getattr(torch, dtype))


@pytest.mark.parametrize(("name", "scored"), [("qwen3", True), ("gpt2", False), ("granite_swa", False)])
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


def _no_compiler(graph, inputs):
    raise AssertionError("scoring compiled something")


def offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.device.type == "meta"
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend=_no_compiler),
    "compiled in place": lambda model: (model.compile(backend=_no_compiler), model)[1],
    "data parallel": torch.nn.DataParallel,
    "offloaded": offloaded,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(wrapper, cache):
    plain = plain_nll(build("qwen3"), cache)
    model = WRAPPERS[wrapper](build("qwen3"))
    for impl in ("tree", "padded"):
        assert per_token_error(sk.score_prompts(model, cache, impl=impl), plain) < TOLERANCE


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_float64(name, cache):
    model = exact_copy(build(name))
    plain = plain_nll(model, cache)
    for impl, max_tokens in (("tree", 24), ("padded", 200)):
        # Norms, rotary angles and routers compute in float32 in every dtype.
        assert per_token_error(sk.score_prompts(model, cache, impl=impl, max_tokens=max_tokens), plain) < 1e-6
