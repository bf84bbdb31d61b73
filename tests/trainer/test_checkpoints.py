"""last_good_checkpoint: what is incomplete or has changed is passed over, logged, and left where it is."""

from __future__ import annotations

import json
import logging
import random
import shutil

import pytest

from sapo_kernels.files import DataError
from sapo_kernels.manifest import MANIFEST
from sapo_peft import SapoConfig, last_good_checkpoint
from sapo_peft.trainer.checkpoints import check_adapter, checkpoint_fault, seal
from tests.trainer.training_helpers import sapo_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer, _ = sapo_trainer(folder, config=SapoConfig(probe_examples=2), save_strategy="steps", save_steps=2)
    trainer.train()
    return folder


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_the_newest_by_number(copied):
    assert last_good_checkpoint(copied) == str(copied / "checkpoint-6")
    newest = copied / "checkpoint-10"
    shutil.copytree(copied / "checkpoint-6", newest)
    assert "expected step 10, got 6" in checkpoint_fault(newest)
    state = newest / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "global_step": 10}))
    seal(newest)
    assert last_good_checkpoint(str(copied)) == str(newest)


def damaged(rng: random.Random, content: bytes, other: bytes) -> bytes | None:
    """The content with one damage; None: the file is gone."""
    at = rng.randrange(len(content))
    flipped = bytes([content[at] ^ 1 << rng.randrange(8)])
    return rng.choice([content[:at], content[:at] + flipped + content[at + 1 :], content + b"\0", other, b"", None])


def test_every_damage_is_found(copied, caplog):
    """A flipped bit, a cut, a byte more, the file of another step, nothing: in any file, the manifest too."""
    rng, newest, earlier = random.Random(0), copied / "checkpoint-6", copied / "checkpoint-4"
    files = {path: path.read_bytes() for path in newest.iterdir() if path.suffix != ".md"}
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", MANIFEST} <= {path.name for path in files}
    for _ in range(300):
        path = rng.choice(list(files))
        other = (earlier / path.name).read_bytes()
        if (change := damaged(rng, files[path], other)) == files[path]:
            continue
        path.unlink() if change is None else path.write_bytes(change)
        fault = checkpoint_fault(newest)
        assert fault is not None and (path.name in fault or MANIFEST in fault), (path, change)
        path.write_bytes(files[path])
    (newest / "adapter_model.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="sapo_peft"):
        assert last_good_checkpoint(copied) == str(earlier)
    assert "checkpoint-6 is incomplete" in caplog.text and newest.is_dir(), "nothing is deleted"


def test_files_that_loaders_read_and_nobody_wrote(copied):
    newest = copied / "checkpoint-6"
    (newest / "README.md").write_text("mine")
    (newest / "notes.txt").write_text("mine")
    assert checkpoint_fault(newest) is None
    (newest / "model.safetensors").write_bytes(b"x")
    assert "model.safetensors: expected only files that" in checkpoint_fault(newest)


def test_a_damaged_one_is_refused_by_the_trainer_and_as_an_adapter(copied):
    newest = copied / "checkpoint-6"
    weights = newest / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    trainer, _ = sapo_trainer(copied, config=SapoConfig(probe_examples=2), max_steps=8)
    for load in (lambda: trainer.train(resume_from_checkpoint=str(newest)), lambda: check_adapter(newest)):
        with pytest.raises(DataError, match="adapter_model.safetensors: expected sha256"):
            load()
    (newest / MANIFEST).unlink()
    with pytest.raises(DataError, match="expected the manifest of this folder, got none"):
        trainer.train(resume_from_checkpoint=str(newest))


def test_other_names_are_no_checkpoints_and_there_may_be_none(copied):
    for name in ("checkpoint-", "checkpoint-8x", "checkpoint-8.tmp", "xcheckpoint-9", "tmp-checkpoint-9"):
        shutil.copytree(copied / "checkpoint-6", copied / name)
    (copied / "checkpoint-99").write_text("a file")
    assert last_good_checkpoint(copied) == str(copied / "checkpoint-6")
    for number in (2, 4, 6):
        (copied / f"checkpoint-{number}" / "optimizer.pt").write_bytes(b"")
    for folder in (copied, copied.parent, copied / "none"):
        assert last_good_checkpoint(folder) is None


def test_a_checkpoint_of_the_model_alone_is_resumed_and_reported(tmp_path, caplog):
    options = dict(config=SapoConfig(every_steps=2, probe_examples=2), save_strategy="steps", save_steps=2)
    trainer, _ = sapo_trainer(tmp_path, **options, save_only_model=True, max_steps=4)
    trainer.train()
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    with caplog.at_level(logging.WARNING, logger="sapo_peft"):
        newest = last_good_checkpoint(tmp_path)
    assert newest == str(tmp_path / "checkpoint-4") and "optimizer and learning rate start over" in caplog.text
    trainer, callback = sapo_trainer(tmp_path, **options, max_steps=7)
    trainer.train(resume_from_checkpoint=newest)
    assert trainer.state.global_step == 7 and [scoring.step for scoring in callback.history] == [0, 2, 6]
