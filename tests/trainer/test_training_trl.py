"""TRL's SFTTrainer: prompt-completion data, the loss on completions only, and what cannot be combined."""

from __future__ import annotations

import math

import pytest
from datasets import Dataset
from peft import LoraConfig

from sapo_peft import SapoConfig, attach_sapo
from tests.oracles import CHATML, byte_tokenizer, small_qwen3
from tests.trainer.test_training_attach import everything
from tests.trainer.training_helpers import AtSteps, choices, colours, curve, pool_of, prefer, record_batches, texts_of

trl = pytest.importorskip("trl", reason="TRL is not installed")


def sft_trainer(out, rows=None, **options):
    """An SFTTrainer of 4 steps on rows of prompt and completion."""
    if rows is None:
        rows = [{"prompt": row["input"], "completion": row["target"]} for row in colours(16)]
    defaults = dict(
        output_dir=str(out), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, seed=1,
        gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    model = options.pop("model", None) or small_qwen3()
    return trl.SFTTrainer(
        model, trl.SFTConfig(**{**defaults, **options}), train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(chat_template=CHATML),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}, {"gradient_checkpointing": True},
     {"bf16": True}],
    ids=["plain", "accumulation and workers", "checkpointing", "bf16"],
)  # fmt: skip
def test_it_trains_on_the_completion_under_the_chosen_prompt(tmp_path, options):
    trainer = sft_trainer(tmp_path, **options)
    callback = attach_sapo(trainer, pool_of(), config=SapoConfig(every_steps=1, probe_examples=2))
    wanted = [1, 2, 0, 1]
    prefer(callback, wanted)
    batches = record_batches(trainer)
    trainer.train()
    assert [chosen["colours"] for _, chosen in choices(callback)] == wanted
    answers = {row["input"]: row["target"] for row in colours(16)}
    prompts = callback.choice.pools["colours"].prompts
    for batch in batches:
        for context, response in texts_of(trainer, batch):
            assert f"user\n{prompts[wanted[batch['step']]]}\n\nText:\n" in context
            assert response == answers[context.split("Text:\n")[1].split("\n")[0]] + "<|im_end|>\n"
    assert len(curve(trainer)) == 4 and all(math.isfinite(loss) for _, loss, _ in curve(trainer))


def test_conversations(tmp_path):
    """TRL's two layouts of messages; the instruction is in the turn that is asked for."""
    talks = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["input"]},
              {"role": "assistant", "content": row["target"]}] for row in colours(16)]  # fmt: skip
    seen = []
    for rows in ([{"messages": talk} for talk in talks],
                 [{"prompt": talk[:2], "completion": talk[2:]} for talk in talks]):  # fmt: skip
        trainer = sft_trainer(tmp_path, rows, max_steps=2)
        config = SapoConfig(probe_examples=2, instruction_role="system")
        callback = attach_sapo(trainer, pool_of(), config=config)
        batches = record_batches(trainer)
        trainer.train()
        (entry,) = callback.prompts()["tasks"].values()
        assert entry["instruction_role"] == "system"
        wanted = f"Be brief.\n\n{entry['prompt']}<|im_end|>"
        seen.append([text for batch in batches for text in texts_of(trainer, batch)])
        assert len(seen[-1]) == 4 and all(wanted in context for context, _ in seen[-1])
    assert seen[0] == seen[1]


def test_the_means_of_trl_are_kept(tmp_path):
    """SFTTrainer.log empties its running means; a scoring in between must not."""
    trainer = sft_trainer(tmp_path, logging_steps=4)
    attach_sapo(trainer, pool_of(1), config=SapoConfig(every_steps=1, probe_examples=2))
    held = []
    trainer.add_callback(AtSteps(lambda step: held.append(len(trainer._metrics["train"]["mean_token_accuracy"]))))
    trainer.train()
    assert held == [1, 2, 3, 4]
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert 0 <= row["mean_token_accuracy"] <= 1


def test_saving_and_resuming(tmp_path):
    def run(folder, steps, **train):
        trainer = sft_trainer(folder, max_steps=6, save_strategy="steps", save_steps=3, lr_scheduler_type="constant")
        callback = attach_sapo(trainer, pool_of(), config=SapoConfig(every_steps=2, probe_examples=2))
        trainer.train(**train)
        return curve(trainer), choices(callback)

    whole = run(tmp_path, 6)
    assert run(tmp_path / "again", 6, resume_from_checkpoint=str(tmp_path / "checkpoint-3")) == whole
    card = (tmp_path / "checkpoint-6" / "README.md").read_text()
    assert card.count("## Prompt that this adapter was trained with") == 1
    assert (tmp_path / "checkpoint-6" / "sapo_prompts.json").is_file()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"packing": True, "dataset_kwargs": None}, "packing=True joins examples tokenised ahead"),
        ({"padding_free": True, "dataset_kwargs": None, "max_length": None}, "padding_free=True joins examples"),
        # Without skip_prepare_dataset TRL tokenises the examples when the trainer is made.
        ({"dataset_kwargs": None}, "expected raw examples .*skip_prepare_dataset"),
        ({"completion_only_loss": False}, "completion_only_loss=False"),
    ],
    ids=["packing", "padding free", "tokenised", "loss on everything"],
)
def test_what_cannot_be_combined_is_refused_and_the_trainer_is_as_it_was(tmp_path, options, wanted):
    trainer = sft_trainer(tmp_path, **options)
    before = everything(trainer)
    with pytest.raises(ValueError, match=wanted):
        attach_sapo(trainer, pool_of())
    assert everything(trainer) == before
    if "dataset_kwargs" in options:
        trainer.train()
        assert trainer.state.global_step == 4


def test_losses_and_metrics_over_tries_are_those_of_padded_rows(tmp_path):
    rows = {}
    for packing in ("padded", "trie"):
        trainer = sft_trainer(tmp_path / packing, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        callback = attach_sapo(trainer, pool_of(), config=SapoConfig(probe_examples=2, packing=packing))
        trainer.train()
        rows[packing] = [row for row in trainer.state.log_history if "mean_token_accuracy" in row]
    assert callback.packing.tokens and len(rows["trie"]) == 4
    for got, wanted in zip(rows["trie"], rows["padded"], strict=True):
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
            assert math.isclose(got[name], wanted[name], rel_tol=1e-4), name
