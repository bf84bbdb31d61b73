"""Rendering: braces, placeholders, chat templates, closing tokens, refusals."""

from __future__ import annotations

from datetime import datetime
from unittest import mock

import pytest

import sapo_kernels as sk
from sapo_kernels.scoring import render
from sapo_kernels.scoring.render import PLAIN_ANSWER, Rendered, Renderer, check_examples, check_prompts
from sapo_peft import PromptPool
from tests.oracles import CHATML, DATED, OPENED, THINKING, UNCLOSED, byte_tokenizer

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
    turn = Renderer(tokenizer, "{x} {prompt}|{input}|{prompt} {}").render(text, {"input": text, "target": "t"}).context
    assert turn == f"{{x}} {text}|{text}|{text} {{}}" + PLAIN_ANSWER


@pytest.mark.parametrize(
    "template, message",
    [
        ("{prompt}", r"expected \{prompt\} and \{input\}, got one without \['input'\]"),
        ("{ prompt } {input }", r"expected .*, got one without \['input', 'prompt'\]"),
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


# An empty thought stands in front of the answer of a last turn, as in Qwen3-Thinking-2507's.
THOUGHT = "{{ '<think>\n[none]</think>\n\n' if m['role'] == 'assistant' }}{{ m['content'] }}"


@pytest.mark.parametrize(("template", "begun", "response"), [
    (CHATML, "", "4<|im_end|>\n"),
    # Thinking is off, and a thought is closed as the template itself would.
    (THINKING, "<think>\n\n</think>\n\n", "4<|im_end|>\n"),
    (OPENED.replace("{{ m['content'] }}", THOUGHT), "<think>\n[none]</think>\n\n", "4<|im_end|>\n"),
    # Without the empty thought in the prompt the answer is put behind the context as it stands.
    (THINKING.replace("enable_thinking is defined and enable_thinking is false", "false"), "",
     "<think>\n\n</think>\n\n4<|im_end|>\n"),
], ids=["chatml", "thinking off", "an empty thought", "rewriting"])  # fmt: skip
def test_a_chat_template_closes_the_turn_inside_the_response(template, begun, response):
    cell = Renderer(byte_tokenizer(chat_template=template)).render("Add.", EXAMPLE)
    context = f"<|im_start|>user\nAdd.\n\nText:\n2 + 2<|im_end|>\n<|im_start|>assistant\n{begun}"
    assert cell == Rendered(context, response, exact=True)


@pytest.mark.parametrize("shape", UNCLOSED)
def test_a_turn_that_the_template_does_not_close_ends_with_the_end_token(shape, caplog):
    render.warn_once.cache_clear()
    tokenizer = byte_tokenizer(chat_template=UNCLOSED[shape])
    cells = [Renderer(tokenizer).render("Add.", {**EXAMPLE, "target": target}) for target in ("4", "e", "im_end")]
    assert all(cell.exact and cell.response.count("<|im_end|>") == 1 for cell in cells)
    assert [cell.response.partition("<|im_end|>")[0].strip() for cell in cells] == ["4", "e", "im_end"]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["the chat template does not close the assistant's turn: the end token '<|im_end|>' is appended to "
                    "every response"]  # fmt: skip


def test_tokens_of_blanks_close_no_turn():
    """Some tokenizers have runs of spaces among their added tokens."""
    tokenizer = byte_tokenizer(chat_template=UNCLOSED["falcon"])
    tokenizer.add_tokens(["\n\n"])
    assert Renderer(tokenizer).render("Add.", EXAMPLE).response == " 4\n\n<|im_end|>"


@pytest.mark.parametrize("template", [None, UNCLOSED["glm"]], ids=["plain", "glm"])
def test_the_end_token_is_that_of_the_model_where_the_tokenizer_has_none(tiny_model, template):
    tokenizer = byte_tokenizer(chat_template=template)
    tokenizer.eos_token = None
    tiny_model.generation_config.eos_token_id = [257, 258]
    made = render.with_end_token(tokenizer, tiny_model)
    assert Renderer(made).render("Add.", EXAMPLE).response.strip() == "4<|im_start|>" and tokenizer.eos_token is None
    scores = sk.score_prompts(tiny_model, ["Add."], [EXAMPLE], tokenizer=tokenizer)
    assert int(scores.tokens) == len("4") + 1 + (template is None), "with the end token, without a template a space"


@pytest.mark.parametrize(("begun", "closed"), [
    ("<think>\n", "<think>\n\n</think>\n\n"), ("<think>", "<think></think>"), ("[THINK]", "[THINK][/THINK]"),
    ("<|START_THINKING|>", "<|START_THINKING|><|END_THINKING|>"), ("<seed:think>", "<seed:think></seed:think>"),
    ("<|begin_of_thought|>\n", "<|begin_of_thought|>\n\n<|end_of_thought|>\n\n"),
    ("<|channel>thought\n", "<|channel>thought\n\n<channel|>\n\n"), ("◁think▷", "◁think▷◁/think▷"),
    ("<a></a><think></think><reasoning>", "<a></a><think></think><reasoning></reasoning>"),
    # What is no thought, or a closed one.
    ("<think></think>", "<think></think>"), ("<no_think>", "<no_think>"), ("<answer>", "<answer>"),
])  # fmt: skip
def test_a_thought_that_the_template_begins_is_closed(begun, closed):
    renderer = Renderer(byte_tokenizer(chat_template=OPENED.replace("<think>\n", begun)))
    for text in ("2 + 2", "<think> 2 + 2"):
        cell = renderer.render("Add.", {"input": text, "target": "4"})
        assert cell.context == f"<|im_start|>user\nAdd.\n\nText:\n{text}<|im_end|>\n<|im_start|>assistant\n{closed}"
        assert cell.response == "4<|im_end|>\n"


@pytest.mark.parametrize("text", ["apple", "k", "think", ">", "<think>", ""])
def test_a_text_that_stands_in_the_generation_prompt_too_hides_no_thought(text):
    example = {"input": text, "target": "o"}
    cell = Renderer(byte_tokenizer(chat_template=OPENED), instruction_role="system").render("Name it.", example)
    assert cell.context.endswith(f"{text}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    cell = Renderer(byte_tokenizer(chat_template=CHATML), instruction_role="system").render("Use <think>.", example)
    assert cell.context.endswith(f"{text}<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("switch", ["messages[0]", "messages[-1]"], ids=["instruction", "input"])
@pytest.mark.parametrize("first", [False, True])
def test_a_template_may_open_thoughts_for_some_texts_only(switch, first):
    template = OPENED.replace("<think>\n", "{% if '/think' in " + switch + "['content'] %}<think>\n{% endif %}")
    renderer = Renderer(byte_tokenizer(chat_template=template), instruction_role="system")
    for thinks in (first, not first):
        for text in ("k", "apple", ""):
            word = " /think" if thinks else ""
            prompt, text = ("Add." + word, text) if "0" in switch else ("Add.", text + word)
            cell = renderer.render(prompt, {"input": text, "target": "o"})
            assert cell.context.endswith("assistant\n" + ("<think>\n\n</think>\n\n" if thinks else ""))


@pytest.mark.parametrize("mark", ["<|thinking|>", "<|reasoning_mode|>", "<think>"])
def test_a_thought_that_cannot_be_closed_is_refused(mark):
    tokenizer = byte_tokenizer(chat_template=OPENED.replace("<think>\n", mark))
    tokenizer.add_tokens([mark], special_tokens=True)
    with pytest.raises(ValueError, match=r"whose thought '<.*>' can be closed, got one that opens it"):
        Renderer(tokenizer).render("Add.", EXAMPLE)


def test_a_template_that_reads_the_clock_reads_one_moment():
    tokenizer = byte_tokenizer(chat_template=DATED)
    for now, shown in ((None, render.STARTED.strftime("%d %b %Y %H:%M:%S")), (datetime(2024, 2, 29), "29 Feb 2024 00")):
        cell = Renderer(tokenizer, now=now).render("Add.", EXAMPLE)
        assert cell.context.startswith(shown) and cell.exact
        cache = sk.ResponseCache.build(tokenizer, ["Add."], [EXAMPLE], now=now)
        assert tokenizer.decode(cache.contexts[0][0]) == cell.context
    assert render.reads_clock(tokenizer) and not render.reads_clock(byte_tokenizer(chat_template=CHATML))


@pytest.mark.parametrize("shown", ["%-d. %B %y, %A %j %H:%M:%S", "%Y-%m-%d %I%p 100%% %F %T", "%h %k %P %s %g %C %%d"])
def test_a_moment_looks_as_the_library_shows_it(monkeypatch, shown):
    now = datetime(2026, 1, 5, 7, 8, 9)
    around = ("\n  {{% if strftime_now is defined %}}\n  {{% macro day(form) %}}\n"
              "{{{{ 'on ' + strftime_now(form) }}}}{{% endmacro %}}{{{{ day({!r}) }}}}\n{{% endif %}}")  # fmt: skip
    tokenizer = byte_tokenizer(chat_template=around.format(shown) + CHATML)
    cell = Renderer(tokenizer, "{prompt}{input}", now=now).render("Add.", EXAMPLE)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", mock.Mock(now=lambda: now))
    turn = [{"role": "user", "content": "Add.2 + 2"}]
    assert cell.context == tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert now.strftime(shown) in cell.context


def test_a_template_that_rewrites_the_context_is_noticed():
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


@pytest.mark.parametrize(("around", "leading", "closing"), [
    ("<|im_start|> <|endoftext|> $A", [257, 256], [258]), ("<|im_end|> $A", [258], [258]),
    ("$A <|im_end|>", [], [258]), ("<|im_start|> $A <|endoftext|>", [257], [256]),
    ("<|endoftext|> $A <|im_start|> <|im_end|>", [256], [257, 258]),
])  # fmt: skip
def test_everything_that_the_tokenizer_puts_around_a_text_is_kept(around, leading, closing):
    """ChatGLM's two tokens in front, OPT's end token, decoders that end their texts with one of their own."""
    tokenizer = byte_tokenizer(around=around)
    cache = sk.ResponseCache.build(tokenizer, ["Add."], [EXAMPLE])
    context, response = cache.contexts[0][0], cache.responses[0][0]
    assert context == [*leading, *b"Add.\n\nText:\n2 + 2\n\nAnswer:"] and response == [*b" 4", *closing]
    text = "Add.\n\nText:\n2 + 2\n\nAnswer: 4"
    assert (context + response)[: len(leading) + len(text)] == tokenizer(text)["input_ids"][: len(leading) + len(text)]
    assert Renderer(byte_tokenizer(around=around, chat_template=CHATML)).leading_ids() == []


def test_a_tokenizer_that_changes_a_text_with_its_special_tokens_is_refused(tokenizer):
    class Joining:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [5] if add_special_tokens else [7]}

    with pytest.raises(ValueError, match=r"expected special tokens around the ids \[7\] of 'a', got \[5\]"):
        Renderer(Joining()).leading_ids()


def test_a_tokenizer_that_reads_no_special_tokens_in_a_text_is_refused(tiny_model):
    """Mistral's own backend encodes conversations by itself; its class is there without its package."""
    from transformers.tokenization_mistral_common import MistralCommonBackend

    mistral = MistralCommonBackend.__new__(MistralCommonBackend)
    mistral._all_special_tokens = ["<s>", "</s>"]
    splitting = byte_tokenizer(chat_template=CHATML)
    splitting.split_special_tokens = True
    expected = {mistral: "got MistralCommonBackend, which .* tokenizer.json", splitting: "got .* split_special"}
    for made, words in expected.items():
        match = f"tokenizer: expected one that parses special tokens in a text, {words}"
        with pytest.raises(ValueError, match=match):
            sk.ResponseCache.build(made, ["Add."], [EXAMPLE])
        with pytest.raises(ValueError, match=match):
            PromptPool.build("t", "Add.").checked(made)


def test_prompts_are_checked():
    assert check_prompts(("a", "b", "a")) == ["a", "b", "a"], "duplicates are allowed"
    for prompts, error, expected in (
        ([], ValueError, "prompts: expected at least one, got an empty list"),
        ("abc", TypeError, "prompts: expected a list of strings, got str"),
        (["a", 5], TypeError, "prompt 1: expected a string, got int"),
        (["a", "b", ""], ValueError, "prompt 2: expected text, got an empty string"),
        (["\t\n \u2003"], ValueError, "prompt 0: expected text"),
        (["a", "b <|im_end|> c"], ValueError, r"prompt 1: .*special token '<\|im_end\|>'"),
    ):
        with pytest.raises(error, match=expected):
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
    for examples, error, expected in (
        ([], ValueError, "examples: expected at least one, got an empty list"),
        (good, TypeError, "examples: expected a list of mappings, got dict"),
        ([good, "x"], TypeError, "example 1: expected a mapping with 'input' and 'target', got str"),
        (
            [good, {"input": "i"}],
            ValueError,
            r"example 1: expected the target column \(exactly one of target, .*, got the columns 'input'$",
        ),
        ([{}], ValueError, "example 0: expected the input column .*got the columns none"),
        ([{"input": None, "target": "t"}], TypeError, "example 0: 'input': expected a string, got NoneType"),
        ([{"sentence": "s", "label": ["l"]}], TypeError, "example 0: 'label': expected a string, got list"),
        ([{"input": "i", "target": " \n"}], ValueError, "example 0: expected a target, got an empty"),
    ):
        with pytest.raises(error, match=expected):
            check_examples(examples)
