"""Work to measure on: a task's prompts with its examples, made-up cells, seeded random models of chosen shapes."""

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


def data_folder(given: Path | None = None) -> Path:
    """The folder given, or the data that ships with the package."""
    if given is not None:
        return given
    from sapo_peft.assets import BUNDLED_DIR

    return BUNDLED_DIR


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
    if path is None or not (path / "tokenizer.json").exists():
        from sapo_peft.tiny_random import tiny_tokenizer

        return tiny_tokenizer()
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), eos_token="<|endoftext|>")


def load_pretrained(name: str, device: str = "cpu"):
    """(model in float32, tokenizer) of weights that are installed or a GGUF file."""
    from sapo_peft.loading import load

    return load(name, None, "float32", device)


def with_lora(model, r: int, alpha: int, **options):
    """`model` with a new adapter on all linear layers, to be trained."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", **options)).train()


def qwen3_shaped(vocabulary: int, hidden: int = 512, layers: int = 8):
    """A random Qwen3-shaped model: head_dim 64, two query heads for each kv head, MLP three times as wide."""
    return _qwen3(
        torch.float32, "cpu", hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, vocab_size=vocabulary,
        tie_word_embeddings=True,
    )  # fmt: skip


def _qwen3(dtype: torch.dtype, device: str, **sizes):
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(**sizes, max_position_embeddings=8192)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


# Published shapes; the weights are random, so nothing is downloaded.
QWEN3 = {
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                 num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    "8B": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False),
    "toy": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, vocab_size=512, tie_word_embeddings=False),
}  # fmt: skip


def qwen3_published(name: str, dtype=torch.bfloat16, device: str = "cuda"):
    """A random model of a published shape, drawn on its device: N(0, 1/fan_in) matrices, norms of one."""
    model = _qwen3(dtype, device, **QWEN3[name])
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    return model


def build_cache(task: Task, tokenizer, examples: int) -> ResponseCache:
    """The cache of a task's first `examples` examples."""
    return ResponseCache.build(tokenizer, task.prompts, task.examples[:examples], suffix=task.suffix)


def cut(examples: list[dict[str, str]], tokenizer, limit: int) -> list[dict[str, str]]:
    """The same with at most `limit` tokens of their inputs."""
    ids = [tokenizer(row["input"], add_special_tokens=False)["input_ids"][:limit] for row in examples]
    return [{"input": tokenizer.decode(one), "target": row["target"]} for one, row in zip(ids, examples, strict=True)]


@dataclass(frozen=True)
class Cells:
    """Made-up cells: K prompts x M examples of random ids, lengths within a fifth of the given means.

    The default lengths are those of SuperNI tasks in GPT-2 tokens (means of ten tasks: prompts 24 to 59, inputs 18 to
    422, median 65, responses 2 to 21).
    last: the instruction stands after the input instead of before it.
    """

    prompts: int = 16
    examples: int = 8
    prompt: int = 45
    input: int = 70
    response: int = 4
    last: bool = False

    def cache(self, vocabulary: int, seed: int = 0) -> ResponseCache:
        draw = torch.Generator().manual_seed(seed)

        def ids(mean: int) -> list[int]:
            spread = mean // 5
            length = mean + int(torch.randint(-spread, spread + 1, (1,), generator=draw))
            return torch.randint(0, vocabulary, (length,), generator=draw).tolist()

        head, middle, tail = ids(5), ids(3), ids(8)
        prompts = [ids(self.prompt) for _ in range(self.prompts)]
        inputs = [ids(self.input) for _ in range(self.examples)]
        responses = [ids(self.response) for _ in range(self.examples)]
        ordered = (lambda p, x: [x, p]) if self.last else (lambda p, x: [p, x])
        contexts = [
            [head + first + middle + second + tail for first, second in (ordered(p, x) for x in inputs)]
            for p in prompts
        ]
        return ResponseCache.from_token_ids(contexts, responses)
