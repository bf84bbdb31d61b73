"""What a model is asked, the strict reading of tags, Retry-After, back-off, and hiding a key."""

import logging
import pickle
import random
import time
from email.utils import formatdate

import pytest

from sapo_peft.paraphrase.answers import AnswerFault, Request, parse_answer
from sapo_peft.paraphrase.redact import LogGuard, Secret
from sapo_peft.paraphrase.retry import Backoff, retry_after

T = "paraphrase"
READ = {
    "one": (f"<{T}>a</{T}>", ["a"]),
    "two lines": (f"<{T}>a</{T}>\n<{T}>b</{T}>", ["a", "b"]),
    "one line": (f"<{T}>a</{T}> <{T}>b</{T}>", ["a", "b"]),
    "over lines": (f"<{T}>\na\nb\n</{T}>\n", ["a\nb"]),
    "greeting": (f"Here they are:\n\n<{T}>a</{T}>\nI hope they help!", ["a"]),
    "thinking": (f"<think>maybe <{T}>x</{T}>\n</think>\n<{T}>a</{T}>", ["a"]),
    "other tags": (f"<{T}>use <b>bold</b> & </i></{T}>", ["use <b>bold</b> & </i>"]),
    "braces": (f"<{T}>{{0.__class__}} {{}} %s</{T}>", ["{0.__class__} {} %s"]),
    "windows": (f"<{T}>a</{T}>\r\n<{T}>b</{T}>\r\n", ["a", "b"]),
}


@pytest.mark.parametrize("name", READ)
def test_read(name):
    text, texts = READ[name]
    assert parse_answer(text, T) == (texts, None)


REFUSED = {
    "nothing": ("", "got an answer without"),
    "refusal": ("I'm sorry, I cannot help with that.", "got an answer without"),
    "quoted tags": (f"I will put each between <{T}> and </{T}> tags.", "at the start of a line"),
    "quoted at the start": (f"<{T}> and </{T}> are the tags", "at the end of a line"),
    "wrong tags": ("<rewording>a</rewording>", "got an answer without"),
    "re-cased": (f"<Paraphrase>a</Paraphrase>\n<{T}>b</{T}>", "wanted the tags"),
    "with spaces": (f"< {T} >a</ {T}>", "wanted the tags"),
    "attribute": (f'<{T} id="1">a</{T}>', "wanted the tags"),
    "numbered": (f"<{T}-1>a</{T}-1>", "wanted the tags"),
    "empty element": (f"<{T}/>a", "wanted the tags"),
    "nested": (f"<{T}>\n<{T}>a</{T}>\n</{T}>", f"wanted </{T}> in front of the next"),
    "not closed": (f"<{T}>a</{T}>\n<{T}>b", f"wanted </{T}> at the end"),
    "not opened": (f"a</{T}>", f"wanted <{T}> in front of"),
    "closed twice": (f"<{T}>a</{T}>\n</{T}>", f"wanted <{T}> in front of"),
    "in text": (f"The first: <{T}>a</{T}>", "at the start of a line"),
    "followed by text": (f"<{T}>a</{T}> is good", "at the end of a line"),
    "only thinking": (f"<think><{T}>a</{T}>", "after the thinking"),
    "empty pair": (f"<{T}></{T}>", "without a word"),
    "dots": (f"<{T}>...</{T}>", "without a word"),
    "too many": (f"<{T}>a</{T}>\n" * 65, "at most 64"),
    "too long": (f"<{T}>" + "a" * 1_000_000 + f"</{T}>", "at most 262144 characters"),
    "a bracket and a quarter of a million spaces": ("<" + " " * 260_000, "an answer without"),
    "a million openings": (f"<{T}" * 23_000, "wanted the tags"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    text, message = REFUSED[name]
    started = time.perf_counter()
    with pytest.raises(AnswerFault) as caught:
        parse_answer(text, T)
    assert message in str(caught.value) and len(str(caught.value)) < 200 and time.perf_counter() - started < 1


def test_cut_answers_give_what_is_complete():
    whole = f"<{T}>a</{T}>\n<{T}>b b</{T}>"
    for size in range(len(whole) + 1):
        complete = [text for text, end in (("a", whole.index("\n")), ("b b", len(whole))) if size >= end]
        if complete:
            texts, fault = parse_answer(whole[:size], T, cut=True)
            assert texts == complete
            assert (fault is None) == (
                size == len(whole) or not whole[:size].rstrip()[len(whole) // 2 - 4 :].count(f"<{T}>")
            )
        else:
            with pytest.raises(AnswerFault):
                parse_answer(whole[:size], T, cut=True)


def test_random_answers_raise_nothing_else():
    draw = random.Random(0)
    parts = [f"<{T}>", f"</{T}>", "<", ">", "/", T, "\n", " ", "a", "<think>", "</think>", "{0}", "\ud800", "\0"]
    kept = 0
    for _ in range(20_000):
        text = "".join(draw.choices(parts, k=draw.randrange(12)))
        for cut in (False, True):
            try:
                texts, _ = parse_answer(text, T, cut=cut)
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
    assert "Write one rewording" in request.message(1) and "Write 3 different" in request.message()


def test_the_tags_are_others_where_the_texts_hold_them():
    assert Request("x", 1).tag == "paraphrase"
    request = Request("Rewrite <Paraphrase> and </paraphrase-2>", 1)
    assert request.tag == "paraphrase-3" and "<paraphrase-3>" in request.message()
    assert parse_answer("<paraphrase-3>use <paraphrase> here</paraphrase-3>", request.tag)[0] == [
        "use <paraphrase> here"
    ]
    many = tuple("<paraphrase>" + "y" * 16_000 for _ in range(5000))  # only those that are sent are looked at
    started = time.perf_counter()
    assert Request("x", 1, known=many).tag == "paraphrase-2" and time.perf_counter() - started < 1
    assert Request("x", 1, known=("<paraphrase>",)).tag == "paraphrase-2"


NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("5", 5.0),
        (" 0 ", 0.0),
        ("1.5", 1.5),
        ("86400000", 86_400_000.0),
        (formatdate(NOW + 7, usegmt=True), 7.0),
        (formatdate(NOW - 7, usegmt=True), 0.0),
        ("Wed, 15 Nov 2023 00:13:27 +0200", 7.0),
        ("-5", None),
        ("nan", None),
        ("inf", None),
        ("1e9", None),
        ("", None),
        ("soon", None),
        ("1.2.3", None),
        ("\u0665", None),
        ("9" * 99, float("9" * 99)),
        ("9" * 400, None),
        ("Fri, 99 Foo 99999 99:99:99 GMT", None),
        ("Tue, 31 Dec 9999 23:59:59 -2359", 253_402_300_799 + 86_340 - NOW),
        ("A" * 100_000, None),
    ],
)
def test_retry_after(header, seconds):
    got = retry_after(header, NOW)
    assert got == seconds if seconds is None or got is None else abs(got - seconds) < 1


def test_backoff_grows_and_is_seeded():
    backoff, again = Backoff(0.5, 8.0, seed=3), Backoff(0.5, 8.0, seed=3)
    waits = [backoff.wait(n) for n in range(1, 12)]
    assert waits == [again.wait(n) for n in range(1, 12)] != [Backoff(0.5, 8.0, seed=4).wait(n) for n in range(1, 12)]
    for n, wait in enumerate(waits):
        assert 0.5 * min(8.0, 0.5 * 2**n) <= wait <= min(8.0, 0.5 * 2**n)
    assert backoff.wait(10**9) <= 8.0


KEY = "sk-Canary/7f3e+9b1d=Qz%x"


def test_a_key_is_hidden_in_every_form():
    secret = Secret(KEY)
    for text in (
        f"Incorrect API key provided: {KEY}.",
        KEY.upper() + KEY.lower(),
        "sk-Canary%2F7f3e%2B9b1d%3DQz%25x",
        "c2stQ2FuYXJ5LzdmM2UrOWIxZD1RejF4"[:24],
        f"cut off: {KEY[:12]}",
        f"cut off: {KEY[-9:]}",
        f"\u0130 {KEY}",
    ):
        hidden = secret.hidden(text)
        assert "[key]" in hidden and secret.shown_in(text)
        assert not any(KEY[i : i + 8].lower() in hidden.lower() for i in range(len(KEY) - 7)), hidden
    assert secret.hidden("nothing of it, sk-Can") == "nothing of it, sk-Can"
    assert repr(secret) == str(secret) == f"{secret}" == "[key]" and not hasattr(secret, "__dict__")
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    started = time.perf_counter()
    assert Secret("a" * 200).hidden("a" * 100_000) == "[key]" and time.perf_counter() - started < 2
    assert not Secret("none").shown_in("none of it") and Secret("none").hidden("x none") == "x [key]"


def test_the_log_of_the_client_is_guarded_and_given_back(caplog):
    caplog.set_level(logging.DEBUG)
    child = logging.getLogger("httpcore2.http11")
    filters = list(child.filters)
    with LogGuard(Secret(KEY)):
        child.debug("headers %r", [(b"x-echo", KEY.encode())])
        child.warning("plain %d", 3)
        child.debug("wrong %d", KEY)
        try:
            raise ValueError(KEY)
        except ValueError:
            child.exception("failed")
    assert KEY not in caplog.text and "plain 3" in caplog.text and "x-echo" in caplog.text
    assert child.filters == filters
