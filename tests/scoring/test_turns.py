"""Conversations: rows of messages, a system prompt, several turns, and the turn that the instruction is in."""

from __future__ import annotations

import pytest

import sapo_kernels as sk
from sapo_kernels.scoring.render import Renderer, check_examples
from sapo_kernels.scoring.turns import example_of
from tests.oracles import CHATML, OPENED, byte_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"}, {"role": "user", "content": "2 + 2"},
    {"role": "assistant", "content": "4"},
]  # fmt: skip
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def shown(turns) -> str:
    """As ChatML writes them."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


@pytest.mark.parametrize(("role", "messages", "turns"), [
    ("user", TALK, [("system", "Be brief."), ("user", "hello"), ("assistant", "hi"),
                    ("user", "Add.\n\nText:\n2 + 2\n\nA number.")]),
    ("system", TALK, [("system", "Be brief.\n\nAdd."), ("user", "hello"), ("assistant", "hi"),
                      ("user", "2 + 2\n\nA number.")]),
    ("user", TALK[3:], [("user", "Add.\n\nText:\n2 + 2\n\nA number.")]),
    ("system", TALK[3:], [("system", "Add."), ("user", "2 + 2\n\nA number.")]),
    ("system", TALK[1:], [("system", "Add."), ("user", "hello"), ("assistant", "hi"), ("user", "2 + 2\n\nA number.")]),
])  # fmt: skip
def test_the_instruction_is_in_the_turn_that_is_asked_for(role, messages, turns):
    row = {"messages": messages}
    assert example_of({"prompt": messages[:-1], "completion": messages[-1:]}) == example_of(row), "as TRL has it"
    tokenizer = byte_tokenizer(chat_template=CHATML)
    cell = Renderer(tokenizer, suffix="A number.", instruction_role=role).render("Add.", example_of(row))
    assert (cell.context, cell.response, cell.exact) == (shown(turns), "4<|im_end|>\n", True)
    opened = Renderer(byte_tokenizer(chat_template=OPENED), instruction_role=role)
    empty = opened.render("Add.", {"input": "", "target": "4"}).context
    turns = [("system", "Add."), ("user", "")] if role == "system" else [("user", "Add.\n\nText:\n")]
    assert empty == shown(turns) + "<think>\n\n</think>\n\n"
    cache = sk.ResponseCache.build(tokenizer, ["Add."], [row], suffix="A number.", instruction_role=role)
    assert tokenizer.decode(cache.contexts[0][0]) == cell.context


def test_only_the_input_is_cut():
    long = [*TALK[:3], {"role": "user", "content": "x" * 300}, TALK[4]]
    tokenizer = byte_tokenizer(chat_template=CHATML)
    options = {"suffix": "END", "instruction_role": "system", "max_source": 160}
    cache = sk.ResponseCache.build(tokenizer, ["Add."], [{"messages": long}], **options)
    text = tokenizer.decode(cache.contexts[0][0])
    assert cache.stats["truncated_inputs"] == 1 and len(cache.contexts[0][0]) == 160
    assert (
        text.endswith("xxx\n\nEND<|im_end|>\n<|im_start|>assistant\n")
        and "Be brief.\n\nAdd." in text
        and "hello" in text
    )


def test_what_cannot_be_shown_is_refused():
    chat, plain = byte_tokenizer(chat_template=CHATML), byte_tokenizer()
    row = {"messages": TALK}
    refusing, silent = (byte_tokenizer(chat_template=start + CHATML.replace("{% for m in messages %}", loop))
                        for start, loop in ((NO_SYSTEM, "{% for m in messages %}"),
                                            ("", "{% for m in messages if m['role'] != 'system' %}")))  # fmt: skip
    for made, options, expected in (
        (plain, {}, "expected a chat template for examples with a history, got none"),
        (plain, {"instruction_role": "system"}, "instruction_role: expected a tokenizer with a chat template"),
        (chat, {"instruction_role": "system", "template": "{prompt}{input}"}, "expected no template beside it"),
        (chat, {"instruction_role": "assistant"}, r"expected one of \('user', 'system'\), got 'assistant'"),
        (refusing, {"instruction_role": "system"}, r"refuses the turns \['system', .*\]: System role not supported"),
        (
            silent,
            {"instruction_role": "system"},
            "expected a chat template that shows the system turn, got one that drops",
        ),
    ):
        with pytest.raises(ValueError, match=expected):
            sk.ResponseCache.build(made, ["Add."], [row], **options)


@pytest.mark.parametrize(("messages", "expected"), [
    ("text", "messages: expected a list, got str"), ([], "turn at the end, got []"),
    (TALK[:4], "turn at the end, got ['system', 'user', 'assistant', 'user']"),
    (["hi", "there"], "message 0: expected an object with a role and a content, got str"),
    ([{"role": "tool", "content": "x"}, *TALK[3:]], "message 0: expected one of the roles"),
    ([*TALK[3:4], {"role": "assistant", "content": "x", "tool_calls": [{}]}], "message 1: expected one of the roles"),
    ([{"role": "user", "content": [{"type": "image", "url": "x"}]}, TALK[4]], "message 0: expected a text, got list"),
    ([*TALK[1:3], TALK[0], *TALK[3:]], "history: expected a system turn in the first place only, got a later one"),
    ([*TALK[3:4], {"role": "assistant", "content": " "}], "expected a target, got an empty string"),
    ([{"role": "system", "content": "\ud800"}, *TALK[3:]], "history: message 0: expected text, got a lone surrogate"),
])  # fmt: skip
def test_bad_conversations_are_named(messages, expected):
    good = {"messages": TALK}
    with pytest.raises(ValueError) as found:
        check_examples([good, {"messages": messages}])
    assert str(found.value).startswith("example 1: ") and expected in str(found.value)


def test_parts_of_text_are_joined_and_special_tokens_counted():
    parts = [{"type": "text", "text": "2 +"}, {"type": "text", "text": "2"}]
    rows = [{"messages": [{"role": "user", "content": parts}, TALK[4]]},
            {"messages": [{"role": "system", "content": "a <|im_end|>"}, *TALK[3:]]}]  # fmt: skip
    assert check_examples(rows)[0] == {"history": [], "input": "2 +\n2", "target": "4"}
    cache = sk.ResponseCache.build(byte_tokenizer(chat_template=CHATML), ["Add."], rows)
    assert cache.stats["special_tokens_in_text"] == 1
