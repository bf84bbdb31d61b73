"""The model is left as it was, also after an exception and by threads; low precision costs no accuracy."""

from __future__ import annotations

import contextlib
import copy
import random
import threading

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.scoring import attention, paths
from tests.families import TOLERANCE, build, cells, made, per_token_error, plain_nll
from tests.oracles import small_qwen3
from tests.scoring.test_families import vision_language
from tests.scoring.test_score import assert_right, few

pytest.importorskip("transformers")


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


class Paused:
    """A thread that scores and stops inside the model's forward until it is let go."""

    def __init__(self, model, cache, where):
        self.inside, self.go = threading.Event(), threading.Event()
        self.result = self.error = None
        self.impl = "padded" if where == "batch" else "auto"
        self.thread = threading.Thread(target=self._run, args=(model, cache), daemon=True)
        self.undo = inside(where, model, self._pause)

    def _pause(self):
        if threading.current_thread() is self.thread:
            self.inside.set()
            assert self.go.wait(60)

    def _run(self, model, cache):
        try:
            self.result = sk.score_prompts(model, cache, impl=self.impl)
        except BaseException as error:  # handed to the test
            self.error = error

    def __enter__(self):
        self.thread.start()
        assert self.inside.wait(60)
        return self

    def __exit__(self, *_):
        self.go.set()
        self.thread.join(60)
        self.undo()
        assert not self.thread.is_alive()


@pytest.mark.parametrize("where", ["hook", "attention"])
def test_two_threads_score_two_models(where):
    """Interleaved in the worst way: both inside at once, the first to begin ends first."""
    models, caches = (
        [small_qwen3(seed=s) for s in (0, 1)],
        [few(5), few(6)],
    )
    before = [snapshot(model) for model in models]
    with Paused(models[0], caches[0], where) as first, Paused(models[1], caches[1], where) as second:
        # The patches are undone in the reverse order.
        first.go.set()
        first.thread.join(60)
    assert stance() == "default", "torch.compile works again afterwards"
    for model, cache, was, paused in zip(models, caches, before, (first, second), strict=True):
        assert paused.error is None
        assert_right(model, cache, paused.result)
        assert_unchanged(was, model)


@pytest.mark.parametrize("where", ["attention", "batch"])
def test_a_model_that_is_being_scored_cannot_be_used(tiny_model, where):
    """By another thread: a forward or a second scoring raises instead of giving or causing a wrong number."""
    cache, ids = few(7), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        plain = tiny_model(input_ids=ids).logits
    before = snapshot(tiny_model)
    with Paused(tiny_model, cache, where) as paused:
        with pytest.raises(RuntimeError, match="being scored by another thread"), torch.no_grad():
            tiny_model(input_ids=ids)
        with pytest.raises(RuntimeError, match="being scored"):
            sk.score_prompts(tiny_model, few(8), impl=paused.impl)
    assert paused.error is None
    assert_right(tiny_model, cache, paused.result)
    assert_unchanged(before, tiny_model)
    with torch.no_grad():
        assert torch.equal(tiny_model(input_ids=ids).logits, plain)
    assert_right(tiny_model, cache, sk.score_prompts(tiny_model, cache, impl=paused.impl))


@pytest.mark.parametrize("where", ["an MLP", "the head"])
@pytest.mark.parametrize("fresh", [False, True])
def test_observers_of_a_quantisation_see_no_scoring(where, fresh):
    """A fresh one has buffers of another size afterwards."""
    model, quantization = build("llama"), torch.ao.quantization
    observer = quantization.FakeQuantize(quantization.MovingAveragePerChannelMinMaxObserver, ch_axis=2)
    owner, name = (model, "lm_head") if where == "the head" else (model.model.layers[0].mlp, "up_proj")
    setattr(owner, name, torch.nn.Sequential(getattr(owner, name), observer))
    if not fresh:
        model(torch.arange(3, 20)[None])
    before = copy.deepcopy(observer.state_dict())
    scores = sk.score_prompts(model, cells(), max_tokens=64)
    after = observer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert scores.stats["path"] == "alone" and scores.nll.isfinite().all()
