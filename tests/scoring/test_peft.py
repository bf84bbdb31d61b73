"""PEFT: scores are those of the model with its adapters as they are: on, off, several, merged, on the head."""

from __future__ import annotations

import pytest
import torch

import sapo_kernels as sk
from tests import families
from tests.families import TOLERANCE, build, cells, per_token_error, plain_nll

peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def adapted(base, config, name: str = "default", seed: int = 1):
    """A PeftModel whose adapters do something: PEFT starts them as the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, config, adapter_name=name)
        stir(model, name)
    return model.train()


@torch.no_grad()
def stir(model, adapter: str) -> None:
    """Random values in every parameter of one adapter."""
    for name, parameter in model.named_parameters():
        if f".{adapter}" in name and "magnitude" not in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
        elif f".{adapter}" in name:
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))


def lora(targets=None, **options):
    """Rank 4 with dropout, which must not act."""
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "task_type": "CAUSAL_LM", "target_modules": targets}
    return peft.LoraConfig(**{**settings, **options})


def check(model, cache, base=None, *, path: str = "tree"):
    """Tree path with small and large passes and padded path; the adapter moves what `base` gives."""
    plain = families.check(model, cache, ("auto", 4096, path), ("auto", 24, path), ("padded", 200, "padded"))
    assert base is None or (plain - base).abs().max() > 0.05, "the adapter changes nothing, so this tests nothing"
    return plain


CONFIGS = {
    "attention and mlp": ("qwen3", lambda: lora(ATTENTION + MLP)),
    "all-linear": ("gemma2", lambda: lora("all-linear")),
    "rslora": ("llama", lambda: lora(ATTENTION, use_rslora=True)),
    "bias": ("qwen2", lambda: lora(ATTENTION, bias="all")),
    "dora": ("qwen3", lambda: lora(ATTENTION + MLP, use_dora=True)),
    "lm_head": ("qwen3", lambda: lora(["q_proj", "lm_head"])),
    "lm_head alone": ("qwen3", lambda: lora(["lm_head"])),
    "lm_head, tied": ("llama-tied", lambda: lora(["q_proj", "lm_head"])),
    "lm_head, dora": ("qwen3", lambda: lora(["q_proj", "lm_head"], use_dora=True)),
    "lm_head, scaled logits": ("granite", lambda: lora(["q_proj", "lm_head"])),
    "lm_head, soft-capped logits": ("gemma2", lambda: lora(["q_proj", "lm_head"])),
    "lm_head with bias": ("phi", lambda: lora(["q_proj", "lm_head"])),
    "embedding": ("qwen3", lambda: lora(["q_proj", "embed_tokens"])),
    "embedding, tied": ("llama-tied", lambda: lora(["q_proj", "embed_tokens"])),
    "head and embedding saved whole": ("qwen3", lambda: lora(ATTENTION, modules_to_save=["lm_head", "embed_tokens"])),
    "head saved whole, tied": ("llama-tied", lambda: lora(ATTENTION, modules_to_save=["lm_head"])),
    "trainable tokens": ("qwen3", lambda: lora(ATTENTION, trainable_token_indices=list(range(5, 60)))),
    "trainable tokens, tied": ("llama-tied", lambda: lora(ATTENTION, trainable_token_indices=list(range(5, 60)))),
    "conv1d": ("gpt2", lambda: lora(["c_attn", "c_proj"], fan_in_fan_out=True)),
    "expert parameters": ("mixtral", lambda: lora(
        ["q_proj"], target_parameters=["mlp.experts.gate_up_proj"], lora_dropout=0.0)),
    "ia3": ("qwen3", lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "loha": ("qwen3", lambda: peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=ATTENTION)),
    "oft": ("qwen3", lambda: peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=8, target_modules=["q_proj"])),
    "vera": ("qwen3", lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"])),
    "layernorm": ("qwen3", lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"])),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_an_adapter_on_and_off(what, cache):
    name, config = CONFIGS[what]
    base = build(name)
    base_nll = plain_nll(base, cache)
    model = adapted(base, config())
    check(model, cache, base_nll)
    if "saved whole" in what or what.startswith("lm_head"):
        with model.disable_adapter():
            disabled = sk.score_prompts(model, cache)
        assert per_token_error(disabled, base_nll) < TOLERANCE


def test_two_adapters_and_switching_between_them(cache):
    base = build("qwen3")
    base_nll = plain_nll(base, cache)
    model = adapted(base, lora(ATTENTION + MLP), "first")
    model.add_adapter("second", lora(["q_proj", "lm_head"], r=2))
    stir(model, "second")
    seen = {}
    for active in (["first"], ["second"], ["second", "first"], ["first"]):
        model.base_model.set_adapter(active)
        nll = check(model, cache, base_nll)
        again = seen.setdefault(tuple(active), nll)
        assert torch.allclose(nll, again)
    values = list(seen.values())
    assert all((a - b).abs().max() > 0.05 for i, a in enumerate(values) for b in values[:i])
    assert model.base_model.active_adapters == ["first"]


def test_an_adapter_added_after_the_model_was_scored(cache):
    """The verdict on the base model must not be used for the adapted one: its head is another module now."""
    base = build("qwen3")
    base_nll = plain_nll(base, cache)
    assert per_token_error(sk.score_prompts(base, cache), base_nll) < TOLERANCE
    model = adapted(base, lora(["q_proj", "lm_head"]))
    check(model, cache, base_nll)
    # The caller's own reference to the base sees PEFT's modules, and so must its scores.
    assert per_token_error(sk.score_prompts(base, cache), plain_nll(base, cache)) < TOLERANCE
    restored = model.unload()
    assert per_token_error(sk.score_prompts(restored, cache), base_nll) < TOLERANCE


@pytest.mark.parametrize("what", ["attention and mlp", "lm_head", "dora"])
def test_merged(what, cache):
    name, config = CONFIGS[what]
    base = build(name)
    base_nll = plain_nll(base, cache)
    model = adapted(base, config())
    unmerged = check(model, cache, base_nll)
    model.merge_adapter()
    assert per_token_error(sk.score_prompts(model, cache), unmerged) < TOLERANCE
    check(model, cache, base_nll)
    model.unmerge_adapter()
    stir(model, "default")
    unmerged = check(model, cache, unmerged)
    whole = model.merge_and_unload()
    check(whole, cache, base_nll)
    assert per_token_error(sk.score_prompts(whole, cache), unmerged) < TOLERANCE


def test_refused_family_with_an_adapter(cache):
    base = build("mamba")
    base_nll = plain_nll(base, cache)
    model = adapted(base, lora(["in_proj", "x_proj"]))
    check(model, cache, base_nll, path="padded")


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_prompt_learning_is_refused(kind, cache):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("qwen3"), config)
    training = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="prompt-learning adapters cannot be scored"):
        sk.score_prompts(model, cache)
    assert [module.training for module in model.modules()] == training


def test_activated_lora_takes_the_padded_path():
    cache = cells()
    invocation = cache.contexts[0][0][2:4]
    config = lora(["q_proj", "v_proj"], init_lora_weights=False, alora_invocation_tokens=invocation, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(build("qwen3"), config).eval()
    scores = sk.score_prompts(model, cache)
    assert scores.stats["path"] == "padded" and "invocation tokens" in scores.stats["reason"]
    masked = lambda **inputs: model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    assert per_token_error(scores, plain_nll(model, cache, masked)) < TOLERANCE
    with pytest.raises(RuntimeError, match="invocation tokens"):
        sk.score_prompts(model, cache, impl="tree")


@pytest.mark.parametrize("kind", ["mixed", "bare"])
def test_adapters_without_the_usual_wrapper(kind, cache):
    config = lora(["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = build("llama")
        if kind == "mixed":
            model = peft.get_peft_model(base, config, mixed=True)
        else:
            model = peft.LoraModel(base, config, "a")
    check(model, cache)
