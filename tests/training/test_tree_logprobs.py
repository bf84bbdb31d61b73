"""tree_logprobs: values and gradients of the plain model on each sequence alone, or a refusal that says why."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

import sapo_kernels as sk
from sapo_kernels.training import tree_logprobs
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
    # A head in float32 over layers in low precision, as bitsandbytes computes: nothing outside of the layers tells.
    model = lora()
    for layer in model.get_base_model().model.layers:
        layer.forward = torch.autocast("cpu", dtype=torch.bfloat16)(layer.forward)
    assert 1e-4 < (sk.tree_logprobs(model, BATCH) - alone(model)).abs().max() < 0.1


def pooled(mlp):
    """A layer of torch's own that looks at neighbours in the batch."""
    return nn.Sequential(mlp, nn.AvgPool2d((3, 1), stride=1, padding=(1, 0)))


def noisy(model):
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)


def normed(mlp):
    return nn.Sequential(mlp, nn.Unflatten(1, (1, -1)), nn.BatchNorm2d(1), nn.Flatten(1, 2))


def everywhere(*args):
    """A backward hook of all modules."""


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda m: m.model.layers[0].register_forward_hook(lambda *a: None), "is not code of a known library"),
        (lambda m: m.lm_head.register_full_backward_hook(everywhere), "a backward hook of 'lm_head'"),
        (lambda m: m.lm_head.register_full_backward_pre_hook(everywhere), "a backward hook of 'lm_head'"),
        (noisy, "neftune_noise_alpha"),
        (lambda m: setattr(m.model.layers[1], "mlp", normed(m.model.layers[1].mlp)), "the batch norm 'model.layers.1"),
        (
            lambda m: setattr(m.model.layers[1], "mlp", pooled(m.model.layers[1].mlp)),
            "from those on padded rows",
        ),
        (lambda m: m.model.layers[0].compile(), "it is compiled"),
        (lambda m: setattr(m.config, "attention_dropout", 0.1), "its attention has a dropout of 0.1"),
        (lambda m: m.model.embed_tokens.weight.data.fill_(float("nan")), "not finite"),
    ],
    ids=["hook", "backward", "before backward", "noise", "batch norm", "leak", "compiled", "dropout", "nan"],
)
def test_a_model_that_differs_over_a_trie_is_refused_by_name(change, why):
    model = small_qwen3().train()
    change(model)
    with pytest.raises(RuntimeError, match=f"expected one that can be run over a trie: .*{why}"):
        sk.tree_logprobs(model, BATCH)


@pytest.mark.parametrize("hooks", ["_global_backward_hooks", "_global_backward_pre_hooks"])
def test_a_backward_hook_that_comes_later_is_seen(monkeypatch, hooks):
    model = lora()
    sk.tree_logprobs(model, BATCH)
    monkeypatch.setitem(getattr(nn.modules.module, hooks), 0, everywhere)
    with pytest.raises(RuntimeError, match="a backward hook of all modules"):
        sk.tree_logprobs(model, BATCH)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("kind", ["batch_average", "batch_average_once"])
def test_layers_that_look_at_the_batch_in_training_only(kind, fresh):
    """VeLoRA: gradients along the mean of a batch, unseen while the other half of the LoRA is zero."""
    velora = pytest.importorskip("peft.tuners.lora.config")
    if not hasattr(velora, "VeloraConfig"):
        pytest.skip("this PEFT has no VeLoRA")
    options = dict(r=4, target_modules=["q_proj"], init_lora_weights=fresh)
    config = LoraConfig(**options, velora_config=velora.VeloraConfig(num_groups=8, init_type=kind))
    model = get_peft_model(small_qwen3(), config).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="its gradients over the trie differ"):
        sk.tree_logprobs(model, BATCH)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(v for m in model.modules() for v in getattr(m, "lora_velora_initialized", {}).values())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_dropout_of_functions_and_modules_is_no_difference():
    """OPT calls the function, PEFT the module."""
    model = build("opt", dropout=0.3)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.3)).train()
    drawn = torch.get_rng_state()
    one, two = (sk.tree_logprobs(model, BATCH) for _ in range(2))
    assert (one - two).abs().max() > 1e-3, "it is drawn"
    torch.set_rng_state(drawn)
    assert torch.equal(sk.tree_logprobs(model, BATCH, verify=False), one), "and not by the comparison"


def test_longer_sequences_are_compared_again(monkeypatch):
    """A window that is in the model's own mask alone: nothing shows it below its length."""
    model = build("qwen2_moe", use_sliding_window=True, sliding_window=40, layer_types=["sliding_attention"] * 3)
    compared = []
    own = tree_logprobs.differs
    monkeypatch.setattr(tree_logprobs, "differs", lambda *args: compared.append(args[2].longest) or own(*args))
    for length in (8, 9, 10, 12, 20, 30, 9):
        batch = sk.TrieBatch.pack([[*range(5, 5 + length - 2)]], [[7, 8]])
        assert (sk.tree_logprobs(model, batch) - alone(model, batch.sequences())).abs().max() < 2e-5
    assert compared == [10, 15, 25, 37]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="differ from those on padded rows"):
            sk.tree_logprobs(model, sk.TrieBatch.pack([[*range(5, 50)]], [[7, 8]]))
    assert len(compared) == 5 and len(sk.tree_logprobs(model, batch)) == 2


def test_what_cannot_be_a_batch_or_a_model():
    with pytest.raises(ValueError, match="sequence 1: token ids must be below the model's vocabulary of .* got 99999"):
        sk.tree_logprobs(lora(), sk.TrieBatch.pack([[1, 2], [1, 2]], [[3], [99999]]))
    with pytest.raises(TypeError, match="batch: expected a TrieBatch, a ResponseCache or a padded batch, got list"):
        sk.tree_logprobs(small_qwen3(), [1, 2])
    for family in ("mamba", "rwkv"):
        with pytest.raises(RuntimeError, match="state|attention"):
            sk.tree_logprobs(build(family), BATCH)


def test_right_values_with_wrong_gradients_are_refused(monkeypatch):
    """Twice the gradients of the same losses: what a wrong backward pass would give."""

    def doubled(*given):
        found = logprobs_of(*given)
        return 2 * found - found.detach()

    monkeypatch.setattr("sapo_kernels.training.tree_logprobs.logprobs_of", doubled)
    with pytest.raises(RuntimeError, match="its gradients over the trie differ from those on padded rows by 1 of"):
        sk.tree_logprobs(lora(), BATCH)
