"""Models, tokenizers and adapters from folders: scored as they are, or refused when something is missing."""

import json

import torch

import sapo_kernels as sk
from sapo_peft import tiny_model, tiny_tokenizer
from tests.cli import cli_helpers
from tests.cli.cli_helpers import PROMPTS, ROWS, SCORE, one_line_error, ranks

files = cli_helpers.files
model = cli_helpers.model
sapo = cli_helpers.sapo


def test_local_model_and_adapter(files, sapo, model):
    from peft import LoraConfig, get_peft_model

    model.save_pretrained("m")
    tiny_tokenizer().save_pretrained("m")
    plain = ranks(sapo(*SCORE)[1])
    code, out, _ = sapo(*SCORE, "--model", "m")
    assert code == 0 and ranks(out) == plain

    wrapped = get_peft_model(
        tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained("a")
    code, out, err = sapo(*SCORE, "--model", "m", "--adapter", "a", "--compare")
    assert code == 0 and ranks(out) != plain and err == ""
    expected = sk.score_prompts(wrapped.eval(), PROMPTS, ROWS, tokenizer=tiny_tokenizer())
    assert [index for index, _ in ranks(out)] == expected.ranking()

    # Half an adapter, another shape, damaged files: all refused, none scored with what is left.
    from safetensors.torch import load_file, save_file

    weights = load_file("a/adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), "a/adapter_model.safetensors")
    one_line_error(sapo(*SCORE, "--model", "m", "--adapter", "a"), "--adapter a", "lacks 1 tensors")
    save_file({**weights, "base_model.model.extra.lora_A.weight": torch.zeros(2)}, "a/adapter_model.safetensors")
    one_line_error(sapo(*SCORE, "--model", "m", "--adapter", "a"), "--adapter a", "has in excess 1 tensors")
    save_file({name: value[:, :3].clone() for name, value in weights.items()}, "a/adapter_model.safetensors")
    one_line_error(sapo(*SCORE, "--model", "m", "--adapter", "a"), "--adapter a", "size mismatch")
    (files / "a" / "adapter_model.safetensors").write_bytes(b"\x80\x04K\x01.")
    one_line_error(sapo(*SCORE, "--model", "m", "--adapter", "a"), "--adapter a")
    (files / "a" / "adapter_model.safetensors").rename(files / "a" / "adapter_model.bin")
    one_line_error(sapo(*SCORE, "--model", "m", "--adapter", "a"), "adapter_model.safetensors", "pickled")
    (files / "a" / "adapter_config.json").unlink()
    one_line_error(sapo(*SCORE, "--model", "m", "--adapter", "a"), "adapter_config.json")


def test_adapter_for_another_model(files, sapo, model):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2))
    get_peft_model(other, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained("a")
    one_line_error(sapo(*SCORE, "--adapter", "a"), "--adapter a", "wanted an adapter for this model")


def test_damaged_model_folders(files, sapo, model):
    from safetensors.torch import load_file, save_file

    model.save_pretrained("m")
    one_line_error(sapo(*SCORE, "--model", "m"), "tokenizer m", "tokenizer.json")
    tiny_tokenizer().save_pretrained("m")
    weights = load_file("m/model.safetensors")

    rest = {name: value for name, value in weights.items() if name != "model.layers.2.mlp.up_proj.weight"}
    save_file(rest, "m/model.safetensors", metadata={"format": "pt"})
    one_line_error(sapo(*SCORE, "--model", "m"), "--model m", "1 missing", "model.layers.2.mlp.up_proj.weight")
    save_file({**weights, "lm_head.weight": torch.zeros(5, 128)}, "m/model.safetensors", metadata={"format": "pt"})
    one_line_error(sapo(*SCORE, "--model", "m"), "--model m")
    (files / "m" / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    one_line_error(sapo(*SCORE, "--model", "m"), "--model m")
    (files / "m" / "model.safetensors").rename(files / "m" / "pytorch_model.bin")
    one_line_error(sapo(*SCORE, "--model", "m"), "--model m", ".safetensors")
    (files / "m" / "config.json").write_text('{"model_type": "qwen3", "model_type": "gpt2"}')
    one_line_error(sapo(*SCORE, "--model", "m"), "config.json", "each key once")
    (files / "m" / "config.json").unlink()
    one_line_error(sapo(*SCORE, "--model", "m"), "--model m", "config.json")


def test_no_code_from_a_model_folder(files, sapo, model):
    model.save_pretrained("m")
    tiny_tokenizer().save_pretrained("m")
    (files / "m" / "evil.py").write_text("open('ran', 'w')\nclass Model: pass\n")
    config = json.loads((files / "m" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}}
    (files / "m" / "config.json").write_text(json.dumps(config))
    one_line_error(sapo(*SCORE, "--model", "m"), "--model m")
    assert not (files / "ran").exists()


def test_hub_name_without_a_hub(files, sapo, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    one_line_error(sapo(*SCORE, "--model", "nobody/no-such-model"), "--model nobody/no-such-model", "hub")
