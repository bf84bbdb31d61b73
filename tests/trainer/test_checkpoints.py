"""last_good_checkpoint: what is not whole is passed over, said, and left where it is."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile

import pytest

from sapo_peft import SapoConfig, last_good_checkpoint
from sapo_peft.trainer.checkpoints import checkpoint_fault, safetensors_fault
from tests.trainer.training_helpers import sapo_trainer

# What resuming reads.
NEEDED = (
    "trainer_state.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


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
    shutil.copytree(copied / "checkpoint-6", copied / "checkpoint-10")
    state = copied / "checkpoint-10" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "global_step": 10}))
    assert last_good_checkpoint(str(copied)) == str(copied / "checkpoint-10")


@pytest.mark.parametrize("how", ["cut", "half", "empty", "missing", "folder"])
@pytest.mark.parametrize("name", NEEDED)
def test_a_damaged_file_is_passed_over_and_said(copied, caplog, name, how):
    newest = copied / "checkpoint-6"
    file, content = newest / name, (newest / name).read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "missing":
        file.write_bytes({"cut": content[:-3], "half": content[: len(content) // 2], "empty": b""}[how])
    with caplog.at_level(logging.WARNING, logger="sapo_peft"):
        assert last_good_checkpoint(copied) == str(copied / "checkpoint-4")
    assert "checkpoint-6 is not whole" in caplog.text and "looking for an earlier one" in caplog.text
    assert newest.is_dir(), "nothing is deleted"


def test_every_length_of_a_cut_state_and_of_the_weights(copied):
    newest = copied / "checkpoint-6"
    for name in ("trainer_state.json", "adapter_model.safetensors"):
        content = (newest / name).read_bytes()
        for length in [*range(0, 40), *range(40, len(content) - 1, max(1, len(content) // 50))]:
            (newest / name).write_bytes(content[:length])
            assert checkpoint_fault(newest, 6) is not None, (name, length)
        (newest / name).write_bytes(content)
    assert checkpoint_fault(newest, 6) is None


def test_a_flipped_byte_in_the_optimizer_is_found(copied):
    file = copied / "checkpoint-6" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        values = max((archive.read(name) for name in archive.namelist()), key=len)
    content[content.find(values) + len(values) // 2] ^= 0xFF
    file.write_bytes(content)
    assert "optimizer.pt" in checkpoint_fault(file.parent, 6)


def test_the_state_must_be_of_that_step(copied):
    (copied / "checkpoint-6").rename(copied / "checkpoint-7")
    assert "expected step 7, got 6" in checkpoint_fault(copied / "checkpoint-7", 7)
    for text in ("[]", "null", "{}", "[" * 100_000):
        (copied / "checkpoint-7" / "trainer_state.json").write_text(text)
        assert checkpoint_fault(copied / "checkpoint-7", 7).startswith("trainer_state.json")


def test_other_names_are_no_checkpoints(copied):
    for name in ("checkpoint-", "checkpoint-8x", "checkpoint-8.tmp", "xcheckpoint-9", "tmp-checkpoint-9"):
        shutil.copytree(copied / "checkpoint-6", copied / name)
    (copied / "checkpoint-99").write_text("a file")
    assert last_good_checkpoint(copied) == str(copied / "checkpoint-6")


def test_nothing_to_resume_from(tmp_path, copied):
    assert last_good_checkpoint(tmp_path / "none") is None
    (tmp_path / "empty").mkdir()
    assert last_good_checkpoint(tmp_path / "empty") is None
    for path in copied.glob("checkpoint-*"):
        (path / "optimizer.pt").write_bytes(b"")
    assert last_good_checkpoint(copied) is None


@pytest.mark.parametrize("header", [b"[]", b"1", b'{"a": 1}', b'{"a": {"data_offsets": 5}}', b"\xff\xfe", b""])
def test_strange_headers(tmp_path, header):
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert safetensors_fault(file) is not None


def test_a_resumed_run_takes_the_earlier_one(copied):
    (copied / "checkpoint-6" / "scheduler.pt").write_bytes(b"PK")
    trainer, callback = sapo_trainer(copied, config=SapoConfig(probe_examples=2))
    trainer.train(resume_from_checkpoint=last_good_checkpoint(copied))
    assert trainer.state.global_step == 6 and [s.step for s in callback.history] == [0]


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_checkpoints_of_fsdp(copied, kind):
    """As accelerate writes them: whole files of their own, or folders; with the adapter or without."""
    newest = copied / "checkpoint-6"
    (newest / "optimizer.pt").rename(newest / "optimizer.bin")
    shutil.copy(newest / "optimizer.bin", newest / "pytorch_model_fsdp.bin")
    if kind == "sharded":
        for name, folder in (("optimizer.bin", "optimizer_0"), ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_0")):
            (newest / folder).mkdir()
            (newest / name).rename(newest / folder / "__0_0.distcp")
    assert last_good_checkpoint(copied) == str(newest)
    (newest / "adapter_model.safetensors").unlink()
    assert last_good_checkpoint(copied) == str(newest)
    if kind == "full":
        for name in ("optimizer.bin", "pytorch_model_fsdp.bin"):
            content = (newest / name).read_bytes()
            (newest / name).write_bytes(content[:-3])
            assert name in checkpoint_fault(newest, 6)
            (newest / name).write_bytes(content)
        (newest / "pytorch_model_fsdp.bin").unlink()
        assert "expected one of" in checkpoint_fault(newest, 6), "an optimizer alone is no model"


def test_adapters_in_folders_of_their_own(copied):
    newest = copied / "checkpoint-6"
    (newest / "second").mkdir()
    (newest / "adapter_model.safetensors").rename(newest / "second" / "adapter_model.safetensors")
    assert checkpoint_fault(newest, 6) is None
    (newest / "second" / "adapter_model.safetensors").write_bytes(b"")
    assert "second/adapter_model.safetensors" in checkpoint_fault(newest, 6)


def test_a_checkpoint_of_the_model_alone_is_resumed_and_said(tmp_path, caplog):
    options = dict(config=SapoConfig(every_steps=2, probe_examples=2), save_strategy="steps", save_steps=2)
    trainer, _ = sapo_trainer(tmp_path, **options, save_only_model=True, max_steps=4)
    trainer.train()
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    with caplog.at_level(logging.WARNING, logger="sapo_peft"):
        newest = last_good_checkpoint(tmp_path)
    assert newest == str(tmp_path / "checkpoint-4") and "optimizer and learning rate begin anew" in caplog.text
    trainer, callback = sapo_trainer(tmp_path, **options, max_steps=7)
    trainer.train(resume_from_checkpoint=newest)
    assert trainer.state.global_step == 7 and [scoring.step for scoring in callback.history] == [0, 2, 6]
