"""Fused layers: what modules compute, bit for bit where nothing is summed in another order, and nothing left behind."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

import sapo_kernels as sk
from sapo_kernels.fused_layers import swap
from sapo_kernels.fused_layers.swap import agrees, fused_layers
from sapo_kernels.scoring import paths
from tests.families import REFUSED, TREE, build, per_token_error, plain_nll

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def logits(model: torch.nn.Module, tokens: int = 5) -> torch.Tensor:
    ids = torch.randint(5, 290, (1, tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def swapped(model: torch.nn.Module) -> set[str]:
    """Classes of the modules that have a forward of their own."""
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def fused_logits(model: torch.nn.Module) -> torch.Tensor:
    with fused_layers(model):
        return logits(model)


# One of each file of transformers' that has modules of its own.
FAMILIES = {family.model_type: family for family in [*REFUSED, *reversed(TREE)]}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_every_family_computes_the_same(family):
    model = build(family.name).eval().to(DEVICE)
    plain = logits(model)
    names = [set(vars(module)) for module in model.modules()]
    generator = torch.get_rng_state()
    found = fused_logits(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [set(vars(module)) for module in model.modules()] == names
    # The sum of squares alone is taken in another order.
    assert (found - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("llama", {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"}),
        ("qwen3", {"Qwen3RMSNorm", "Qwen3MLP", "Qwen3Attention"}),  # norms of q and k
        ("gemma2", {"Gemma2RMSNorm", "Gemma2MLP", "Gemma2Attention"}),  # 1 + weight, gelu
        ("olmo2", {"Olmo2RMSNorm", "Olmo2MLP", "Olmo2Attention"}),  # rounded after the product
        ("phi3", {"Phi3RMSNorm", "Phi3MLP", "Phi3Attention"}),  # one matrix for gate and up; q and k are slices
    ],
)
def test_half_precision_rounds_where_the_modules_round(name, classes):
    model = build(name).eval().half().to(DEVICE)
    swap._decided.clear()
    with fused_layers(model):
        assert swapped(model) == classes
        found = logits(model)
    assert swap._decided and None not in swap._decided.values()
    plain = logits(model)
    # A flipped last bit of a norm travels; where none flips everything is equal.
    assert (found - plain).abs().max() <= 4 * torch.finfo(torch.float16).eps * plain.abs().max()


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("gemma3n_text", "Gemma3nTextMLP"),  # keeps the largest activations only
        ("cohere", "CohereLayerNorm"),  # takes the mean away
    ],
)
def test_other_formulas_keep_their_own_forward(name, refused):
    model = build(name).eval().to(DEVICE)
    swap._decided.clear()
    fused_logits(model)
    assert None in [value for key, value in swap._decided.items() if getattr(key[0], "__name__", "") == refused]


def test_the_epsilon_of_each_module_counts():
    model = build("llama").eval().to(DEVICE)
    model.model.layers[1].input_layernorm.variance_epsilon *= 3
    model.model.embed_tokens.weight.data *= 1e-3
    plain = logits(model)
    assert (fused_logits(model) - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_patched_modules_keep_their_patches():
    model = build("llama").eval().to(DEVICE)
    layer = model.model.layers[0]
    calls = []
    for part in (layer.input_layernorm, layer.mlp, layer.self_attn):
        own = part.forward
        part.forward = lambda *args, own=own, part=part, **options: (calls.append(part), own(*args, **options))[1]
        patched = part.forward
        with fused_layers(model):
            assert part.forward is patched
            logits(model)
        assert part.forward is patched and part in calls


def test_adapters_and_hooks_take_part():
    peft = pytest.importorskip("peft")
    model = build("llama").eval().to(DEVICE)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["gate_proj", "down_proj", "q_proj"], init_lora_weights=False)
    ).eval()
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    plain = logits(adapted)
    with fused_layers(model):
        found = logits(adapted)
    handle.remove()
    assert len(seen) == 2 and (found - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_an_exception_leaves_the_model_as_it_was():
    model = build("qwen3").eval().to(DEVICE)
    state = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), fused_layers(model):
        assert swapped(model)
        raise KeyboardInterrupt
    assert [dict(vars(module)) for module in model.modules()] == state


@pytest.mark.parametrize(("name", "impl"), [("qwen3", "padded"), ("gemma3_text", "tree"), ("deepseek_v3", "tree")])
def test_scores_with_and_without(name, impl, monkeypatch):
    model, used = build(name).to(DEVICE), []
    cache = sk.ResponseCache.from_token_ids([[[5, 6, 7], [5, 8]], [[9, 5, 6], [9, 5]]], [[10, 11], [12, 13, 14]])
    # As on a GPU; the attention stays what a CPU takes.
    monkeypatch.setattr(paths, "resolve_impl", lambda *_: "triton")
    own = swap.kernels.rms_norm
    monkeypatch.setattr(swap.kernels, "rms_norm", lambda *args: (used.append(1), own(*args))[1])
    for fuse in ("auto", False):
        used.clear()
        scores = sk.score_prompts(model, cache, impl=impl, fuse=fuse)
        assert bool(used) == bool(fuse) and scores.stats["path"] == impl and not swapped(model)
        assert per_token_error(scores, plain_nll(model, cache)) < 1e-4


def test_agreement_sees_an_error_of_the_size_of_rounding():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))

    def own(x):
        return x.half().float() if x.dtype == torch.float32 else x

    assert agrees(lambda x: x + 0, lambda x: x * 1.0, x)
    assert not agrees(lambda x: x * (1 + 2e-6), lambda x: x * 1.0, x)
    assert not agrees(lambda x: x.double(), lambda x: x * 1.0, x)
    assert not agrees(own, lambda x: x * 1.0, x)
    # No element errs by more than a rounding does, and all err by as much.
    low, step = x.half(), 0.3 * torch.finfo(torch.float16).eps
    assert agrees(lambda x: (x.float() * 1.1).half(), lambda x: x * 1.1, low)
    assert not agrees(lambda x: (x.float() * 1.1 * (1 + step)).half(), lambda x: x * 1.1, low)
    assert not agrees(lambda x: 1 / 0, lambda x: x, x)
