"""The probe: models that no table knows are scored exactly or not on the tree road; its verdict is remembered."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import sapo_kernels as sk
from sapo_kernels.scoring import compatibility as probe
from sapo_kernels.scoring import model_support as support
from tests.families import build, cells, per_token_error, plain_nll
from tests.tolerances import TOLERANCES

transformers = pytest.importorskip("transformers")

TOLERANCE = TOLERANCES["token nll"].atol


@pytest.fixture(scope="module")
def cache():
    return cells()


class ScaledLlama(transformers.LlamaForCausalLM):
    """Multiplies its logits by 1.5 without telling anyone."""

    factor = 1.5

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        out = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        out.logits = out.logits * self.factor
        return out


class ShiftedLlama(ScaledLlama):
    """Adds another constant to the logit of each token: log-sum-exp and log-probability both move."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        out = transformers.LlamaForCausalLM.forward(self, input_ids, attention_mask, position_ids, **kwargs)
        out.logits = out.logits + torch.linspace(-2, 2, out.logits.shape[-1])
        return out


class OpaqueLlama(ScaledLlama):
    """The same behind a signature that says nothing."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Leak(nn.Module):
    """Passes the running mean of the hidden states along the sequence: causal, but a trie has no such order."""

    def __init__(self, inner: nn.Module, causal: bool):
        super().__init__()
        self.inner, self.causal = inner, causal

    def forward(self, hidden):
        if self.causal:
            count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
            return self.inner(hidden) + hidden.cumsum(1) / count
        return self.inner(hidden) + hidden.mean(1, keepdim=True)


def leaky(causal: bool = True):
    model = build("llama")
    model.model.layers[1].mlp = Leak(model.model.layers[1].mlp, causal)
    return model


def verdict_of(model) -> probe.Verdict:
    """The verdict on a model that was scored before."""
    model, inner = support.unwrap(model)
    return probe.verdict_for(model, inner, "auto", torch.device("cpu"))


def check(model, cache, *roads: tuple[str, int, str], plain=None) -> torch.Tensor:
    plain = plain_nll(model, cache) if plain is None else plain
    for impl, max_tokens, road in roads:
        scores = sk.score_prompts(model, cache, impl=impl, max_tokens=max_tokens)
        assert scores.stats["road"] == road, scores.stats["reason"]
        assert per_token_error(scores, plain) < TOLERANCE
    return plain


ROADS = (("auto", 4096, "tree"), ("tree", 24, "tree"), ("padded", 200, "padded"))


@pytest.mark.parametrize("cls", [ScaledLlama, ShiftedLlama])
def test_unknown_head_is_read_through_the_model(cls, cache):
    model = build("llama", cls=cls)
    plain = check(model, cache, *ROADS)
    assert verdict_of(model).through_model and verdict_of(model).tree_reason is None
    usual = build("llama")
    sk.score_prompts(usual, cache)
    assert not verdict_of(usual).through_model
    assert (plain - plain_nll(usual, cache)).abs().max() > 1


def test_unknown_head_behind_an_opaque_signature(cache):
    model = build("llama", cls=OpaqueLlama)
    for impl in ("auto", "padded"):
        assert per_token_error(sk.score_prompts(model, cache, impl=impl), plain_nll(model, cache)) < TOLERANCE


def test_hook_on_the_head_is_honoured(cache):
    """A module with hooks is called, not multiplied with."""
    model = build("qwen3")
    usual = plain_nll(model, cache)
    model.lm_head.register_forward_hook(lambda module, args, out: 1.5 * out)
    plain = check(model, cache, *ROADS)
    assert (plain - usual).abs().max() > 1


def test_head_that_changes_after_the_probe_is_noticed(cache, caplog):
    """Each pass compares its log-sum-exp with the model's own; a verdict that no longer holds costs a second run."""
    model = build("llama", cls=ScaledLlama)
    model.factor = 1.0
    check(model, cache, *ROADS)
    assert not verdict_of(model).through_model
    model.factor = 1.5
    with caplog.at_level(logging.WARNING, logger="sapo_kernels"):
        check(model, cache, *ROADS)
    assert caplog.text.count("scoring again through its own logits") == len(ROADS)


def test_state_along_the_sequence_closes_the_tree_road(cache, caplog):
    model = leaky()
    with caplog.at_level(logging.WARNING, logger="sapo_kernels"):
        check(model, cache, ("auto", 4096, "padded"), ("auto", 24, "padded"))
    assert "tree and plain forward differ" in caplog.text
    verdict = verdict_of(model)
    assert not verdict.alone and not verdict.through_model
    with pytest.raises(RuntimeError, match="impl='tree': LlamaForCausalLM: tree and plain forward differ by .* nats"):
        sk.score_prompts(model, cache, impl="tree")


def test_such_state_is_seen_in_bfloat16_too(cache):
    model = leaky().to(torch.bfloat16)
    assert sk.score_prompts(model, cache).stats["road"] == "padded"


def test_model_that_reads_its_padding_is_scored_without_any(cache):
    """Not causal at all: right only if every sequence is alone with others of its length."""
    model = leaky(causal=False)
    check(model, cache, ("auto", 4096, "padded"), ("padded", 200, "padded"))
    assert verdict_of(model).alone


def test_model_that_bypasses_its_head_is_an_error(cache):
    class Bypass(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            hidden = self.model(input_ids, attention_mask, position_ids).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)

    model = build("llama", cls=Bypass)
    with pytest.raises(RuntimeError, match="Bypass: .* cannot be scored"):
        sk.score_prompts(model, cache)


def test_attention_argument_that_a_trie_does_not_know(cache):
    """Here a bias by distance, which the model adds through an argument of its own."""
    model = build("qwen3")
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs, position_bias=torch.zeros(1))
    plain = plain_nll(model, cache)
    check(model, cache, ("auto", 24, "padded"), plain=plain)
    with pytest.raises(RuntimeError, match="its attention takes position_bias"):
        sk.score_prompts(model, cache, impl="tree")


def test_window_that_never_reaches_the_attention_call(cache):
    """A family that builds its window into the mask alone; the probe's sequences are too short to see it."""
    model = build("mistral", sliding_window=16)
    for layer in model.model.layers:
        layer.self_attn.forward = _without_window(layer.self_attn)
    check(model, cache, ("auto", 24, "padded"))
    with pytest.raises(RuntimeError, match="impl='tree': .* sliding window"):
        sk.score_prompts(model, cache, impl="tree")


def _without_window(attention):
    forward, config = attention.forward, attention.config

    def call(*args, **kwargs):
        if config._attn_implementation != "sapo_trie":
            return forward(*args, **kwargs)
        window, config.sliding_window = config.sliding_window, None
        try:
            return forward(*args, **kwargs)
        finally:
            config.sliding_window = window

    return call


class Count:
    """Counts the forwards of a model."""

    def __init__(self, model):
        self.forwards = 0
        model.register_forward_pre_hook(self.add)

    def add(self, module, args):
        self.forwards += 1

    def during(self, call) -> int:
        before = self.forwards
        call()
        return self.forwards - before


@pytest.mark.parametrize(
    "model", [lambda: build("qwen3"), leaky, lambda: build("bloom")], ids=["tree", "leak", "bloom"]
)
def test_verdict_is_remembered(model, cache):
    model = model()
    count = Count(model)
    first = count.during(lambda: sk.score_prompts(model, cache, max_tokens=64))
    again = [count.during(lambda: sk.score_prompts(model, cache, max_tokens=64)) for _ in range(2)]
    assert again[0] == again[1] < first
    if verdict_of(model).tree_reason is None:
        assert again[0] == len(cache.plan(64).passes)


def test_verdict_is_asked_again_when_the_model_is_used_differently(cache, monkeypatch):
    calls = []
    probed = probe._probe
    monkeypatch.setattr(probe, "_probe", lambda *args: calls.append(args) or probed(*args))

    def probes() -> int:
        before = len(calls)
        sk.score_prompts(model, cache)
        return len(calls) - before

    model = build("qwen3")
    assert [probes(), probes()] == [1, 0]
    with torch.autocast("cpu", torch.bfloat16):
        assert [probes(), probes()] == [1, 0]
    model.set_attn_implementation("eager")
    assert [probes(), probes()] == [1, 0]
    model.to(torch.bfloat16)
    assert [probes(), probes()] == [1, 0]


def test_verdict_dies_with_its_model(cache):
    import gc
    import weakref

    model = build("qwen3")
    sk.score_prompts(model, cache)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_nan_weights_are_not_remembered(cache):
    model = build("qwen3")
    good = model.lm_head.weight[7].clone()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    scores = sk.score_prompts(model, cache)
    assert scores.nonfinite == [0, 1, 2]
    with torch.no_grad():
        model.lm_head.weight[7] = good
    check(model, cache, *ROADS)
