"""Small independent implementations that the tests compare with, and builders of inputs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import random

import numpy as np
import pytest
import torch

Cell = tuple[list[int], list[int]]  # context ids, response ids

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen3's: an empty thinking block stands before the last answer, and in the generation prompt only if
# thinking is switched off.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
# Like Llama 3.2's: what it shows changes from day to day, this one from second to second.
DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + CHATML
# Like DeepSeek-R1's: the generation prompt begins a thought, whatever the options; a conversation shows none.
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# Turns that are only begun, never closed, as GLM (by a special token), Falcon and Vicuna (by text) write them, and one
# that ends all turns but the last.
UNCLOSED = {
    "glm": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "falcon": "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}",
    "vicuna": "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    "last": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if not loop.last or m['role'] == 'user' %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


def byte_tokenizer(chat_template=None, merges=(), bos=False, around=None):
    """A fast byte-level tokenizer: ids 0-255 are bytes, then three special tokens, then one id a merge.

    With `bos` it puts ``<|endoftext|>`` in front of a text when asked to add special tokens, as Llama's does; with
    `around` ("<|im_start|> $A <|im_end|>") whatever that says, none of which is a BOS.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = {chr(b if b in printable else next(others)): b for b in range(256)}
    vocabulary.update({name: 256 + i for i, name in enumerate(SPECIALS)})
    vocabulary.update({"".join(pair): 256 + len(SPECIALS) + i for i, pair in enumerate(merges)})
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    # No splitting by a regular expression, so that a merge may reach across any boundary.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    if bos or around:
        backend.post_processor = processors.TemplateProcessing(
            single=around or f"{SPECIALS[0]} $A", special_tokens=[(name, 256 + i) for i, name in enumerate(SPECIALS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIALS[0], eos_token=SPECIALS[2], chat_template=chat_template,
        bos_token=SPECIALS[0] if bos else None, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def small_qwen3(vocabulary: int = 259, seed: int = 0, **options):
    """A Qwen3-shaped model whose log-probabilities spread over several nats, so that a wrong one shows."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = dict(
        vocab_size=vocabulary, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**{**sizes, **options})).float().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, 0.0, 2.0 * parameter.shape[1] ** -0.5)
    return model


def flatten(cells: list[Cell]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, offsets, context_lengths) as `plan_trie` takes them."""
    whole = [context + response for context, response in cells]
    ids = np.asarray([t for sequence in whole for t in sequence], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, whole)])
    return ids, offsets, np.asarray([len(context) for context, _ in cells])


def random_cells(seed: int, prompts=4, examples=5, vocabulary=7, longest=12) -> list[Cell]:
    """K x M cells with shared beginnings and endings of random lengths."""
    rng = random.Random(seed)

    def some(low, high):
        return [rng.randrange(vocabulary) for _ in range(rng.randint(low, high))]

    head, answers = some(1, longest), [some(1, longest) for _ in range(examples)]
    texts = [some(0, longest) for _ in range(examples)]
    return [
        (head[: rng.randint(1, len(head))] + instruction + text, answer)
        for instruction in [some(0, longest) for _ in range(prompts)]
        for text, answer in zip(texts, answers, strict=True)
    ]


class PrefixOracle:
    """The trie as a sorted list of distinct prefixes; everything else is looked up in it."""

    def __init__(self, cells: list[Cell]):
        self.cells = cells
        sequences = [tuple(context + response)[:-1] for context, response in cells]
        self.prefixes = sorted({s[:n] for s in sequences for n in range(1, len(s) + 1)})
        self.index = {prefix: i for i, prefix in enumerate(self.prefixes)}
        self.dense_tokens = sum(map(len, sequences))
        self.leaf = [self.index[s] for s in sequences]
        self.predicted: dict[int, set[int]] = {}
        for context, response in cells:
            for j, token in enumerate(response):
                row = self.index[tuple(context + response[:j])]
                self.predicted.setdefault(row, set()).add(token)

    def path(self, i: int) -> list[int]:
        """Trie tokens from the root to token i, itself included."""
        prefix = self.prefixes[i]
        return [self.index[prefix[:n]] for n in range(1, len(prefix) + 1)]

    def subtree_end(self, i: int) -> int:
        """One past the last token below token i."""
        prefix, end = self.prefixes[i], i + 1
        while end < len(self.prefixes) and self.prefixes[end][: len(prefix)] == prefix:
            end += 1
        return end


def causal_attention(q, k, v, scale, window=None, softcap=None, sinks=None):
    """One sequence alone, head by head: q [n, Hq, Dk], k [n, Hkv, Dk], v [n, Hkv, Dv] -> [n, Hq, Dv]."""
    n, groups = q.shape[0], q.shape[1] // k.shape[1]
    age = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
    visible = (age >= 0) if window is None else (age >= 0) & (age < window)
    heads = []
    for head in range(q.shape[1]):
        logits = q[:, head] @ k[:, head // groups].T * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks[head].to(logits.dtype).expand(n, 1)], 1)
        heads.append(torch.softmax(logits, -1)[:, :n] @ v[:, head // groups])
    return torch.stack(heads, 1)


def alone_nll(model, context: list[int], response: list[int]) -> list[float]:
    """NLL of each response token by the plain model on this one sequence."""
    ids = torch.tensor([context + response[:-1]], device=model.device)
    with torch.no_grad():
        logprob = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), -1)
    return [-float(logprob[len(context) - 1 + j, token]) for j, token in enumerate(response)]


def skip_unless_runnable(op: str, impl: str, device: str) -> None:
    """Skip with the reason where a backend cannot run; only ever Triton."""
    if impl != "triton":
        return
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is here, so Triton compiles for it; the interpreter is for machines without one")
    needed = "3.9" if device == "cpu" else None
    pytest.importorskip("triton", minversion=needed, reason="Triton is not installed, or its interpreter is too old")
    name = f"sapo_kernels.{op}.triton"
    if importlib.util.find_spec(name) is None or not hasattr(importlib.import_module(name), f"{op}_triton"):
        pytest.skip(f"{name} has no launcher in this checkout")
