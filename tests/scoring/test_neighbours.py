"""Where score_prompts meets other libraries: Trainer.evaluate, activated LoRA, offloading, template dialects."""

from __future__ import annotations

import pytest
import torch

import sapo_kernels as sk
from sapo_peft import plain_scores
from tests.families import TOLERANCE, plain_nll
from tests.oracles import byte_tokenizer, small_qwen3


def job(seed: int = 0, prompts: int = 2, examples: int = 10, low: int = 5) -> sk.ResponseCache:
    generator = torch.Generator().manual_seed(seed)

    def ids(least, most):
        count = int(torch.randint(least, most, (1,), generator=generator))
        return torch.randint(low, 60, (count,), generator=generator).tolist()

    instructions, inputs = [ids(4, 12) for _ in range(prompts)], [ids(1, 20) for _ in range(examples)]
    return sk.ResponseCache.from_token_ids([[i + x for x in inputs] for i in instructions], [ids(1, 6) for _ in inputs])


@pytest.mark.parametrize("batch_size", [4, 8])
def test_batch_reduction_is_what_trainer_evaluate_gives(batch_size, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, cache = small_qwen3(), job(prompts=1)
    rows = []
    for context, response in zip(cache.contexts[0], cache.responses[0], strict=True):
        rows.append({"input_ids": context + response, "labels": [-100] * len(context) + response})

    def collate(batch):
        width = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": 0, "labels": -100}
        made = {n: torch.tensor([r[n] + [f] * (width - len(r[n])) for r in batch]) for n, f in fill.items()}
        made["attention_mask"] = torch.tensor(
            [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in batch]
        )
        return made

    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=batch_size, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model=model, args=options, eval_dataset=rows, data_collator=collate)
    wanted = trainer.evaluate()["eval_loss"]
    scores = sk.score_prompts(model, cache)
    assert float(scores.reduce("batch", batch_size)[0]) == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted - float(scores.loss[0])) > 1e-4, "the job should tell the reductions apart"


def test_activated_lora_takes_the_padded_path():
    peft = pytest.importorskip("peft")
    cache = job()
    invocation = cache.contexts[0][0][2:4]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        alora_invocation_tokens=invocation,
    )  # fmt: skip
    model = peft.get_peft_model(small_qwen3(), config).eval()
    scores = sk.score_prompts(model, cache)
    assert scores.stats["path"] == "padded" and "invocation tokens" in scores.stats["reason"]
    masked = lambda **inputs: model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    assert float((scores.nll - plain_nll(model, cache, masked)).abs().max()) < TOLERANCE
    with pytest.raises(RuntimeError, match="invocation tokens"):
        sk.score_prompts(model, cache, impl="tree")


def test_offloaded_model():
    accelerate = pytest.importorskip("accelerate")
    model, cache = small_qwen3(), job()
    wanted = plain_scores(model, cache)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.device.type == "meta"
    scores = sk.score_prompts(model, cache)
    assert float((scores.nll - wanted).abs().max()) < TOLERANCE


PARTS = """{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
EXAMPLE = {"input": "an input", "target": "an answer"}


def test_chat_template_that_reads_a_list_of_parts():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PARTS
    cache = sk.ResponseCache.build(tokenizer, ["Say it."], [EXAMPLE])
    context, response = tokenizer.decode(cache.contexts[0][0]), tokenizer.decode(cache.responses[0][0])
    assert "Say it." in context and "an input" in context
    assert response.startswith("an answer") and cache.stats["boundary_breaks"] == 0


def test_chat_template_that_shows_nothing_is_an_error():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match="shows the user turn"):
        sk.ResponseCache.build(tokenizer, ["Say it."], [EXAMPLE])


@pytest.mark.parametrize(
    "option", [{"suffix": "x"}, {"template": "{prompt}{input}"}, {"max_target": 3}, {"instruction_role": "system"}]
)
def test_rendering_options_beside_a_cache_are_refused(option):
    with pytest.raises(ValueError, match="expected none beside a ResponseCache"):
        sk.score_prompts(small_qwen3(), job(), **option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"suffix": "a <|im_end|> b"}, "suffix: .*special token"),
        ({"max_source": 2.5}, "max_source: expected a whole number"),
    ],
)
def test_bad_build_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        sk.ResponseCache.build(byte_tokenizer(), ["Say it."], [EXAMPLE], **option)
