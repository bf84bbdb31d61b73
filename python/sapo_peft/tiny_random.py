"""A small random Qwen3-shaped model and a byte-level tokenizer, made on the spot: no hub, no files, no GPU.

They make every path through the package runnable anywhere. The weights are random, so the losses say nothing about
which prompt is good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The tokenizer uses the first 259 ids. The others give the output layer the share of the work that it has in a
# Qwen3-0.6B, a quarter, so that times are not flattered by a head that costs nothing.
VOCAB = 2816

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(vocab: int = VOCAB, seed: int = 0) -> PreTrainedModel:
    """A `Qwen3ForCausalLM` of about 1.7 M parameters, float32, on the CPU, in eval mode.

    4 layers, hidden 128, 4 query heads on 2 key/value heads of width 32. The weights depend on `vocab` and
    `seed` only (not on the transformers version), and no global random state is changed.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        pad_token_id=256,
        eos_token_id=258,
        bos_token_id=None,
        architectures=["Qwen3ForCausalLM"],
    )
    # The constructor draws from the CPU generator; `torch.manual_seed` would reseed the GPUs as well.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = Qwen3ForCausalLM(config).float().eval()
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0-255), ``<|endoftext|>`` 256, ``<|im_start|>`` 257, ``<|im_end|>`` 258 (eos).

    A fast tokenizer with a ChatML chat template. Any text is encoded and decoded exactly.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of every byte in byte-level BPE -> the byte.

    Bytes that print stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
