"""Real work to measure on: a task's instruction and paraphrases, its examples, a seeded model of a chosen shape."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from sapo_kernels import ResponseCache


@dataclass(frozen=True)
class Task:
    """K prompts (the original first) and the examples of one task."""

    name: str
    prompts: list[str]
    examples: list[dict[str, str]]
    suffix: str


def load_tasks(data: Path, names: list[str] | None = None) -> list[Task]:
    """Tasks of a folder with ``SUPERNI/`` and ``paraphrases.json``; `names` are prefixes up to the first ``_``."""
    instructions = json.loads((data / "SUPERNI" / "instructions.json").read_text(encoding="utf-8"))
    paraphrases = json.loads((data / "paraphrases.json").read_text(encoding="utf-8"))
    tasks = []
    for name, entry in instructions.items():
        if names and name not in names and name.split("_")[0] not in names:
            continue
        rows = json.loads((data / "SUPERNI" / name / "train.json").read_text(encoding="utf-8"))
        examples = [{"input": r["sentence"], "target": r["label"]} for r in rows if r["label"].strip()]
        tasks.append(Task(name, [entry["instruction"], *paraphrases[name]], examples, entry.get("suffix", "")))
    if not tasks:
        raise SystemExit(f"no task of {names} in {data}")
    return tasks


def load_tokenizer(path: Path | None):
    """A tokenizer.json in `path`, or the byte-level one of the tiny model."""
    if path is None:
        from sapo_peft.tiny import tiny_tokenizer

        return tiny_tokenizer()
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), eos_token="<|endoftext|>")


def qwen3_shaped(vocabulary: int, hidden: int = 512, layers: int = 8, dtype=torch.float32, device: str = "cpu"):
    """A random Qwen3-shaped model: head_dim 64, two query heads for each kv head, MLP three times as wide."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).to(device=device, dtype=dtype).eval()


def build_cache(task: Task, tokenizer, examples: int) -> ResponseCache:
    """The cache of a task's first `examples` examples."""
    return ResponseCache.build(tokenizer, task.prompts, task.examples[:examples], suffix=task.suffix)
