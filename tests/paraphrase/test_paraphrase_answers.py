"""What a model is asked, and the strict reading of tags and thoughts."""

import random
import time

import pytest

from sapo_peft.paraphrase.answers import AnswerFault, Request

T = "paraphrase"
READ = {
    "one": (f"<{T}>a</{T}>", ["a"]),
    "two lines, of Windows": (f"<{T}>a</{T}>\r\n<{T}>b</{T}>\r\n", ["a", "b"]),
    "one line": (f"<{T}>a</{T}> <{T}>b</{T}>", ["a", "b"]),
    "over lines": (f"<{T}>\na\nb\n</{T}>\n", ["a\nb"]),
    "greeting": (f"Here they are:\n\n<{T}>a</{T}>\nI hope they help!", ["a"]),
    "re-spelled": (f'<{T.title()}>a</{T.upper()}>\n< {T} id="2" >b</ {T} >', ["a", "b"]),
    "other tags and braces": (f"<{T}>use <b>bold</b> & </i> {{0.x}} %s</{T}>", ["use <b>bold</b> & </i> {0.x} %s"]),
}
DRAFT = f"maybe:\n<{T}>draft</{T}>\nor <{T}> inside text"
THOUGHTS = (
    f"<think>{DRAFT}</think>\n",
    f"{DRAFT}</think>\n",
    f"<think>x</think>{DRAFT}</think>",
    f"<thinking>{DRAFT}</thinking>",
    f"[THINK]{DRAFT}[/THINK]",
    f"<|START_THINKING|>{DRAFT}<|END_THINKING|>",
    f"<|begin_of_thought|>{DRAFT}<|end_of_thought|>\n",
    f"<seed:think>{DRAFT}</seed:think>",
    f"<Reasoning>{DRAFT}</Reasoning>",
    f"<thought_process>\n{DRAFT}\n</thought_process>\n",
    f"\u25c1think\u25b7{DRAFT}\u25c1/think\u25b7",
    f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>",
    f"analysisWe need {DRAFT}assistantfinal",
    f"<|channel>thought\n{DRAFT}<channel|>",
)
for thought in THOUGHTS:
    READ[f"thought {thought[:12]!r} {len(thought)}"] = (f"{thought}<{T}>a</{T}>", ["a"])


@pytest.mark.parametrize("name", READ)
def test_read(name):
    text, texts = READ[name]
    assert Request("x", 1).read(text) == (texts, None)


REFUSED = {
    "nothing": ("", "got an answer without"),
    "refusal": ("I'm sorry, I cannot help with that.", "got an answer without"),
    "quoted tags": (f"I will put each between <{T}> and </{T}> tags.", "at the start of a line"),
    "quoted at the start": (f"<{T}> and </{T}> are the tags", "at the end of a line"),
    "nested": (f"<{T}>\n<{T}>a</{T}>\n</{T}>", f"expected </{T}> in front of the next"),
    "not opened": (f"a</{T}>", f"expected <{T}> in front of"),
    "only thinking": (f"<think>\n<{T}>a</{T}>", "after the thinking"),
    "thinking again": (f"<think>x</think>\n[THINK]\n<{T}>a</{T}>", "after the thinking"),
    "only analysis": (f"<|channel|>analysis<|message|>\n<{T}>a</{T}>", "after the thinking"),
    "dots": (f"<{T}>...</{T}>", "an empty <"),
    "a bracket and a quarter of a million spaces": ("<" + " " * 260_000, "an answer without"),
    "a million openings": (f"<{T}" * 23_000, "an answer without"),
    "many ends of thoughts": ("</think>" * 32_000, "an answer without"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    text, message = REFUSED[name]
    started = time.perf_counter()
    with pytest.raises(AnswerFault) as caught:
        Request("x", 1).read(text)
    assert message in str(caught.value) and len(str(caught.value)) < 200 and time.perf_counter() - started < 1


def test_cut_answers_give_what_is_complete():
    whole = f"<{T}>a</{T}>\n<{T}>b b</{T}>"
    for size in range(len(whole) + 1):
        complete = [text for text, end in (("a", whole.index("\n")), ("b b", len(whole))) if size >= end]
        if complete:
            assert Request("x", 1).read(whole[:size])[0] == complete
        else:
            with pytest.raises(AnswerFault):
                Request("x", 1).read(whole[:size])
    assert "cut off inside" in Request("x", 1).read(whole[:-3])[1]


def test_random_answers_raise_nothing_else():
    draw, kept = random.Random(0), 0
    tags = [f"<{T}>", f"</{T}>", f"\n<{T}>a</{T}>\n", T]
    parts = [*tags, *"<>/\n aa", "</think>", "{0}", "\ud800", "\0"]
    for _ in range(20_000):
        try:
            texts, _ = Request("x", 1).read("".join(draw.choices(parts, k=draw.randrange(12))))
        except AnswerFault:
            continue
        kept += 1
        assert texts and all(any(c.isalnum() for c in one) and f"<{T}>" not in one for one in texts)
    assert kept > 100


def test_the_question_holds_the_texts_as_they_are():
    original = "Say {0.__class__} {prompt} %s: yes or no, <X>?"
    request = Request(original, 3, ("yes", "no"), ("<X>",), known=tuple(f"known {i} {{}}" for i in range(30)))
    text = request.message(2)
    assert f"\n{original}\n" in text and "\nyes\nno\n<X>\n" in text and "Write 2 different" in text
    assert "known 29 {}" in text and "known 19 {}" not in text and text.count("<paraphrase>") == 1
    assert "Write one rewording" in request.message(1)
