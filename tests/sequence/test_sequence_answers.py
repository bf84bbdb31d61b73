"""How a sequence run generates and where an answer ends."""

from __future__ import annotations

import pytest
import torch

from sapo_peft import PromptPool
from sapo_peft.sequence import SequenceConfig, SequenceTask, run_sequence
from sapo_peft.sequence.evaluate import Evaluator, greedy
from tests import families
from tests.oracles import CHATML, UNCLOSED, byte_tokenizer, small_qwen3
from tests.sequence.sequence_helpers import model_and_tokenizer, small_config, small_task


def test_greedy_answers_equal_one_at_a_time_without_cache_or_padding():
    model, tokenizer = model_and_tokenizer()
    contexts = [
        tokenizer(text)["input_ids"] for text in ("a", "some longer text", "red xx7", "blue", "a b c d e f g h")
    ]
    found = {}
    for rows, answers in greedy(model, contexts, 6, [258], 256, batch_size=2):
        found.update(zip(rows, answers, strict=True))
    lengths = [len(contexts[m]) for m in found]
    assert lengths == sorted(lengths, reverse=True) and len(found) == 5
    for m, context in enumerate(contexts):
        ids = list(context)
        for _ in range(6):
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == 258:
                break
            ids.append(token)
        assert found[m] == ids[len(context) :], m


def evaluator_of(model, tokenizer, target: str, **options) -> Evaluator:
    """Of one task with one row."""
    row = {"input": "a", "target": target}
    task = SequenceTask.build("t", [row], [row], small_task(1).pool)
    return Evaluator(model, [task], tokenizer, small_config(**options))


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("family", [*families.TREE, *families.REFUSED, DYNAMIC], ids=lambda family: getattr(
    family, "name", "llama-dynamic-rope"))  # fmt: skip
def test_answers_do_not_depend_on_the_size_of_a_batch(family):
    """State across tokens, positions that are not given, a cache that is wrong for several rows, rope by length."""
    options = {"rope_parameters": DYNAMIC} if family is DYNAMIC else {}
    model = families.build(getattr(family, "name", "llama"), **options).eval()
    draw = torch.Generator().manual_seed(0)
    contexts = [torch.randint(5, 290, (n,), generator=draw).tolist() for n in (9, 14, 9, 23, 17, 14)]
    found = []
    for size in (6, 1):
        by_row = {}
        for rows, answers in greedy(model, contexts, 5, [2], 0, batch_size=size):
            by_row.update(zip(rows, answers, strict=True))
        found.append([by_row[m] for m in range(6)])
    assert found[0] == found[1]


def test_greedy_sets_aside_what_the_models_own_configuration_says():
    model, tokenizer = model_and_tokenizer()
    contexts = [tokenizer(text)["input_ids"] for text in ("a", "red xx7")]

    def answers():
        return list(greedy(model, contexts, 12, [258], 256, batch_size=2))

    plain, banned = answers(), answers()[0][1][0][0]
    own = model.generation_config
    for name, value in (("repetition_penalty", 5.0), ("suppress_tokens", [banned]), ("min_new_tokens", 12)):
        setattr(own, name, value)
    assert answers() == plain and model.generation_config is own and own.repetition_penalty == 5.0


@pytest.mark.parametrize("target", ["e", "im", "|", "ok"])
@pytest.mark.parametrize("gap", ["", " "])
def test_the_end_of_an_answer_does_not_depend_on_a_target(target, gap):
    """Short targets stand in what closes a turn, which is not the end-of-sequence token here."""
    tokenizer = byte_tokenizer(chat_template=CHATML.replace("<|im_end|>", f"{gap}<|im_end|>"))
    tokenizer.eos_token = "<|endoftext|>"
    assert evaluator_of(None, tokenizer, target).closing(0) == ([256, 258], [])
    # Every end token that the model's configuration names ends an answer too.
    model = small_qwen3()
    model.generation_config.eos_token_id = [258, 9]
    assert evaluator_of(model, tokenizer, target).closing(0) == ([9, 256, 258], [])


def test_an_answer_ends_where_the_next_turn_would_begin():
    """Templates that do not close the assistant's turn: the marker of the next one ends the answer."""
    tokenizer = byte_tokenizer(
        chat_template="{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    evaluator = evaluator_of(None, tokenizer, "ok", max_new_tokens=20)
    assert evaluator.closing(0)[1] == ["USER:"]
    model = model_and_tokenizer()[0]
    texts = iter(["ok\nUSER: again", "ok"])
    model.generate = lambda input_ids, **options: torch.cat(
        [input_ids, torch.tensor([tokenizer(next(texts))["input_ids"]])], 1)  # fmt: skip
    assert [evaluator.answers(model, 0, 0)[0].strip() for _ in range(2)] == ["ok", "ok"]


@pytest.mark.parametrize("template", [CHATML, None, UNCLOSED["vicuna"]], ids=["chatml", "plain", "vicuna"])
def test_an_answer_ends_where_the_turn_ends(template):
    """A model that has learned one answer by heart gives it, no more and no less, whether its template closes turns."""
    model, _ = model_and_tokenizer()
    tokenizer = byte_tokenizer(chat_template=template)
    pool = PromptPool.build("t", "Say it.")
    row = {"input": "now", "target": "Yes, of course"}
    task = SequenceTask.build("t", [row] * 8, [row], pool)
    config = SequenceConfig(policy="original", max_steps=60, learning_rate=2e-2, batch_size=1, evaluate="last",
                            lora_dropout=0.0, max_new_tokens=40)  # fmt: skip
    result = run_sequence((model, tokenizer), [task], None, config, progress=False)
    assert result.matrix("exact_match")[1] == [1.0] and result.matrix("rougeL")[1] == [1.0]
    assert any("repeat an earlier one" in warning for warning in result.run["warnings"])
