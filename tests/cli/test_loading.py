"""Models, tokenizers and adapters from folders: scored as they are, or refused when something is missing."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import sapo_kernels as sk
from sapo_peft import tiny_model, tiny_tokenizer
from tests.cli.cli_helpers import PROMPTS, ROWS, SCORE, one_line_error, put, ranks


@pytest.fixture
def folder(files, model):
    """`m`, the tiny model and its tokenizer."""
    model.save_pretrained("m")
    tiny_tokenizer().save_pretrained("m")
    return files / "m"


def save(tensors, path):
    save_file(tensors, path, metadata={"format": "pt"})


def test_local_model_and_adapter(files, sapo, folder):
    plain = ranks(sapo(*SCORE)[1])
    code, out, _ = sapo(*SCORE, "--model", "m")
    assert code == 0 and ranks(out) == plain
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(tiny_model(), lora)
    wrapped.save_pretrained("a")
    adapter = ("--model", "m", "--adapter", "a")
    code, out, err = sapo(*SCORE, *adapter, "--compare")
    assert code == 0 and ranks(out) != plain and err == ""
    expected = sk.score_prompts(wrapped.eval(), PROMPTS, ROWS, tokenizer=tiny_tokenizer())
    assert [index for index, _ in ranks(out)] == expected.ranking()

    # Half an adapter, another shape, damaged files: all refused, none scored with what is left.
    weights, file = load_file("a/adapter_model.safetensors"), files / "a" / "adapter_model.safetensors"
    for tensors, word in (
        (dict(list(weights.items())[1:]), "lacks 1 tensors"),
        ({**weights, "base_model.model.extra.lora_A.weight": torch.zeros(2)}, "has in excess 1 tensors"),
        ({name: value[:, :3].clone() for name, value in weights.items()}, "size mismatch"),
    ):
        save_file(tensors, file)
        one_line_error(sapo(*SCORE, *adapter), "--adapter a", word)
    put(file, b"\x80\x04K\x01.")
    one_line_error(sapo(*SCORE, *adapter), "--adapter a")
    file.rename(file.with_suffix(".bin"))
    one_line_error(sapo(*SCORE, *adapter), "adapter_model.safetensors", "pickled")
    (files / "a" / "adapter_config.json").unlink()
    one_line_error(sapo(*SCORE, *adapter), "adapter_config.json")
    other = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2))
    get_peft_model(other, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained("b")
    one_line_error(sapo(*SCORE, "--adapter", "b"), "--adapter b", "expected an adapter for this model")


def test_damaged_model_folders(sapo, folder):
    def refused(*words):
        one_line_error(sapo(*SCORE, "--model", "m"), *words)

    weights = load_file("m/model.safetensors")
    lost = "model.layers.2.mlp.up_proj.weight"
    save({name: value for name, value in weights.items() if name != lost}, "m/model.safetensors")
    refused("--model m", "1 missing", lost)
    save({**weights, "lm_head.weight": torch.zeros(5, 128)}, "m/model.safetensors")
    refused("--model m")
    # A layer less than the weights have would be another model; a part of no layer is none of ours.
    save({**weights, "vision.tower.weight": torch.zeros(2)}, "m/model.safetensors")
    assert sapo(*SCORE, "--model", "m")[0] == 0
    config = json.loads((folder / "config.json").read_text())
    put(folder / "config.json", {**config, "num_hidden_layers": 1, "layer_types": config["layer_types"][:1]})
    refused("--model m", "of layers that config.json does not have", "model.layers.1.")
    put(folder / "config.json", config)
    # In several files: none of them is missing, and the list of them is one.
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    index, shards = folder / "model.safetensors.index.json", sorted(folder.glob("model-*"))
    assert len(shards) > 2 and sapo(*SCORE, "--model", "m")[0] == 0
    shards[1].unlink()
    refused("--model m", "No such file", shards[1].name)
    for text, words in (("[]", "expected an object, got []"), ('{"a": 1, "a": 2}', "expected each key once")):
        put(index, text)
        refused("model.safetensors.index.json", words)
    put(folder / "model.safetensors", (2**63).to_bytes(8, "little") + b"{}")
    index.unlink()
    refused("--model m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    refused("--model m", ".safetensors")
    put(folder / "config.json", '{"model_type": "qwen3", "model_type": "gpt2"}')
    refused("config.json", "each key once")
    (folder / "config.json").unlink()
    refused("--model m", "config.json")


def test_no_code_from_a_model_folder_and_no_hub(files, sapo, folder, monkeypatch):
    put(folder / "evil.py", "open('ran', 'w')\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}}
    put(folder / "config.json", config)
    one_line_error(sapo(*SCORE, "--model", "m"), "--model m")
    assert not (files / "ran").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    one_line_error(sapo(*SCORE, "--tokenizer", "m"), "tokenizer m", "tokenizer.json")
    # Without a network at once, and not after a minute of retries.
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: 1 / 0)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("asked again"))
    one_line_error(sapo(*SCORE, "--model", "nobody/no-such-model"), "--model nobody/no-such-model", "hub")
    if not torch.cuda.is_available():
        one_line_error(sapo(*SCORE, "--device", "cuda"), "--device cuda")
