"""Rendering: braces, placeholders, chat templates, closing tokens, refusals."""

from __future__ import annotations

import pytest

from sapo_kernels.scoring.render import PLAIN_ANSWER, Rendered, Renderer, check_examples, check_prompts
from tests.oracles import THINKING, byte_tokenizer

EXAMPLE = {"input": "2 + 2", "target": "4"}
NASTY = (
    "{", "{}", "{input}", "{prompt}", "{{input}}", "{0.__class__}", "{0:>100000000}", "%s", "\\1 \\g<0>",
    "{% for x in y %}", "{{ messages }}", "a\u200bb", "\ud7ff\U0001f642", "\x00",
)  # fmt: skip


def test_the_layout_of_the_paper(tokenizer):
    plain = Renderer(tokenizer).render("Add.", EXAMPLE)
    assert plain == Rendered("Add.\n\nText:\n2 + 2" + PLAIN_ANSWER, " 4<|im_end|>")
    with_suffix = Renderer(tokenizer, suffix="One number.", text_word="文本").render("Add.", EXAMPLE)
    made = byte_tokenizer()
    made.eos_token = None
    assert Renderer(made).render("Add.", EXAMPLE).response == " 4", "without an end of sequence"
    assert with_suffix.context == "Add.\n\n文本:\n2 + 2\n\nOne number." + PLAIN_ANSWER


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_whatever_is_in_a_prompt_or_an_input_is_text(tokenizer, chat_tokenizer, text):
    for made in (tokenizer, chat_tokenizer):
        for template in (None, "{prompt}|{input}|{prompt}", lambda p, e: p + e["input"]):
            renderer = Renderer(made, template)
            cell = renderer.render(f"a{text}b", {"input": f"c{text}d", "target": f"e{text}f"})
            assert f"a{text}b" in cell.context and f"c{text}d" in cell.context and f"e{text}f" in cell.response
    turn = Renderer(tokenizer, "{prompt}|{input}|{prompt}").render(text, {"input": text, "target": "t"}).context
    assert turn == f"{text}|{text}|{text}" + PLAIN_ANSWER


def test_placeholders_are_filled_once(tokenizer):
    """{input} in an instruction and {prompt} in an input stay what they are; other braces of a template too."""
    cell = Renderer(tokenizer, "{x} {prompt} {input} {}").render("say {input}", {"input": "{prompt}", "target": "t"})
    assert cell.context == "{x} say {input} {prompt} {}" + PLAIN_ANSWER


@pytest.mark.parametrize(
    "template, message",
    [
        ("{prompt}", r"expected \{prompt\} and \{input\}, got none of \['input'\]"),
        ("{ prompt } {input }", r"expected .*, got none of \['input', 'prompt'\]"),
        (["{prompt} {input}"], "expected a string, a callable or None, got list"),
        (b"{prompt}{input}", "expected a string, a callable or None, got bytes"),
        *((lambda p, e, made=made: made, r"expected a string or \(context, response\), got")
          for made in (None, ("a",), ("a", "b", "c"), ("a", 1), ["a", "b"])),
    ],
)  # fmt: skip
def test_other_templates_are_refused(tokenizer, template, message):
    with pytest.raises((ValueError, TypeError), match=f"template: {message}"):
        Renderer(tokenizer, template).render("P", EXAMPLE)


def test_a_callable_gives_the_turn_or_both_texts(tokenizer, chat_tokenizer):
    assert (
        Renderer(tokenizer, lambda p, e: f"{e['input']}?{p}").render("P", EXAMPLE).context == "2 + 2?P" + PLAIN_ANSWER
    )
    chat = Renderer(chat_tokenizer, lambda p, e: f"{e['input']}?{p}").render("P", EXAMPLE)
    assert chat.context == "<|im_start|>user\n2 + 2?P<|im_end|>\n<|im_start|>assistant\n"
    for made in (tokenizer, chat_tokenizer):
        verbatim = Renderer(made, lambda p, e: (p + "=", e["target"] + "!")).render("P", EXAMPLE)
        assert verbatim == Rendered("P=", "4!"), "a pair is taken as it is: no template, no closing token"


def test_a_chat_template_closes_the_turn_inside_the_response(chat_tokenizer):
    cell = Renderer(chat_tokenizer).render("Add.", EXAMPLE)
    assert cell.context == "<|im_start|>user\nAdd.\n\nText:\n2 + 2<|im_end|>\n<|im_start|>assistant\n"
    assert cell.response == "4<|im_end|>\n" and cell.exact


def test_thinking_is_off():
    cell = Renderer(byte_tokenizer(chat_template=THINKING)).render("Add.", EXAMPLE)
    assert cell.context.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert cell.response == "4<|im_end|>\n" and cell.exact


def test_a_template_that_rewrites_the_context_is_noticed():
    """Without the empty thinking block in the prompt, say: the answer is put behind the context as it stands."""
    rewriting = THINKING.replace("enable_thinking is defined and enable_thinking is false", "false")
    cell = Renderer(byte_tokenizer(chat_template=rewriting)).render("Add.", EXAMPLE)
    assert cell.context.endswith("<|im_start|>assistant\n")
    assert cell.response == "<think>\n\n</think>\n\n4<|im_end|>\n" and cell.exact
    counting = "{{ messages | length }}" + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    cell = Renderer(byte_tokenizer(chat_template=counting)).render("Add.", EXAMPLE)
    assert cell == Rendered("1Add.\n\nText:\n2 + 2", "4<|im_end|>", exact=False)


PARTS = """{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""


def test_a_chat_template_that_reads_a_list_of_parts_and_one_that_shows_nothing():
    cell = Renderer(byte_tokenizer(chat_template=PARTS)).render("Say it.", EXAMPLE)
    assert "Say it." in cell.context and "2 + 2" in cell.context and cell.response.startswith("4") and cell.exact
    nothing = byte_tokenizer(chat_template="{% for m in messages %}[{{ m.role }}]<|im_end|>{% endfor %}")
    with pytest.raises(ValueError, match="shows the user turn"):
        Renderer(nothing).render("Say it.", EXAMPLE)


def test_prompts_are_checked():
    assert check_prompts(("a", "b", "a")) == ["a", "b", "a"], "duplicates are allowed"
    for prompts, error, wanted in (
        ([], ValueError, "prompts: expected at least one, got an empty list"),
        ("abc", TypeError, "prompts: expected a list of strings, got str"),
        (None, TypeError, "prompts: expected a list of strings, got NoneType"),
        ({"a": 1}, TypeError, "prompts: expected a list of strings, got dict"),
        (["a", 5], TypeError, "prompt 1: expected a string, got int"),
        (["a", None], TypeError, "prompt 1: expected a string, got NoneType"),
        (["a", "b", ""], ValueError, "prompt 2: expected text, got an empty string"),
        (["\t\n \u2003"], ValueError, "prompt 0: expected text"),
        (["a", "b <|im_end|> c"], ValueError, r"prompt 1: .*special token '<\|im_end\|>'"),
    ):
        with pytest.raises(error, match=wanted):
            check_prompts(prompts, ["<|im_start|>", "<|im_end|>"])


def test_examples_are_checked():
    rows = [
        {"sentence": "s", "label": "l", "id": 3},
        {"input": "", "target": " x "},
        {"input": "i", "label": "l"},
    ]
    assert check_examples(rows) == [
        {"input": "s", "target": "l"},
        {"input": "", "target": " x "},
        {"input": "i", "target": "l"},
    ]
    good = {"input": "i", "target": "t"}
    for examples, error, wanted in (
        ([], ValueError, "examples: expected at least one, got an empty list"),
        (good, TypeError, "examples: expected a list of mappings, got dict"),
        ("abc", TypeError, "examples: expected a list of mappings, got str"),
        ([good, "x"], TypeError, "example 1: expected a mapping with 'input' and 'target', got str"),
        (
            [good, {"input": "i"}],
            ValueError,
            r"example 1: expected the key 'target' \(or 'label'\), got \['input'\]",
        ),
        ([{"target": "t"}], ValueError, r"example 0: expected the key 'input' \(or 'sentence'\)"),
        ([{}], ValueError, r"example 0: expected the key .*got \[\]"),
        ([{"input": None, "target": "t"}], TypeError, "example 0: 'input': expected a string, got NoneType"),
        ([good, {"input": "i", "target": 5}], TypeError, "example 1: 'target': expected a string, got int"),
        ([{"sentence": "s", "label": ["l"]}], TypeError, "example 0: 'label': expected a string, got list"),
        ([good, good, {"input": "i", "target": ""}], ValueError, "example 2: expected a target, got an empty"),
        ([{"input": "i", "target": " \n"}], ValueError, "example 0: expected a target, got an empty"),
    ):
        with pytest.raises(error, match=wanted):
            check_examples(examples)
