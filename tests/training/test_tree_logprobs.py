"""tree_logprobs: values and gradients of the plain model on each sequence alone, or a refusal that says why."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import sapo_kernels as sk
from sapo_kernels.training.tree_logprobs import logprobs_of
from tests.families import TREE, build, cells
from tests.oracles import small_qwen3
from tests.training.test_trie_batch import padded

pytest.importorskip("transformers")

SEQUENCES = [
    ([*range(5, 25), 3, 4], [7, 8, 9]),
    ([*range(5, 25), 3, 4, 4], [7, 9]),
    ([*range(5, 25), 3, 4], [7, 8, 8, 30]),
    ([*range(5, 12)], [1]),
]
# Families whose gradients in float32 differ from those in float64 by more themselves.
ROUNDING = {"gemma4_text": 1e-4}
BATCH = sk.TrieBatch.pack(*zip(*SEQUENCES, strict=True))


def lora(model=None, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    return get_peft_model(small_qwen3() if model is None else model, config)


def alone(model, sequences=SEQUENCES) -> torch.Tensor:
    """Log-probabilities of the response tokens, one forward for each sequence."""
    found = []
    for context, response in sequences:
        ids = torch.tensor([context + response], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]
        found.append(torch.log_softmax(logits.float(), -1).gather(-1, ids[0, len(context) :, None])[:, 0])
    return torch.cat(found)


def gradients(model, loss) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.zeros_like(p) if g is None else g
            for p, g in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True)]  # fmt: skip


def apart(got, expected) -> float:
    """Largest difference of a parameter's gradient, relative to its norm, or to the whole where it is next to none."""
    whole = torch.stack([g.norm() for g in expected]).norm()
    return max(float((a - b).norm() / max(b.norm(), 1e-2 * whole)) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", ["cache", "batch", "padded"])
def test_values_and_gradients_are_those_of_each_sequence_alone(kind):
    model = lora()
    cache = sk.ResponseCache.from_token_ids([[c for c, _ in SEQUENCES]], [[r for _, r in SEQUENCES]])
    given = {"cache": cache, "batch": BATCH, "padded": padded(SEQUENCES, 40)}[kind]
    got, expected = sk.tree_logprobs(model, given), alone(model)
    assert got.dtype == torch.float32 and (got - expected).abs().max() < 2e-5
    weights = torch.linspace(-1, 2, len(got))
    assert apart(gradients(model, got @ weights), gradients(model, expected @ weights)) < 1e-5


@pytest.mark.parametrize("family", [family.name for family in TREE])
def test_every_gradient_of_every_family(family):
    """All parameters, sinks, embeddings and heads among them, and those of a LoRA; no attention or other dropout."""
    sequences = sk.TrieBatch.of_cache(cells(single=False)).sequences()
    batch = sk.TrieBatch.of_cache(cells(single=False))
    model = build(family).eval()
    models = [model] if family == "phimoe" else [model, lora(build(family)).eval()]  # PEFT cannot wrap its router
    for model in models:
        inner = sk.scoring.model_support.unwrap(model)[1]
        got, expected = logprobs_of(model, inner, batch), alone(model, sequences)
        assert (got - expected).abs().max() < 1e-4
        bound = ROUNDING.get(family, 2e-5)
        assert apart(gradients(model, got.sum()), gradients(model, expected.sum())) < bound


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_the_layers_again_over_the_same_trie(reentrant):
    model = lora().train()
    expected = gradients(model, alone(model).sum())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with pytest.raises(RuntimeError, match="runs its layers again during backward.*use_tree_attention"):
        sk.tree_logprobs(model, BATCH, verify=False)
    other = sk.TrieBatch.pack(*zip(*SEQUENCES[:2], strict=True))
    with sk.use_tree_attention(model):
        # Two graphs at once: each recomputation finds its own trie.
        first, second = (sk.tree_logprobs(model, batch, verify=False).sum() for batch in (BATCH, other))
        second.backward()
        model.zero_grad()
        first.backward()
    assert apart([p.grad for p in model.parameters() if p.requires_grad], expected) < 1e-5
    assert model.config._attn_implementation == "sdpa"


def test_other_batches_inside_keep_the_models_own_attention():
    model = lora().eval()
    expected = alone(model)
    with sk.use_tree_attention(model):
        assert torch.equal(alone(model), expected)
        assert (sk.tree_logprobs(model, BATCH) - expected).abs().max() < 2e-5
        plain = padded(SEQUENCES)
        loss = model(**plain).loss
    assert abs(float(loss + expected.mean())) < 2e-5


def test_the_same_bits_again_and_no_gradient_where_none_is_wanted():
    model = lora()
    one, two = (gradients(model, sk.tree_logprobs(model, BATCH).sum()) for _ in range(2))
    assert all(map(torch.equal, one, two))
    with torch.no_grad():
        assert not sk.tree_logprobs(model, BATCH).requires_grad


def test_several_adapters_and_autocast():
    model = lora()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for name in ("second", "default"):
        model.set_adapter(name)
        assert (sk.tree_logprobs(model, BATCH) - alone(model)).abs().max() < 2e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = sk.tree_logprobs(model, BATCH), alone(model)
    assert 0 < (got - expected).abs().max() < 0.1
    half = lora(small_qwen3().to(torch.bfloat16))
    assert (sk.tree_logprobs(half, BATCH) - alone(half)).abs().max() < 0.1


def pooled(mlp):
    """A layer of torch's own that looks at neighbours in the batch."""
    return nn.Sequential(mlp, nn.AvgPool2d((3, 1), stride=1, padding=(1, 0)))


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda m: m.model.layers[0].register_forward_hook(lambda *a: None), "is not code of a known library"),
        (
            lambda m: setattr(m.model.layers[1], "mlp", pooled(m.model.layers[1].mlp)),
            "from those on padded rows",
        ),
        (lambda m: m.model.layers[0].compile(), "it is compiled"),
        (lambda m: setattr(m.config, "attention_dropout", 0.1), "its attention has a dropout of 0.1"),
        (lambda m: m.model.embed_tokens.weight.data.fill_(float("nan")), "not finite"),
    ],
    ids=["hook", "leak", "compiled", "dropout", "nan"],
)
def test_a_model_that_differs_over_a_trie_is_refused_by_name(change, why):
    model = small_qwen3().train()
    change(model)
    with pytest.raises(RuntimeError, match=f"expected one that can be run over a trie: .*{why}"):
        sk.tree_logprobs(model, BATCH)


def test_right_values_with_wrong_gradients_are_refused(monkeypatch):
    """Twice the gradients of the same losses: what a wrong backward pass would give."""

    def doubled(*given):
        found = logprobs_of(*given)
        return 2 * found - found.detach()

    monkeypatch.setattr("sapo_kernels.training.tree_logprobs.logprobs_of", doubled)
    with pytest.raises(RuntimeError, match="its gradients over the trie differ from those on padded rows by 1 of"):
        sk.tree_logprobs(lora(), BATCH)


@pytest.mark.parametrize("family, why", [("mamba", "state|attention"), ("rwkv", "state|attention")])
def test_families_that_carry_state_are_refused(family, why):
    with pytest.raises(RuntimeError, match=why):
        sk.tree_logprobs(build(family), BATCH)


def test_what_is_no_batch():
    with pytest.raises(TypeError, match="batch: expected a TrieBatch, a ResponseCache or a padded batch, got list"):
        sk.tree_logprobs(small_qwen3(), [1, 2])
