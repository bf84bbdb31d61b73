"""What is saved names the prompt it was trained with: the best model, the card, what is pushed."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from sapo_peft import SapoConfig
from sapo_peft.trainer.records import CARD_TITLE, PROMPTS_FILE, write_beside_adapter
from tests.trainer.training_helpers import colours, pool_of, prefer, sapo_trainer

# The best model.


def best_run(folder, best: int, wanted=(1, 2, 0), **options):
    """Evaluated and saved at steps 2, 4 and 6, scored at 0, 2 and 4; the loss of step `best` is made the lowest."""
    trainer, callback = sapo_trainer(
        folder, config=SapoConfig(every_steps=2, probe_examples=2), eval_dataset=colours(4), eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True, **options,
    )  # fmt: skip
    prefer(callback, list(wanted))
    evaluate = trainer.evaluate

    def judged(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        metrics["eval_loss"] = float(trainer.state.global_step != best)
        return metrics

    trainer.evaluate = judged
    return trainer, callback


@pytest.mark.parametrize("best", [2, 4, 6])
def test_the_best_model_goes_with_the_prompt_that_was_chosen_then(tmp_path, best, capsys):
    trainer, callback = best_run(tmp_path, best)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    index = {2: 2, 4: 0, 6: 0}[best]
    assert callback.choice.chosen.tolist() == [index]
    printed = capsys.readouterr().out
    assert printed.count("the best model goes with prompt 2 of task") == (best == 2)
    trainer.save_model()
    # The same as stands beside those weights in their checkpoint.
    record = json.loads((tmp_path / PROMPTS_FILE).read_text())
    assert record == json.loads((tmp_path / f"checkpoint-{best}" / PROMPTS_FILE).read_text())
    assert record["tasks"]["colours"]["index"] == index and record["step"] == min(best, 4)
    weights = (tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights
    # The history is that of the whole run, and evaluation renders with the prompt of the best.
    assert [scoring.step for scoring in callback.history] == [0, 2, 4]
    assert {callback.choice.prompt_for("colours", row, sample=False) for row in colours(2)} == {index}


def test_a_best_checkpoint_that_cannot_be_read_is_reported(tmp_path, caplog):
    trainer, callback = best_run(tmp_path, 2)
    load = trainer._load_best_model
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    trainer._load_best_model = lambda: (load(), state.write_text("{"))
    with caplog.at_level(logging.WARNING, logger="sapo_peft"):
        trainer.train()
    assert "the last ones stay" in caplog.text and callback.choice.chosen.tolist() == [0]


def test_a_resumed_run_with_the_best_model_of_before(tmp_path):
    """The best step lies before the one that is resumed from."""
    best_run(tmp_path, 2)[0].train()
    trainer, callback = best_run(tmp_path, 2, wanted=(1,), max_steps=8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert callback.choice.chosen.tolist() == [2] and callback.prompts()["step"] == 2


# The card.


def sections(folder) -> int:
    return (folder / "README.md").read_text().count(CARD_TITLE)


def test_a_card_that_is_made_anew_keeps_the_section(tmp_path):
    trainer, callback = sapo_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="colours")
    assert sections(tmp_path) == 1 and "colours" in (tmp_path / "README.md").read_text()
    trainer.save_model()
    trainer.create_model_card(tags=["a"])
    assert sections(tmp_path) == 1 and (tmp_path / PROMPTS_FILE).is_file()
    assert callback.prompts()["tasks"]["colours"]["prompt"] in (tmp_path / "README.md").read_text()


def test_the_section_comes_before_the_empty_form_of_peft(tmp_path):
    trainer, callback = sapo_trainer(tmp_path, max_steps=1)
    trainer.train()
    for _ in range(2):
        trainer.save_model()
        card = (tmp_path / "README.md").read_text()
        assert card.startswith("---\n") and card.index("library_name: peft") < card.index("\n---\n\n" + CARD_TITLE)
        assert card.index("PeftModel.from_pretrained(") < card.index("# Model Card for Model ID")
        assert sections(tmp_path) == card.count("arXiv 2606.01967") == card.count("Framework versions") == 1
        assert card.count("    " + callback.prompts()["tasks"]["colours"]["prompt"]) == 1
    trainer.save_model()
    assert (tmp_path / "README.md").read_text() == card, "however often it is saved"
    # A layout of the caller's is in the record, and the snippet does not claim to make it.
    callback.config = dataclasses.replace(callback.config, template="{prompt}: {input}")
    trainer.save_model()
    assert callback.prompts()["tasks"]["colours"]["template"] == "{prompt}: {input}"
    card = (tmp_path / "README.md").read_text()
    assert "sapo try FOLDER" in card and "PeftModel.from_pretrained(" not in card


def test_what_others_wrote_around_the_section_stays_and_a_prompt_stays_inside_its_block(tmp_path):
    card, head = tmp_path / "README.md", "---\na: 1\n---\n# Mine\n\nText.\n\n"
    # Also with the line ends of Windows.
    card.write_text(f"{head}{CARD_TITLE}\r\n\nold\n\n    # yours\n\n### Framework\n\n- PEFT\n\n## X")
    prompt = "First\n## A heading\n\n```\n<script>\n" + CARD_TITLE
    record = {"tasks": {"a\n# b": {"prompt": prompt}}}
    block = "\n".join("    " + line for line in prompt.split("\n"))
    for _ in range(3):
        write_beside_adapter(tmp_path, record)
        text = card.read_bytes().decode()
        assert text.startswith(f"{head}{CARD_TITLE}\n\nChosen by"), text
        assert f'Task "a\\n# b":\n\n{block}\n\n`sapo try FOLDER' in text, text
        assert text.endswith("skip_special_tokens=True))\n\n### Framework\n\n- PEFT\n\n## X\n"), text
        assert "\nold" not in text and "yours" not in text
    card.write_bytes(b"\xff\xfe no text")
    write_beside_adapter(tmp_path, record)
    assert card.read_bytes() == b"\xff\xfe no text" and json.loads((tmp_path / PROMPTS_FILE).read_text()) == record
    card.write_text("")
    write_beside_adapter(tmp_path, record)
    assert card.read_text().startswith(CARD_TITLE)


@pytest.mark.parametrize("trl", [False, True])
def test_what_is_pushed_has_the_section_and_the_prompts(tmp_path, monkeypatch, trl):
    uploaded = []

    def upload_folder(folder_path, **options):
        """The card and the prompts as they are at that moment."""
        files = [Path(folder_path) / name for name in ("README.md", PROMPTS_FILE)]
        uploaded.append([file.read_text() if file.is_file() else None for file in files])

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    if trl:
        pytest.importorskip("trl", reason="TRL is not installed")
        from sapo_peft import attach_sapo
        from tests.trainer.test_training_trl import sft_trainer

        trainer = sft_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        attach_sapo(trainer, pool_of(), config=SapoConfig(probe_examples=2))
    else:
        trainer, _ = sapo_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    # As with push_to_hub=True, but without a hub to ask for the repository.
    monkeypatch.setattr(trainer, "hub_model_id", "someone/colours", raising=False)
    monkeypatch.setattr(trainer, "push_in_progress", None, raising=False)
    trainer.args.push_to_hub = trainer.args.hub_always_push = True
    monkeypatch.setattr("transformers.trainer.PushInProgress", lambda jobs: None)
    trainer.train()
    assert len(uploaded) == 2, "once for each checkpoint"
    trainer.push_to_hub()
    for i, (card, prompts) in enumerate(uploaded):
        assert json.loads(prompts)["tasks"]["colours"]
        # The plain trainer makes no card before the end.
        assert (card or CARD_TITLE).count(CARD_TITLE) == 1, i
    assert uploaded[-1][0].count(CARD_TITLE) == 1


def test_a_folder_that_is_not_there_yet_is_made(tmp_path):
    """A model sharded by FSDP2 is written after `save_model` of the trainer returned."""
    write_beside_adapter(tmp_path / "a" / "checkpoint-3", {"tasks": {}})
    assert json.loads((tmp_path / "a" / "checkpoint-3" / PROMPTS_FILE).read_text()) == {"tasks": {}}
    trainer, _ = sapo_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer._save = lambda *args, **kwargs: None
    trainer.save_model(str(tmp_path / "b" / "c"))
    assert (tmp_path / "b" / "c" / PROMPTS_FILE).is_file()
