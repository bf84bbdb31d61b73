"""The model and tokenizer that are made on the spot, and the plain loop that checks everything else."""

import pytest
import torch

import sapo_kernels as sk
from sapo_peft import plain_scores, tiny_model, tiny_tokenizer
from tests.families import plain_nll


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_model_depends_on_its_arguments_only(model):
    assert not model.training and model.config.num_hidden_layers == 4
    torch.manual_seed(1)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        again, other, large = tiny_model(), tiny_model(seed=1), tiny_model(vocab=300)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two) and one.dtype == two.dtype == torch.float32
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight) and large.lm_head.weight.shape == (300, 128)


def test_tokenizer_is_one_token_a_byte(tokenizer):
    for text in ("", " \n\t two  spaces\r\n", "\u00e9\u4f60\U0001f600\u202e", "\x00\x1b\x7f"):
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (258, 256, None)
    assert tokenizer("a<|im_start|>b<|im_end|><|endoftext|>").input_ids == [97, 257, 98, 258, 256]


PROMPTS = ["Say yes or no.", "Is it so?", "Say yes or no."]
EXAMPLES = [
    {"input": "a", "target": "yes"},
    {"input": "a much longer input than the others have", "target": "n"},
    {"input": "", "target": "a long target " * 3},
]


def test_plain_scores_equal_each_sequence_alone(model, tokenizer):
    cache = sk.ResponseCache.build(tokenizer, PROMPTS, EXAMPLES)
    expected = plain_nll(model, cache)
    for batch_size in (1, 2, 8, 100):
        nll = plain_scores(model, cache, batch_size)
        assert nll.dtype == torch.float64 and (nll - expected).abs().max() < 1e-4
    scores = sk.score_prompts(model, cache)
    assert scores.stats["trie_tokens"] < scores.stats["dense_tokens"] and (scores.nll - expected).abs().max() < 1e-4


def test_plain_scores_put_the_training_flags_back(model, tokenizer, monkeypatch):
    cache = sk.ResponseCache.build(tokenizer, PROMPTS[:1], EXAMPLES[:1])
    model.train()
    model.lm_head.eval()
    try:
        plain_scores(model, cache)
        assert model.training and not model.lm_head.training and model.model.training
        monkeypatch.setattr(model, "forward", None)
        with pytest.raises(TypeError):
            plain_scores(model, cache)
        assert model.training and not model.lm_head.training
    finally:
        model.eval()
