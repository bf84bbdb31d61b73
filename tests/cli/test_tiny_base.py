"""The tiny base: what it is trained on, the cache, and that the shipped one is what the script makes."""

import json
from dataclasses import replace

import torch

import sapo_kernels as sk
from sapo_kernels.files import read_json
from sapo_peft.assets import BUNDLED_DIR, TINY_BASE_DIR
from sapo_peft.loading import load
from sapo_peft.tiny_base import TASTE_ROWS, load_tiny_base
from tools.tiny_base.corpus import SEQUENCE, Corpus, bundled, known_wordings, texts_digest
from tools.tiny_base.presets import PRESETS
from tools.tiny_base.training import MANIFEST, file_digest, make_base, train_tokenizer


def test_a_toy_base_is_a_whole_checkpoint(tmp_path):
    preset = replace(PRESETS["toy"], steps=2)
    state = torch.get_rng_state()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_base(preset, tmp_path / name)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1] and named(tmp_path / "one")
    model, tokenizer = load(str(tmp_path / "one"), None, "float32", "cpu")
    assert model.config.vocab_size == preset.vocabulary == len(tokenizer)
    text = "Gr\u00fc\u00dfe, 12 {x} \u6f22\u5b57\n\tend"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def named(folder):
    """Whether the manifest names every other file of a base by its digest."""
    files = {path.name: file_digest(path) for path in folder.iterdir() if path.name != MANIFEST}
    return read_json(folder / MANIFEST)["files"] == files


def test_the_taste_uses_reserved_rows_and_known_wordings():
    known = known_wordings(0)
    assert sum(0 in chosen for chosen in known.values()) == 1
    tasks = {name: bundled(name) for name in SEQUENCE}
    reserved = {(row["sentence"], row["label"]) for task in tasks.values() for row in task.rows[-TASTE_ROWS:]}
    wordings = {task.wordings[index] for name, task in tasks.items() for index in known[name]}
    for text in Corpus(0).texts(400, taste=1.0):
        assert (text.input, text.target) in reserved and text.instruction in wordings
    rest = list(Corpus(0).texts(400, taste=0.0))
    assert not any(text.instruction in wordings for text in rest)
    assert 0.1 < sum(bool(text.suffix) for text in rest) / 400 < 0.3


def test_shipped_base_is_whole_and_of_these_texts():
    assert named(TINY_BASE_DIR)
    made_by = read_json(TINY_BASE_DIR / MANIFEST)
    preset = PRESETS["default"]
    assert made_by["preset"] == {name: getattr(preset, name) for name in made_by["preset"]}
    # Made of the same texts: the tokenizer comes out byte for byte, and so do the training texts.
    tokenizer = train_tokenizer(Corpus(preset.seed).vocabulary_texts(), preset.vocabulary)
    stored = json.loads((TINY_BASE_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"] == stored["model"]
    assert made_by["texts"] == texts_digest(preset.seed)
    assert sum(path.stat().st_size for path in TINY_BASE_DIR.iterdir()) < 4 * 2**20


def test_shipped_base_follows_instructions_and_prefers_wordings():
    model, tokenizer = load_tiny_base()
    for name in SEQUENCE:
        task = bundled(name)
        rows = json.loads((BUNDLED_DIR / f"SUPERNI/{name}/test.json").read_text(encoding="utf-8"))[:12]
        loss = sk.score_prompts(model, task.wordings, rows, tokenizer=tokenizer, suffix=task.suffix).loss
        known = known_wordings(PRESETS["default"].seed)[name]
        others = [k for k in range(len(task.wordings)) if k not in known]
        assert loss[known].mean() < loss[others].mean()
        # A model that knew nothing would be at log(vocabulary), 7.6.
        assert float(loss.max()) < 5.0 and float(loss.max() - loss.min()) > 0.05
