"""SapoCollator by itself: the tokens that are scored, labels on the response, any DataLoader, any column names."""

from __future__ import annotations

import logging
import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader

import sapo_kernels as sk
from sapo_kernels.training.trie_batch import padded_rows
from sapo_peft.trainer.choice import Choice
from sapo_peft.trainer.collator import CARRIED, SapoCollator
from tests.oracles import CHATML, OPENED, THINKING, UNCLOSED, byte_tokenizer
from tests.trainer.training_helpers import colours, pool_of, record_batches, sapo_trainer, texts_of


def collator_of(pools=None, mode="hard", chat=CHATML, bos=False, **options):
    tokenizer = byte_tokenizer(chat_template=chat, bos=bos)
    return SapoCollator(tokenizer, Choice(pools or {"colours": pool_of(3)}, mode, 0), **options)


def rows_of(batch):
    """(context ids, response ids) of each row, from mask and labels."""
    rows = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        n, on = int(mask.sum()), labels != -100
        assert mask.tolist() == [1] * n + [0] * (len(mask) - n), "padded on the right"
        first = int(on.nonzero()[0])
        assert on.tolist() == [False] * first + [True] * (n - first) + [False] * (len(mask) - n)
        assert torch.equal(labels[on], ids[on])
        rows.append((ids[:first].tolist(), ids[first:n].tolist()))
    return rows


@pytest.mark.parametrize("chat", [None, CHATML, THINKING, OPENED, *UNCLOSED.values()],
                         ids=["plain", "chatml", "thinking", "opened", *UNCLOSED])  # fmt: skip
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("sizes", [(1536, 128), (70, 3)], ids=["whole", "cut"])
@pytest.mark.parametrize("layout", [None, "{input} <- {prompt}"])
def test_the_tokens_are_those_that_are_scored(chat, bos, sizes, layout):
    limits = {"max_source": sizes[0] + 60 * bool(chat), "max_target": sizes[1]}
    collator = collator_of(chat=chat, bos=bos, template=layout, **limits)
    pool = collator.choice.pools["colours"]
    examples = [*colours(5), {"input": "long " * 30, "target": "and a long answer"}]
    if chat:
        turns = [{"role": role, "content": text} for text, role in zip("abcd", ("user", "assistant") * 2, strict=True)]
        examples += [{"messages": turns}, {"prompt": turns[:-1], "completion": turns[-1:]}]
    cache = sk.ResponseCache.build(collator.tokenizer, pool.prompts, examples, layout, suffix=pool.suffix, **limits)
    for k in range(3):
        collator.choice.chosen[0] = k
        wanted = list(zip(cache.contexts[k], cache.responses[k], strict=True))
        assert rows_of(collator(examples)) == wanted


def test_a_batch_is_the_same_whatever_else_is_in_it():
    """Rows are rendered by task and prompt and put back in their order."""
    pools = {name: pool_of(n, name, f"{name}. ") for name, n in (("a", 2), ("b", 3))}
    collator = collator_of(pools, mode="soft")
    rows = [{**row, "task": "ab"[i % 2]} for i, row in enumerate(colours(11))]
    whole = rows_of(collator(rows))
    assert whole == [rows_of(collator([row]))[0] for row in rows]
    texts = [collator.tokenizer.decode(context) for context, _ in whole]
    assert all(f"user\n{row['task']}. " in text and row["input"] in text for row, text in zip(rows, texts, strict=True))


def test_the_padding_token_of_tokenizers_without_one():
    for pad, eos, wanted in (("<|endoftext|>", "<|im_end|>", 256), (None, "<|im_end|>", 258), (None, None, 0)):
        tokenizer = byte_tokenizer()
        tokenizer.pad_token, tokenizer.eos_token = pad, eos
        assert SapoCollator(tokenizer, Choice({"colours": pool_of()}, "hard", 0)).pad == wanted


def test_a_batch_is_rendered_again_only_if_the_choice_changed(monkeypatch):
    collator = collator_of(carry=True)
    batch = collator(colours(3))
    assert set(batch) == {"input_ids", "attention_mask", "labels", CARRIED}
    again = collator.newest(batch)
    assert again["input_ids"] is batch["input_ids"]
    collator.choice.take([2])
    fresh = collator.newest({**batch, "extra": 5})
    assert fresh["extra"] == 5
    assert rows_of(fresh) == rows_of(collator(colours(3))) != rows_of(batch)
    # A new epoch is a new draw, and nothing in hard mode.
    collator = collator_of(carry=True)
    batch = collator(colours(3))
    collator.choice.clock[1] = 1
    assert collator.newest(batch)["input_ids"] is batch["input_ids"]
    soft = collator_of(mode="soft", carry=True)
    batch = soft(colours(9))
    soft.choice.clock[1] = 1
    assert rows_of(soft.newest(batch)) == rows_of(soft(colours(9))) != rows_of(batch)


def test_a_choice_that_changes_while_a_batch_is_made_marks_it_old(monkeypatch):
    collator = collator_of(carry=True)

    def late(*args):
        collator.choice.take([-1])
        return padded_rows(*args)

    monkeypatch.setattr("sapo_peft.trainer.collator.padded_rows", late)
    assert collator(colours(2))[CARRIED].round != collator.choice.round


@pytest.mark.parametrize("start, parallel", [("fork", "true"), ("spawn", None)])
def test_workers_see_a_new_choice(start, parallel, monkeypatch):
    """With a plain DataLoader, and without `attach_sapo`: old for what was fetched ahead, new after that.

    With the tokenizer's threads asked for by name a forked worker would wait for threads that it does not have.
    """
    if parallel is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    else:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        # Several texts at once: now the pool exists.
        byte_tokenizer()(["some", "texts", "at", "once"] * 50)
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} on this system")
    collator = collator_of()
    loader = DataLoader(
        colours(16), 2, collate_fn=collator, num_workers=1, prefetch_factor=1, multiprocessing_context=start, timeout=60
    )
    prompts = collator.choice.pools["colours"].prompts
    seen = []
    for i, batch in enumerate(loader):
        text = collator.tokenizer.decode(rows_of(batch)[0][0])
        seen.append(next(k for k, prompt in enumerate(prompts) if f"user\n{prompt}\n\n" in text))
        if i == 1:
            collator.choice.take([2])
    assert seen[:2] == [0, 0] and seen[4:] == [2] * 4, seen
    assert seen == sorted(seen)


def test_evaluation_does_not_draw():
    """In mode "soft" training draws a prompt for each example, evaluation takes the chosen one for all."""
    training = collator_of(mode="soft")
    choice = training.choice
    choice.chosen[0] = 2
    examples = colours(20)
    drawn = {choice.prompt_for("colours", example) for example in examples}
    assert len(drawn) > 1 and {choice.prompt_for("colours", example, sample=False) for example in examples} == {2}
    evaluation = SapoCollator(training.tokenizer, choice, sample=False)
    hard = collator_of(mode="hard")
    hard.choice.chosen[0] = 2
    assert torch.equal(evaluation(examples)["input_ids"], hard(examples)["input_ids"])
    assert not torch.equal(evaluation(examples)["labels"], training(examples)["labels"])


def test_responses_are_trained_on_whole_whatever_is_scored(tmp_path):
    """The limit of scoring is the paper's; a response without its end would teach the model not to stop."""
    data = [{"input": f"{i}", "target": f"{i} " + "and so on " * 30} for i in range(6)]
    trainer, callback = sapo_trainer(tmp_path, data=data, max_steps=2)
    assert callback.config.max_target == 128 < len(data[0]["target"])
    batches = record_batches(trainer)
    trainer.train()
    assert max(callback.rescorer.caches["colours"].response_lengths) == 128
    seen = [response for batch in batches for _, response in texts_of(trainer, batch)]
    assert len(seen) == 4 and all(any(text == row["target"] + "<|im_end|>\n" for row in data) for text in seen)


def test_what_is_cut_is_said_once(caplog):
    collator = collator_of(max_target=4, max_source=150)
    long = [{"input": "long " * 60, "target": "a long answer"}, *colours(2)]
    with caplog.at_level(logging.WARNING, logger="sapo_peft"):
        for _ in range(3):
            rows = rows_of(collator(long))
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(lines) == [
        "inputs are cut to max_source=150 tokens and lose their end",
        "responses are cut to train_max_target=4 tokens and lose their end",
    ]
    assert max(len(response) for _, response in rows) == 4 and max(len(context) for context, _ in rows) <= 150
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sapo_peft"):
        collator_of()(colours(4))
    assert not caplog.records
