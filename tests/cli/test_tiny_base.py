"""The tiny base: what it is trained on, and that the shipped one is whole and what the script makes."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.files import DataError, read_json
from sapo_peft import assets
from sapo_peft.assets import BUNDLED_DIR
from sapo_peft.loading import load
from sapo_peft.tiny_base import TASTE_ROWS, load_tiny_base
from tools.tiny_base.corpus import SEQUENCE, Corpus, bundled, known_wordings, texts_digest
from tools.tiny_base.presets import PRESETS
from tools.tiny_base.skills import SKILLS
from tools.tiny_base.training import make_base, train, train_tokenizer


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of a trained toy base."""
    folder = tmp_path_factory.mktemp("toy")
    make_base(PRESETS["toy"], folder)
    return folder


def test_toy_base_is_a_whole_checkpoint(toy):
    model, tokenizer = load(str(toy), None, "float32", "cpu")
    assert model.config.vocab_size == PRESETS["toy"].vocabulary == len(tokenizer)
    scores = sk.score_prompts(
        model, ["Say it.", "Repeat the word."], [{"input": "a", "target": "b"}], tokenizer=tokenizer, impl="tree"
    )
    assert scores.nll.isfinite().all()
    text = "Grüße, 12 {x} 漢字\n\tend"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("harm", ["cut", "missing", "manifest", "flipped", "foreign"])
def test_a_damaged_base_is_refused(toy, tmp_path, harm, monkeypatch):
    folder = shutil.copytree(toy, tmp_path / "base")
    assert assets.faults(folder) == []
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if harm == "missing":
        weights.unlink()
    elif harm == "manifest":
        (folder / assets.MANIFEST).write_text('{"version": 1, "files"')
    elif harm == "foreign":
        # A manifest names files of its own folder only.
        manifest = read_json(folder / assets.MANIFEST)
        manifest["files"]["../secret"] = hashlib.sha256(b"x").hexdigest()
        (folder / assets.MANIFEST).write_text(json.dumps(manifest))
        (tmp_path / "secret").write_bytes(b"x")
    else:
        data[-1] ^= 1
        weights.write_bytes(data[:-100] if harm == "cut" else data)
    monkeypatch.setattr(assets, "TINY_BASE_DIR", folder)
    with pytest.raises(DataError, match="damaged"):
        assets.tiny_base_folder()


def test_training_is_deterministic():
    preset = replace(PRESETS["toy"], steps=2)
    tokenizer = train_tokenizer(Corpus(0).vocabulary_texts(), preset.vocabulary)
    state = torch.get_rng_state()
    one, two = (train(preset, Corpus(0), tokenizer)[0] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_every_answer_of_a_skill_can_be_told_from_its_text():
    draw = Corpus(3).draw
    for name, skill in SKILLS.items():
        instructions = skill.instructions()
        assert len(set(instructions)) == len(instructions) >= 32, name
        for _ in range(50):
            text, answer = skill.make(draw)
            assert text.strip() == text and answer.strip() == answer and answer, name
    # Worked out again from the text alone.
    for _ in range(200):
        text, answer = SKILLS["last"].make(draw)
        assert text.endswith(answer)
        for name, place in (("first_listed", 1), ("last_listed", -1)):
            text, answer = SKILLS[name].make(draw)
            if "\n- " in text:
                assert text.split("\n- ")[place] == answer
        text, answer = SKILLS["message_start"].make(draw)
        assert len(answer.split()) == 2 and answer in text
        text, answer = SKILLS["field"].make(draw)
        assert answer in text


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
    assert assets.faults(assets.TINY_BASE_DIR) == []
    made_by = read_json(assets.TINY_BASE_DIR / assets.MANIFEST)
    preset = PRESETS["default"]
    assert made_by["preset"] == {name: getattr(preset, name) for name in made_by["preset"]}
    # Made of the same texts: the tokenizer comes out byte for byte, and so do the training texts.
    tokenizer = train_tokenizer(Corpus(preset.seed).vocabulary_texts(), preset.vocabulary)
    stored = json.loads((assets.TINY_BASE_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"] == stored["model"]
    assert made_by["texts"] == texts_digest(preset.seed)
    assert sum(path.stat().st_size for path in assets.TINY_BASE_DIR.iterdir()) < 4 * 2**20


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


@pytest.mark.slow
def test_the_script_makes_such_a_base(tmp_path):
    """Trained anew, the base has the losses of the shipped one, up to what other rounding does to a training."""
    make_base(PRESETS["default"], tmp_path, print)
    bases = load(str(tmp_path), None, "float32", "cpu"), load_tiny_base()
    for name in SEQUENCE:
        task = bundled(name)
        rows = json.loads((BUNDLED_DIR / f"SUPERNI/{name}/test.json").read_text(encoding="utf-8"))[:40]
        made, shipped = (
            sk.score_prompts(model, task.wordings, rows, tokenizer=tokenizer, suffix=task.suffix).loss.mean()
            for model, tokenizer in bases
        )
        assert abs(float(made - shipped)) < 0.5
