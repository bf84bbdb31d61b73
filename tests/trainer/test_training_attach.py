"""What attach_sapo refuses, leaving the trainer as it was, and what is written beside the adapter."""

from __future__ import annotations

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import Trainer

from sapo_kernels.files import read_json
from sapo_peft import PromptPool, SapoConfig, attach_sapo
from tests.oracles import CHATML, THINKING, byte_tokenizer
from tests.trainer.training_helpers import colours, plain_trainer, pool_of, sapo_trainer


def everything(trainer) -> dict:
    """Everything of a trainer that attaching could have changed."""
    return {
        "attributes": {name: id(value) for name, value in vars(trainer).items()},
        "args": trainer.args.to_dict(),
        "callbacks": list(map(id, trainer.callback_handler.callbacks)),
        "state": trainer.state.__dict__.copy(),
    }


TOKENISED = [{"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 1]}]
MIXED = [*colours(2, "colours"), *colours(2, "other")]


@pytest.mark.parametrize(
    ("options", "arguments", "error", "wanted"),
    [
        ({"tokenizer": False}, {}, ValueError, "expected one made with processing_class=tokenizer, got none"),
        ({"data": []}, {}, ValueError, "expected a train_dataset with examples and a length, got list"),
        ({"data": TOKENISED}, {}, ValueError, r"got \['attention_mask', 'input_ids', 'labels'\].*skip_prepare_dataset"),
        ({"data": [("a", "b")]}, {}, ValueError, "expected raw examples with input/target.* got tuple"),
        ({"data": [{"input": 1, "target": "b"}]}, {}, TypeError, "'input': expected a string, got int"),
        ({"data": MIXED}, {}, ValueError, r"expected a 'task' among \['colours'\], got 'other'"),
        ({"data": MIXED}, {"config": SapoConfig(at_start=False)}, ValueError, "'task' among"),
        ({}, {"pools": [pool_of(2, "a"), pool_of(2, "b")]}, ValueError, r"'task' among \['a', 'b'\], got None"),
        ({}, {"pools": [pool_of(2, "a"), pool_of(3, "a")]}, ValueError, "got a name twice"),
        ({}, {"pools": []}, ValueError, "expected at least one PromptPool"),
        ({}, {"pools": {}}, ValueError, "expected at least one PromptPool"),
        ({}, {"pools": ["Say it."]}, ValueError, "PromptPool"),
        ({}, {"pools": [PromptPool.build("t", "Say <|im_end|> it.")]}, ValueError, "special token"),
        ({}, {"probe": []}, ValueError, "task 'colours': expected at least one example to score on, got none"),
        ({}, {"probe": {}}, ValueError, "task 'colours': expected at least one example to score on, got none"),
        ({}, {"probe": [{"text": "x"}]}, ValueError, "example 0: expected the target column"),
        ({}, {"probe": [{"input": "x", "target": ""}]}, ValueError, "target"),
        ({}, {"probe": {"colours": colours(2), "color": colours(2)}}, ValueError, "color"),
        ({"data": [*colours(2, "a")]}, {"pools": [pool_of(2, "a"), pool_of(2, "b")]}, ValueError,
         "task 'b': expected at least one example"),
        ({}, {"pools": None}, TypeError, "pools: expected a PromptPool, a list of them or one by task, got NoneType"),
        ({}, {"probe": "abc"}, TypeError, "probe: expected a list of examples, or one by task, got str"),
        ({}, {"probe": [1, 2]}, TypeError, "expected a mapping with two texts, got int"),
        ({}, {"probe": {"colours": "abc"}}, TypeError, "probe: task 'colours': expected a list of examples, got str"),
        ({}, {"config": {"every_steps": 2}}, TypeError, "config: expected a SapoConfig, got dict"),
        ({"logging_strategy": "no"}, {"config": SapoConfig(drift=4.0)}, ValueError, "expected a logging_strategy, got"),
        ({"accelerator_config": {"dispatch_batches": True}}, {}, ValueError, "dispatch_batches=True cannot"),
        # What the collator would find after hours.
        ({"data": [*colours(9), {"input": "a"}]}, {}, ValueError, "train_dataset: row 9: expected the target column"),
        ({"data": [*colours(9), 3]}, {}, TypeError, "train_dataset: row 9: .*got int"),
        ({"data": [*colours(9), {"input": "a", "target": " "}]}, {}, ValueError, "row 9: .*expected a target"),
        ({"data": Dataset.from_list([*colours(9), {"input": "a", "target": ""}])}, {}, ValueError,
         "row 9: .*expected a target"),
        ({"data": Dataset.from_list([*colours(9), {"input": "a", "target": None}])}, {}, TypeError,
         "row 9: 'target': expected a string, got NoneType"),
        ({"data": Dataset.from_list(MIXED)}, {}, ValueError, "row 2: .*'task' among .* got 'other'"),
        ({"data": [{"messages": [{"role": "tool", "content": "a"}]}]}, {"config": SapoConfig(at_start=False)},
         ValueError, "row 0: .*message 0: expected one of the roles .* without tools, got 'tool'"),
        ({"eval_dataset": TOKENISED}, {}, ValueError, r"eval_dataset: expected raw examples .* got \['attention_mask'"),
        ({"eval_dataset": {"x": colours(2), "y": TOKENISED}}, {}, ValueError, r"eval_dataset\['y'\]: expected raw"),
        ({"eval_dataset": MIXED}, {}, ValueError, r"eval_dataset: row 2: example: .* 'task' among .* 'other'"),
        ({}, {"config": SapoConfig(max_source=5)}, ValueError, "max_source"),
        ({}, {"config": SapoConfig(template="{prompt} alone")}, ValueError, "template: expected {prompt} and {input}"),
    ],
)  # fmt: skip
def test_a_refusal_leaves_the_trainer_as_it_was(tmp_path, options, arguments, error, wanted):
    trainer = plain_trainer(tmp_path, **options)
    before = everything(trainer)
    with pytest.raises(error, match=wanted):
        attach_sapo(trainer, **{"pools": pool_of(), **arguments})
    assert everything(trainer) == before


def test_attached_twice_and_to_something_that_is_no_trainer(tmp_path):
    trainer, callback = sapo_trainer(tmp_path, max_steps=1)
    before = everything(trainer)
    with pytest.raises(ValueError, match="got one that it is attached to already"):
        attach_sapo(trainer, pool_of())
    assert everything(trainer) == before
    trainer.train()
    assert len(callback.history) == 1
    almost = SimpleNamespace(processing_class=object(), args=object(), train_dataset=colours(2))
    with pytest.raises(TypeError, match="expected a transformers Trainer with train"):
        attach_sapo(almost, pool_of())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "medium"), ("temperature", float("nan")), ("floor", 1.1), ("decay", True), ("drift", float("inf")),
        ("probe_examples", 2.0), ("every_steps", 0), ("max_target", None), ("at_start", 1),
    ],
)  # fmt: skip
def test_bad_options(name, value):
    with pytest.raises(ValueError, match=f"^'{name}': expected .*, got "):
        SapoConfig(**{name: value})


@pytest.mark.parametrize("found", [None, colours(3), {"a": colours(2), "b": colours(3)}, iter(colours(2))])
def test_evaluation_datasets_that_are_fine(tmp_path, found):
    trainer, _ = sapo_trainer(tmp_path, eval_dataset=found)
    if isinstance(found, dict):
        assert {"eval_a_loss", "eval_b_loss"} <= set(trainer.evaluate())


def test_datasets_whose_rows_are_made_when_they_are_read(tmp_path):
    """A transform of the user's: the columns are not the rows. Other columns are nobody's business."""
    raw = Dataset.from_list([{"text": f"{i}|red"} for i in range(6)])
    made = raw.with_transform(
        lambda batch: {"input": [t.split("|")[0] for t in batch["text"]],
                       "target": [t.split("|")[1] for t in batch["text"]]}
    )  # fmt: skip
    plain = Dataset.from_list([{**row, "id": 3} for row in colours(6)])
    for data in (made, plain):
        trainer, callback = sapo_trainer(tmp_path, data=data, max_steps=1)
        trainer.train()
        assert len(callback.history) == 1


def test_prompts_that_the_tokenizer_rules_out_are_reported(tmp_path, caplog):
    """Those that the pool had rejected before are old news."""
    pool = PromptPool.build("colours", "Say it.", ["Say it now.", "Say <|im_end|> it.", "Bad\0one"])
    assert len(pool.prompts) == 3 and len(pool.rejected) == 1
    with caplog.at_level("WARNING", logger="sapo_peft"):
        _, callback = sapo_trainer(tmp_path, pool)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "sapo_peft"]
    assert line.startswith('task "colours": a prompt is left out with this tokenizer: expected plain text, got the')
    assert '"Say <|im_end|> it."' in line
    assert callback.choice.pools["colours"].prompts == ("Say it.", "Say it now.")


def test_the_chat_template_of_a_processor_counts(tmp_path):
    """Processors of several kinds of input keep it themselves; their tokenizer may have none, or an older one."""
    for inner, outer in ((None, CHATML), (THINKING, CHATML), (CHATML, None), (CHATML, CHATML)):
        trainer = plain_trainer(tmp_path)
        tokenizer = byte_tokenizer(chat_template=inner)
        trainer.processing_class = SimpleNamespace(tokenizer=tokenizer, chat_template=outer)
        attach_sapo(trainer, pool_of())
        (row,) = trainer.data_collator(colours(1))["input_ids"].tolist()
        text = tokenizer.decode(row)
        assert text.startswith("<|im_start|>user\nSay the colour.\n\nText:\n") and "<think>" not in text
        assert tokenizer.chat_template == inner, "the user's tokenizer is left alone"


def test_the_collator_was_chosen_for_this_trainer_only(tmp_path):
    trainer, _ = sapo_trainer(tmp_path)
    other = plain_trainer(tmp_path)
    assert type(other).get_train_dataloader is not type(trainer).get_train_dataloader
    assert isinstance(trainer, type(other)) and type(trainer).__name__ == type(other).__name__


# Beside the adapter.


def test_the_prompts_are_beside_the_adapter_wherever_it_is_saved(tmp_path):
    trainer, callback = sapo_trainer(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    wanted = json.loads(json.dumps(callback.prompts()))
    for place in (tmp_path, tmp_path / "checkpoint-3", tmp_path / "checkpoint-6"):
        assert read_json(place / "sapo_prompts.json", max_bytes=10**6) == wanted
        assert (place / "adapter_model.safetensors").is_file()
    entry = wanted["tasks"]["colours"]
    pool = callback.choice.pools["colours"]
    index = callback.history[-1].chosen["colours"]
    assert (entry["index"], entry["prompt"], entry["original"]) == (index, pool.prompts[index], pool.prompts[0])
    losses = callback.history[-1].losses["colours"]
    assert (entry["loss"], entry["original_loss"], entry["suffix"]) == (losses[index], losses[0], "One word.")
    assert wanted["version"] == 1 and wanted["step"] == 0 and wanted["mode"] == "hard"


def test_a_method_that_asks_the_trainer_for_its_class_still_finds_its_base(tmp_path):
    """``super(self.__class__, self)`` is the wrong way, and works where nobody makes a subclass."""

    class Old(Trainer):
        def training_step(self, *args, **kwargs):
            return super(self.__class__, self).training_step(*args, **kwargs)

    trainer, _ = sapo_trainer(tmp_path, trainer_class=Old, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.__class__ is Old and isinstance(trainer, Old)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_attached_trainer_is_not_copied(tmp_path, copied):
    """Its callback would go on with the trainer that it was attached to."""
    copied(plain_trainer(tmp_path))
    trainer, _ = sapo_trainer(tmp_path)
    with pytest.raises(TypeError, match="trainer: expected one without SAPO to copy or pickle"):
        copied(trainer)


def test_a_run_without_scoring_says_so(tmp_path):
    trainer, callback = sapo_trainer(tmp_path, config=SapoConfig(at_start=False), max_steps=1)
    trainer.train()
    record = callback.prompts()
    assert record["step"] is None and record["tasks"]["colours"]["loss"] is None
    assert record["tasks"]["colours"]["prompt"] == pool_of().prompts[0]
