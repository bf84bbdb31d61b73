"""The endpoint source and the driver against a real server on this machine that misbehaves."""

import logging
import socket
import threading
import time

import pytest

from sapo_peft.data.prompt_pool import PromptPool
from sapo_peft.paraphrase import EndpointSource, TooFewPrompts, gather
from sapo_peft.paraphrase.endpoint import _retry_after
from tests.paraphrase import bad_server as bad
from tests.paraphrase.bad_server import POOL, ask, completion, fresh, raw, says, status, tagged

pytest.importorskip("openai")
pytest.importorskip("tenacity")
GOOD = "positive or negative, {0.__class__} {}"
environment = bad.environment


def test_good_answers():
    made, server, source, _ = ask(fresh(), wanted=12, per_call=5)
    assert len(made.prompts) == 13 and made.provenance[1:] == ("endpoint:m",) * 12 and made.notes() == []
    asked = [bad.re.search(r"Write (\w+)", q["messages"][0]["content"]).group(1) for q in server.questions]
    assert asked == ["5", "5", "2"] and source.spent == ""
    assert all(q["model"] == "m" and POOL.prompts[0] in q["messages"][0]["content"] for q in server.questions)


# What the server does first (it is well afterwards) and the word in the log; one more question gets it all.
AGAIN = {
    "reset in the middle": (bad.reset, "broken (ReadError: Connection reset by peer); asking again"),
    "502 with HTML": (raw("<html>Bad gateway</html>", "text/html", 502), "status 502; asking again"),
    "429": (status(429, "slow\ndown \x1b"), "status 429, 'slow down \\x1b'; asking again"),
    "HTML with status 200": (raw("<html>login</html>", "text/html"), "got '<html>login</html>' (is this the address"),
    "truncated JSON": (raw(completion(tagged(GOOD))[:90]), "broken (JSONDecodeError)"),
    "compressed": (raw(b"\x1f\x8b\x08", Content_Encoding="gzip"), "got a compressed one"),
    "without end": (bad.flood, "at most 1048576 bytes"),
    # Answers of a model that are no good: not tried again as they are, but asked for anew.
    "null content": (says(None), "not used in full: expected a reply with text"),
    "refusal": (says("I'm sorry, I can't."), "not used in full: expected a text between"),
    "cut off": (says("<paraphrase>positive nega", "length"), "not used in full: the answer was cut off inside"),
}


@pytest.mark.parametrize("name", AGAIN)
def test_a_failure_is_followed_by_another_question(name, caplog):
    step, message = AGAIN[name]
    caplog.set_level(logging.INFO, "sapo_peft")
    made, server, _, seconds = ask(step, fresh())
    assert len(made.prompts) == 3 and made.rejected == () and made.notes() == []
    assert len(server.questions) == 2 and seconds < 5 and message in caplog.text
    assert server.sent < 2**26  # what has no end is not read to it
    assert {seen["accept-encoding"] for seen in server.headers_seen} == {"identity"}


def test_paid_answers_are_taken_and_counted():
    answers = (tagged(f"positive or negative, {number}") for number in range(9))
    usage = {"usage": {"prompt_tokens": 1000, "completion_tokens": 20, "total_tokens": 1020, "cost": 0.002}}
    script = [
        says(next(answers), "eos_token", **usage),
        says(next(answers), "", usage={"prompt_tokens": "many", "completion_tokens": -1}),
        says([{"type": "text", "text": next(answers)}], "STOP", **usage),
        says(next(answers) + "\n<paraphrase>positive nega", "length", **usage),
    ]
    made, server, source, _ = ask(*script, wanted=4, per_call=1)
    assert len(made.prompts) == 5 and len(server.questions) == 4
    assert source.spent == "3,000 tokens in, 60 out, cost 0.006"


FATAL = {
    "400": (status(400, "no such parameter"), "status 400, 'no such parameter'"),
    "401": (status(401, "wrong key"), "status 401 (is the key right"),
    "404": (status(404, "no model m"), "status 404, 'no model m'"),
    "404 with HTML": (raw("<html>", "text/html", 404), "status 404"),
    "307 to elsewhere": (status(307, Location="http://127.0.0.1:9/"), "status 307"),
    "no money": (status(429, "x", {"code": "insufficient_quota"}), "status 429, 'x'"),
    "in an hour": (status(429, "not now", Retry_After="3600"), "status 429, 'not now'; it asks to wait 3600 s"),
}


@pytest.mark.parametrize("name", FATAL)
def test_what_would_be_said_again_ends_it_at_once(name, caplog):
    step, message = FATAL[name]
    with pytest.raises(TooFewPrompts, match="expected at least 1 paraphrases, got 0; 0 of the 20") as caught:
        ask(step, wanted=20, minimum=1)
    assert message in str(caught.value)
    made, server, _, seconds = ask(step, wanted=20)
    assert made == POOL and len(server.questions) == 1 and seconds < 5 and message in caplog.text


def test_an_outage_ends_after_the_tries(caplog):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    gather(POOL, EndpointSource(url, "m", backoff=0.01), 20, deadline_seconds=20)
    assert "asking 6 times" in caplog.text and "refused" in caplog.text
    _, server, _, _ = ask(bad.silence, wanted=5, request_seconds=0.2)
    assert len(server.questions) == 2 and "no whole reply within 0.2 s" in caplog.text
    # One that recovers goes on: the failures of one question are not those of another.
    made, server, _, _ = ask(fresh(), *[status(500)] * 4, fresh(), *[status(500)] * 4, fresh(), wanted=15)
    assert len(made.prompts) == 16 and len(server.questions) == 11


def test_a_rate_limit_is_waited_for(caplog):
    """More often than a failure, for as long as the server says, or to the deadline."""
    made, server, _, seconds = ask(*[status(429, Retry_After="0.1")] * 8, fresh())
    assert len(made.prompts) == 3 and len(server.questions) == 9 and 0.8 <= seconds < 5
    _, server, _, seconds = ask(status(429, "Calm down"), deadline=1.0)
    assert len(server.questions) > 6 and 0.8 < seconds < 2.0
    assert "the last: status 429, 'Calm down'" in caplog.text and "of 1 s" in caplog.text


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        *(({"retry-after": odd}, None) for odd in ("0", "-5", "nan", "inf", "soon", "A" * 100_000)),
    ],
)
def test_the_wait_that_is_asked_for(headers, seconds):
    assert _retry_after(headers) == seconds


def test_a_server_on_this_machine_is_asked_without_a_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@127.0.0.1:9")
    assert len(ask(fresh())[0].prompts) == 3


@pytest.mark.parametrize("step", [bad.silence, bad.trickle])
def test_a_slow_server_is_cut(step, caplog):
    made, server, _, seconds = ask(step, fresh(), request_seconds=0.3)
    assert len(made.prompts) == 3 and len(server.questions) == 2 and 0.29 < seconds < 5
    *_, seconds = ask(step, deadline=0.3, wanted=5, per_call=1)
    assert seconds < 1.3 and "0 of the 5" in caplog.text and "of 0.3 s are left" in caplog.text
    # Nothing goes on reading in the background, though the server goes on sending.
    assert ended()


def ended():
    end = time.monotonic() + 5
    while working() and time.monotonic() < end:
        time.sleep(0.02)
    return working() == []


def working():
    return [thread for thread in threading.enumerate() if thread.name == "sapo-paraphrase"]


def test_a_name_that_is_looked_up_for_ever_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2.0))
    started = time.monotonic()
    made = gather(POOL, EndpointSource("http://nowhere.invalid/v1", "m"), 5, deadline_seconds=0.3)
    assert time.monotonic() - started < 1.3 and made == POOL and ended()


def test_answers_are_kept_when_others_hang(tmp_path, caplog):
    store = tmp_path / "pool.json"
    made, *_ = ask(fresh(), bad.silence, wanted=8, deadline=1.0, per_call=2, store=store)
    assert len(made.prompts) == 3 and "2 of the 8" in caplog.text and PromptPool.read(store) == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "host/v1"}, "base_url"),
        ({"base_url": "ftp://host/v1"}, "base_url"),
        ({"base_url": "http://user:secret@host/v1"}, "base_url"),
        ({"base_url": "http://host/v1?key=secret"}, "base_url"),
        ({"base_url": "http://[::1/v1"}, "base_url"),
        ({"request_seconds": float("nan")}, "request_seconds"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"{message}: expected") as caught:
        EndpointSource(**{"base_url": "http://h/v1", "model": "m", **options})
    assert "secret" not in str(caught.value)
