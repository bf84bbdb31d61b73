"""One adapter of a run: the logits of all its adapters together, in a folder that PEFT and servers load."""

from __future__ import annotations

import json
import os

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from sapo_kernels.files import DataError
from sapo_kernels.manifest import check_manifest
from sapo_peft.loading import load
from sapo_peft.sequence import export_adapter, load_adapters
from sapo_peft.trainer.records import CARD_TITLE
from tests.oracles import small_qwen3
from tests.sequence.sequence_helpers import model_and_tokenizer, run_begun, run_small


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 82).view(2, 40)).logits


@pytest.mark.parametrize("method, rank", [("lora-inc", 12), ("seq-lora", 4)])
def test_logits_are_those_of_all_adapters(tmp_path, method, rank):
    run_small(tmp_path / "run", 3, method=method, target_modules="all-linear", policy="random")
    made = export_adapter(tmp_path / "run", tmp_path / "one")
    assert (made.rank, made.tasks, made.planned) == (rank, ["colours1", "colours2", "colours3"], 3)
    base = logits(model_and_tokenizer()[0])
    together = logits(load_adapters(model_and_tokenizer()[0], tmp_path / "run"))
    alone = PeftModel.from_pretrained(model_and_tokenizer()[0], tmp_path / "one").eval()
    assert (together - base).abs().max() > 0.1
    torch.testing.assert_close(logits(alone), together, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(alone.merge_and_unload()), together, rtol=0, atol=1e-4)


def test_the_folder_is_a_plain_adapter_with_prompts_card_and_manifest(tmp_path, monkeypatch):
    run_small(tmp_path / "run", 2, policy="worst")
    export_adapter(tmp_path / "run", tmp_path / "deep" / "one")
    folder = tmp_path / "deep" / "one"
    check_manifest(folder, "sapo_adapter")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "sapo_manifest.json", "sapo_prompts.json"
    ]  # fmt: skip
    assert sorted(path.name for path in folder.parent.iterdir()) == ["one"]
    options = json.loads((folder / "adapter_config.json").read_text())
    assert (options["peft_type"], options["r"], options["lora_alpha"], options["bias"]) == ("LORA", 8, 64, "none")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    # What vLLM reads: a module's path and the two factors, nothing of an adapter's name.
    assert shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0] == 8
    assert shapes["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][1] == 8 and len(shapes) == 8
    record = json.loads((folder / "sapo_prompts.json").read_text())
    for number in (1, 2):
        (one,) = (tmp_path / "run" / "tasks").glob(f"0{number}-*/adapter/sapo_prompts.json")
        assert record["tasks"][f"colours{number}"] == json.loads(one.read_text())["tasks"][f"colours{number}"]
    assert "earlier" not in record
    card = (folder / "README.md").read_text()
    assert card.count(CARD_TITLE) == 1 and "All 2 adapters" in card and "the policy worst" in card
    assert card.index(record["tasks"]["colours2"]["prompt"]) < card.index("Model Card for")
    mode = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(mode) == 1
    monkeypatch.setattr("sapo_peft.tiny_random.tiny_model", small_qwen3)
    assert load("tiny", str(folder), "float32", "cpu")[0].active_adapters


def test_of_a_run_that_is_going_on_the_tasks_that_are_done(tmp_path):
    run_begun(tmp_path / "run", 2, count=3)
    made = export_adapter(tmp_path / "run", tmp_path / "one")
    assert (made.rank, made.tasks, made.planned) == (8, ["colours1", "colours2"], 3)


def test_refusals_leave_everything_as_it_was(tmp_path):
    run_small(tmp_path / "run", 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in ("full", "file"):
        with pytest.raises(DataError, match=f"{out}: expected a folder that is not there or is empty"):
            export_adapter(tmp_path / "run", tmp_path / out)
    with pytest.raises(DataError, match="full: expected the folder of a run, got one without run.json"):
        export_adapter(tmp_path / "full", tmp_path / "one")
    config = next((tmp_path / "run").glob("tasks/02-*/adapter/adapter_config.json"))
    kept = config.read_bytes()
    config.write_bytes(kept.replace(b'"use_dora": false', b'"use_dora": true'))
    with pytest.raises(DataError, match="adapter_config.json: expected s.* as in sapo_manifest.json"):
        export_adapter(tmp_path / "run", tmp_path / "one")
    config.write_bytes(kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "run"]
    # What one that was killed has left is no obstacle.
    os.makedirs(tmp_path / ".one.part" / "x")
    export_adapter(tmp_path / "run", tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "one", "run"]
