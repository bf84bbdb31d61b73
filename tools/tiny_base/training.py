"""Training the tiny base and its tokenizer from scratch.

A base is a folder with config.json, model.safetensors, the tokenizer's files and `made_by.json`, which names the
preset, what the weights were made by and the SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sapo_kernels.files import read_bytes, write_json
from sapo_kernels.scoring.render import Renderer
from sapo_peft.tiny_random import SPECIAL_TOKENS
from tools.tiny_base.corpus import Corpus, Text, texts_digest
from tools.tiny_base.presets import Preset

logger = logging.getLogger("sapo_peft")

MANIFEST = "made_by.json"

# Every eighth token of a context is predicted too: enough to learn the words, and the responses keep the weight.
CONTEXT_STRIDE = 8
# ChatML with a space after the role: a word that opens an answer is the same token as in the middle of a text, and can
# be copied as it is.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
CHUNK = 16  # batches that are drawn at once and sorted by length


def make_base(preset: Preset, folder: Path, say: Callable[[str], None] = logger.info) -> None:
    """Train a base and fill the empty `folder` with it; the weights are stored in bfloat16, the manifest last."""
    import transformers

    tokenizer = train_tokenizer(Corpus(preset.seed).vocabulary_texts(), preset.vocabulary)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, history = train(preset, Corpus(preset.seed), tokenizer, device, say)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made_by = {
        "version": 1,
        "preset": asdict(preset),
        "texts": texts_digest(preset.seed),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "device": device},
        "training": history,
        "files": {path.name: file_digest(path) for path in sorted(folder.iterdir())},
    }
    write_json(folder / MANIFEST, made_by)


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    return hashlib.sha256(read_bytes(path, max_bytes=2**31)).hexdigest()


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of `vocabulary` tokens, digits apart, with the ChatML template; any text survives."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocabulary:
        raise ValueError(f"vocabulary: expected {vocabulary} tokens, got {backend.get_vocab_size()} from these texts")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def new_model(preset: Preset, tokenizer: Any) -> Any:
    """An untrained `LlamaForCausalLM`, float32, on the CPU; the global random state is not touched."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=preset.vocabulary,
        hidden_size=preset.hidden,
        intermediate_size=preset.feed_forward,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )
    # The constructor draws too; that its values are not used keeps the weights apart from transformers' version.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = LlamaForCausalLM(config).float()
    generator = torch.Generator("cpu").manual_seed(preset.seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 2:
                # The usual 0.02 is far too small at this width: after 400 steps the loss was 1.8 instead of 1.3.
                deviation = parameter.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    deviation *= (2 * preset.layers) ** -0.5
                parameter.normal_(0.0, deviation, generator=generator)
    return model


def tokenised(renderer: Renderer, text: Text) -> tuple[list[int], int]:
    """(ids of context and response, length of the context) of one text, as scoring and training of a task see it."""
    cell = renderer.render(text.instruction, {"input": text.input, "target": text.target})
    context = renderer.tokenizer(cell.context, add_special_tokens=False)["input_ids"]
    response = renderer.tokenizer(cell.response, add_special_tokens=False)["input_ids"]
    return context + response, len(context)


def train(
    preset: Preset, corpus: Corpus, tokenizer: Any, device: str = "cpu", say: Callable[[str], None] = logger.info
) -> tuple[Any, dict[str, Any]]:
    """(the trained model, float32, in eval mode on the CPU; {"tokens", "seconds", "threads", "losses"}).

    Loss: mean cross-entropy of the response tokens and of every eighth context token. Deterministic on one machine
    with one number of threads; other machines round differently, so their weights differ.
    """
    model = new_model(preset, tokenizer).to(device).train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=preset.learning_rate, betas=(0.9, 0.98))
    taste_from = round(preset.steps * (1 - preset.taste_part))
    warm_up = max(1, preset.steps // 20)
    started, seen, losses = time.perf_counter(), 0, []
    waiting: list[list[tuple[list[int], int]]] = []
    for step in range(preset.steps):
        if not waiting:
            count = min(CHUNK, (taste_from if step < taste_from else preset.steps) - step)
            waiting = _batches(preset, corpus, tokenizer, count, preset.taste if step >= taste_from else 0.0)
        batch = waiting.pop()
        rate = min((step + 1) / warm_up, (preset.steps - step) / (preset.steps - warm_up + 1))
        for group in optimizer.param_groups:
            group["lr"] = preset.learning_rate * rate
        loss = _loss(model, batch, tokenizer.pad_token_id, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += sum(len(ids) for ids, _ in batch)
        if step % 100 == 99 or step == preset.steps - 1:
            spent = time.perf_counter() - started
            losses.append([step + 1, round(loss.item(), 4)])
            say(f"step {step + 1} of {preset.steps}: loss {loss.item():.3f}, {seen} tokens, {spent:.0f} s")
    history = {"tokens": seen, "seconds": round(spent), "threads": torch.get_num_threads(), "losses": losses}
    return model.to("cpu").eval(), history


def _batches(
    preset: Preset, corpus: Corpus, tokenizer: Any, count: int, taste: float
) -> list[list[tuple[list[int], int]]]:
    """`count` batches of texts of similar length, in random order."""
    rows: list[tuple[list[int], int]] = []
    renderers: dict[str, Renderer] = {}
    while len(rows) < count * preset.batch:
        (text,) = corpus.texts(1, taste)
        renderer = renderers.setdefault(text.suffix, Renderer(tokenizer, suffix=text.suffix))
        row = tokenised(renderer, text)
        if len(row[0]) <= preset.max_tokens:
            rows.append(row)
    rows.sort(key=lambda row: len(row[0]))
    return corpus.draw.shuffled([rows[i : i + preset.batch] for i in range(0, len(rows), preset.batch)])


def _loss(model: Any, batch: list[tuple[list[int], int]], pad: int, device: str) -> torch.Tensor:
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), longest), pad)
    expected = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
    for i, (row, context) in enumerate(batch):
        ids[i, : len(row)] = torch.tensor(row)
        expected[i, : context - 1 : CONTEXT_STRIDE] = True
        expected[i, context - 1 : len(row) - 1] = True
    ids, expected = ids.to(device), expected.to(device)
    # Padding stands on the right, so causal attention never reads it and no mask is needed.
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[expected]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][expected])
