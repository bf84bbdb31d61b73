"""Every decoder family: exact on the tree path, or refused to the padded path and exact there."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.scoring import attention
from tests.families import (
    ALTERNATING,
    BASE,
    REFUSED,
    TREE,
    build,
    cells,
    check,
    made,
    plain_nll,
)

pytest.importorskip("transformers")

SMALL = 24  # tokens of a pass, less than one sequence: every path has past keys
LARGE = 4096


@pytest.fixture
def attention_calls(monkeypatch):
    """What each tree_attention call was given."""
    calls = []

    def spy(*args, **kwargs):
        calls.append({name for name in ("window", "softcap", "sinks") if kwargs[name] is not None})
        return plain(*args, **kwargs)

    plain = attention.tree_attention
    monkeypatch.setattr(attention, "tree_attention", spy)
    return calls


@pytest.mark.parametrize("family", TREE, ids=str)
def test_tree_path_is_exact(family, cache, attention_calls):
    model = build(family.name)
    plain = plain_nll(model, cache)
    assert plain.isfinite().all() and plain.std() > 1
    check(model, cache, ("auto", LARGE, "tree"), plain=plain)
    used = frozenset().union(*attention_calls)
    assert used == family.uses
    check(model, cache, ("tree", SMALL, "tree"), plain=plain)


@pytest.mark.parametrize("family", REFUSED, ids=str)
def test_refused_family_is_exact_on_the_padded_path(family, cache, caplog):
    model = build(family.name)
    plain = plain_nll(model, cache)
    assert plain.isfinite().all() and plain.std() > 1
    with caplog.at_level(logging.WARNING, logger="sapo_kernels"):
        check(model, cache, ("auto", 200, family.path), ("auto", SMALL, family.path), plain=plain)
    assert type(model).__name__ in caplog.text
    with pytest.raises(RuntimeError, match=f"impl='tree': {type(model).__name__}"):
        sk.score_prompts(model, cache, impl="tree")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss", "deepseek_v3", "opt", "longcat_flash"])
def test_backends_and_the_padded_path_agree(name, cache):
    check(build(name), cache, ("sdpa", SMALL, "tree"), ("reference", SMALL, "tree"),
          ("padded", 200, "padded"))  # fmt: skip


def vision_language(name: str):
    """A tiny wrapper with a vision tower, or a text model cut out of one."""
    import transformers as tf

    text = {**BASE, **ALTERNATING}
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    if name == "gemma3":
        config = tf.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299, boi_token_index=298,
            eoi_token_index=297,
        )  # fmt: skip
        return tf.Gemma3ForConditionalGeneration(config)
    if name == "llava":
        vision["model_type"] = "clip_vision_model"
        config = tf.LlavaConfig(
            text_config={**BASE, "model_type": "llama"}, vision_config=vision, image_token_index=299
        )
        return tf.LlavaForConditionalGeneration(config)
    # More input rows than logits: the last eight ids can be read but not predicted.
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    return tf.MllamaForCausalLM(MllamaTextConfig(**BASE, cross_attention_layers=[1]))


@pytest.mark.parametrize("name", ["gemma3", "llava", "mllama"])
def test_text_side_of_vision_language_models(name, cache):
    model = made(lambda: vision_language(name))
    before = model.config._attn_implementation, model.config.get_text_config()._attn_implementation
    paths = ("auto", LARGE, "tree"), ("tree", SMALL, "tree"), ("padded", 200, "padded")
    check(model, cache, *paths)
    assert (model.config._attn_implementation, model.config.get_text_config()._attn_implementation) == before


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [4.0, 6.0, 8.0, 16.0], "original_max_position_embeddings": 32,
}  # fmt: skip
NESTED = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
ROPES = {
    "dynamic": ("llama", {"max_position_embeddings": 32, "rope_parameters": DYNAMIC}),
    "dynamic, all longer": ("llama", {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}),
    "dynamic in one layer type": (
        "gemma3_text", {"max_position_embeddings": 32, "rope_parameters": {**NESTED, "full_attention": DYNAMIC}}),
    "longrope": ("phi3", {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE}),
    "longrope in one layer type": ("gemma3_text", {"rope_parameters": {**NESTED, "full_attention": LONGROPE}}),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "grown"), [(kind, 60 * (i % 2)) for i, kind in enumerate([*ROPES, "dynamic"])])
def test_rope_that_depends_on_the_length_is_scored_one_length_at_a_time(kind, grown, cache):
    """Sequences of 21 to 38 tokens straddle the original length of 32 (16).

    A dynamic rope remembers the longest sequence it has seen. The judge of each cell is the model as it stands: fresh,
    or after a longer sequence; neither the order of the cells nor the scoring itself may change it.
    """
    name, config = ROPES[kind]
    model = build(name, **config).eval()
    if grown:
        model(input_ids=torch.arange(5, 5 + grown)[None])
    plain = plain_nll(model, cache, lambda **inputs: copy.deepcopy(model)(**inputs))
    rope = model.model.rotary_emb
    before = {n: b.clone() for n, b in rope.named_buffers(remove_duplicate=False)}, rope.max_seq_len_cached
    paths = ("auto", LARGE, "alone"), ("padded", SMALL, "alone")
    check(model, cache, *paths, plain=plain)
    with pytest.raises(RuntimeError, match="impl='tree': rope type"):
        sk.score_prompts(model, cache, impl="tree")
    assert rope.max_seq_len_cached == before[1]
    for buffer_name, buffer in rope.named_buffers(remove_duplicate=False):
        assert torch.equal(buffer, before[0][buffer_name]), buffer_name


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_same_ropes_within_their_original_length_take_the_tree_path(kind, cache):
    """So do sequences shorter than a window."""
    check(build("mistral", sliding_window=64), cells(), ("auto", SMALL, "tree"))
    name, config = ROPES[kind]
    longer = {"max_position_embeddings": 64, "original_max_position_embeddings": 64}
    rope = {**config["rope_parameters"], "original_max_position_embeddings": 64}
    model = build(name, **{**config, **longer, "rope_parameters": rope})
    check(model, cache, ("auto", SMALL, "tree"))
