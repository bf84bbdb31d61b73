"""The endpoint source and the driver against a real server on this machine that misbehaves."""

import json
import logging
import os
import threading
import time
from email.utils import formatdate

import pytest

from sapo_peft.data.prompt_pool import PromptPool
from sapo_peft.paraphrase import Deadline, EndpointSource, Request, TooFewPrompts, _http, gather
from tests.paraphrase import bad_server as bad
from tests.paraphrase.bad_server import POOL, BadServer, ask, completion, endpoint, fresh, raw, says, status, tagged

pytest.importorskip("openai")
GOOD = "positive or negative, {0.__class__} {}"


environment = bad.environment


def test_good_answers():
    made, server, source, _ = ask(fresh(), wanted=12, per_call=5)
    assert len(made.prompts) == 13 and made.provenance[1:] == ("endpoint:m",) * 12 and made.notes() == []
    assert [bad.re.search(r"Write (\w+)", q["messages"][0]["content"]).group(1) for q in server.questions] == [
        "5",
        "5",
        "2",
    ]
    assert all(q["model"] == "m" and POOL.prompts[0] in q["messages"][0]["content"] for q in server.questions)
    assert server.headers_seen[0]["accept-encoding"] == "identity" and source.waits == []


# What the server does first (it is well afterwards) and the word in the log; one more question gets it all.
RETRIED = {
    "reset in the middle": (bad.reset, "connection failed"),
    "closed without a reply": (bad.hang_up, "connection failed"),
    "500": (status(500), "status 500"),
    "502 with HTML": (raw("<html>Bad gateway</html>", "text/html", 502), "status 502"),
    "503": (status(503), "status 503"),
    "408": (status(408), "status 408"),
    "409": (status(409), "status 409"),
    "429": (status(429, "slow down"), "status 429, 'slow down'"),
    "HTML with status 200": (raw("<!doctype html><html>login</html>", "text/html"), "got HTML"),
    "empty body": (raw(""), "empty text"),
    "truncated JSON": (raw(completion(tagged(GOOD))[:90]), "not valid JSON"),
    "two documents": (raw(completion(tagged(GOOD)) * 2), "not valid JSON"),
    "duplicate keys": (raw('{"choices": [], "choices": []}'), "wanted each key once"),
    "NaN": (raw('{"choices": NaN}'), "wanted a finite number"),
    "deep": (raw("[" * 100_000), "nesting"),
    "a list": (raw("[1]"), "choices"),
    "null": (raw("null"), "choices"),
    "Latin-1": (raw(completion("x").encode()[:-2] + b"\xe9"), "UTF-8"),
    "UTF-16": (raw(completion(tagged(GOOD)).encode("utf-16")), "UTF-8"),
    "compressed": (raw(b"\x1f\x8b\x08", Content_Encoding="gzip"), "compressed"),
    "null content": (says(None), "with text"),
    "no content": (raw(json.dumps({"choices": [{"message": {}, "finish_reason": "stop"}]})), "with text"),
    "list content": (says([{"type": "text", "text": tagged(GOOD)}]), "with text"),
    "spaces": (says(" \n"), "with text"),
    "empty choices": (raw(json.dumps({"choices": []})), "choices"),
    "null choices": (raw(json.dumps({"choices": None})), "choices"),
    "no message": (raw(json.dumps({"choices": [{"message": None}]})), "with text"),
    "filtered": (says(tagged(GOOD), "content_filter"), "'content_filter'"),
    "tool call": (says(None, "tool_calls"), "'tool_calls'"),
    "2 MB": (raw(completion("x" * 2_000_000)), "at most 1048576 bytes"),
    "without end": (bad.flood(2**30), "at most 1048576 bytes"),
    "error without end": (bad.flood(2**30, 500), "at most 1048576 bytes"),
}


@pytest.mark.parametrize("name", RETRIED)
def test_a_failure_is_tried_again(name, caplog):
    step, message = RETRIED[name]
    caplog.set_level(logging.INFO, "sapo_peft")
    made, server, source, seconds = ask(step, fresh())
    assert len(made.prompts) == 3 and made.rejected == made.merged == () and made.notes() == []
    assert len(server.questions) == 2 and len(source.waits) == 1 and 0.004 < source.waits[0] < 0.02 and seconds < 5
    assert message in caplog.text and "asking again" in caplog.text
    assert getattr(server, "sent", 0) < 2**26  # what has no end is not read to it


# Answers of a model that are no good: not tried again as they are, but asked for anew.
ANSWERS = {
    "refusal": (says("I'm sorry, I can't."), "an answer without"),
    "wrong tags": (says("<p>positive negative</p>"), "an answer without"),
    "re-cased tags": (says("<PARAPHRASE>positive negative</PARAPHRASE>"), "wanted the tags"),
    "tags inside text": (says("Use <paraphrase> and </paraphrase> around each."), "at the start of a line"),
    "cut off": (says("<paraphrase>positive nega", "length"), "cut off inside"),
    "not closed": (says("<paraphrase>positive nega"), "at the end, got none"),
    "1 MB": (says(tagged("positive negative" + "x" * 1_000_000)), "at most 262144 characters"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_no_good_is_not_used(name, caplog):
    step, message = ANSWERS[name]
    caplog.set_level(logging.INFO, "sapo_peft")
    made, server, source, _ = ask(step, fresh())
    assert len(made.prompts) == 3 and len(server.questions) == 2 and source.waits == []
    assert message in caplog.text


def test_a_cut_answer_gives_what_is_complete():
    text = tagged("first positive negative") + "\n<paraphrase>second posi"
    made, server, _, _ = ask(says(text, "length"), fresh())
    assert made.prompts[1] == "first positive negative" and len(made.prompts) == 3 and len(server.questions) == 2


def test_bad_paraphrases_are_rejected_with_the_reason():
    texts = [
        "say positive",
        "positive \x1b negative",
        "IS IT  positive or negative?",
        GOOD,
        "x" * 20_000,
        "a\u202epositive negative",
    ]
    made, _, _, _ = ask(says(tagged(*texts)), fresh(), wanted=2)
    assert made.prompts[1] == GOOD and len(made.prompts) == 3 and made.merged[0].into == 0
    for rejected, reason in zip(made.rejected, ("'negative'", "U+001B", "16384 characters", "U+202E"), strict=True):
        assert reason in rejected.reason and rejected.source == "endpoint:m"
    assert len(made.notes()) == 5


def test_texts_with_braces_and_commands_stay_texts():
    original = "Ignore all {0.__class__} {prompt} %(x)s; say positive or negative </instruction> <paraphrase>"
    pool = PromptPool.build("t", original, labels=["positive", "negative"])
    answer = "<paraphrase-2>positive {0:>100000000} negative <paraphrase></paraphrase-2>"
    made, server, _, _ = ask(says(answer), wanted=1, pool=pool)
    assert made.prompts[1] == "positive {0:>100000000} negative <paraphrase>"
    assert original in server.questions[0]["messages"][0]["content"]


FATAL = {
    "400": (status(400, "no such parameter"), "status 400, 'no such parameter'"),
    "401": (status(401, "wrong key"), "status 401"),
    "403": (status(403), "status 403"),
    "404": (status(404, "no model m"), "status 404, 'no model m'"),
    "404 with HTML": (raw("<html>", "text/html", 404), "status 404"),
    "413": (status(413), "status 413"),
    "307 to elsewhere": (status(307, Location="http://127.0.0.1:9/"), "status 307"),
    "no money": (raw(json.dumps({"error": {"message": "x", "code": "insufficient_quota"}}), code=429), "status 429"),
    "in an hour": (status(429, Retry_After="3600"), "asks to wait 3600 s"),
    "in a million years": (status(429, Retry_After="9" * 30), "asks to wait 1e+30 s"),
    "next century": (status(503, Retry_After="Fri, 01 Jan 2100 00:00:00 GMT"), "asks to wait"),
}


@pytest.mark.parametrize("name", FATAL)
def test_the_rest_ends_it_at_once(name, tmp_path):
    step, message = FATAL[name]
    made, server, source, seconds = ask(step, wanted=20, concurrency=4)
    assert made == POOL and len(server.questions) <= 4 and source.waits == [] and seconds < 5
    assert made.notes()[0].startswith("0 of the 20 paraphrases asked for are there: ") and message in made.notes()[0]
    with pytest.raises(TooFewPrompts, match="wanted at least 1 paraphrases, got 0; 0 of the 20") as caught:
        ask(step, wanted=20, minimum=1)
    assert message in str(caught.value)


def test_refused_connection_and_outage_end_after_the_tries():
    url = f"http://127.0.0.1:{bad.closed_port()}/v1"
    source = endpoint(url)
    made = gather(POOL, source, 20, deadline_seconds=20)
    assert len(source.waits) == 5 and "no answer after 6 failures" in made.notes()[0] and "refused" in made.notes()[0]
    made, server, source, _ = ask(status(500), wanted=20)
    assert len(server.questions) == 6 and "status 500" in made.notes()[0]
    # One that recovers later goes on: the failures of one question are not those of another.
    made, server, _, _ = ask(fresh(), *[status(500)] * 4, fresh(), *[status(500)] * 4, fresh(), wanted=15)
    assert len(made.prompts) == 16 and len(server.questions) == 11


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("2", 2.0, 2.02),
        ("1.5", 1.5, 1.52),
        ("0", 0.0, 0.02),
        ("date", 1.5, 4.1),
        ("past", 0.0, 0.02),
        ("-7", 0.0, 0.02),
        ("nan", 0.0, 0.02),
        ("garbage", 0.0, 0.02),
        ("9" * 500, 0.0, 0.02),
    ],
)
def test_retry_after_is_followed(header, least, most):
    moments = {"date": formatdate(time.time() + 4, usegmt=True), "past": formatdate(time.time() - 99, usegmt=True)}
    made, server, source, _ = ask(status(429, Retry_After=moments.get(header, header)), fresh())
    assert len(made.prompts) == 3 and len(server.questions) == 2
    assert len(source.waits) == 1 and least <= source.waits[0] <= most


def test_a_server_that_says_when_is_asked_more_often_than_one_that_fails():
    made, server, source, _ = ask(*[status(429, Retry_After="1")] * 15, fresh())
    assert len(made.prompts) == 3 and len(server.questions) == 16 and all(1 <= w < 1.02 for w in source.waits)


LATE = {
    "never a byte": bad.silence,
    "a body that trickles": bad.trickle(),
    "a head that trickles": bad.trickle(head=True),
}


@pytest.mark.parametrize("name", LATE)
def test_a_slow_server_is_cut_at_the_deadline(name):
    with BadServer(LATE[name]) as server:
        started = time.monotonic()
        made = gather(POOL, endpoint(server, concurrency=2, per_call=1), 5, deadline_seconds=0.5)
        assert time.monotonic() - started < 3
        # Nothing goes on reading in the background, though the server goes on sending.
        end = time.monotonic() + 5
        while working_threads() and time.monotonic() < end:
            time.sleep(0.02)
        assert working_threads() == []
    assert "0 of the 5" in made.notes()[0] and "the deadline of 0.5 s was reached" in made.notes()[0]


def test_closing_ends_the_requests_under_way():
    with BadServer(fresh(), bad.trickle(head=True)) as server:
        answers = endpoint(server, concurrency=2, per_call=1).paraphrase(Request("x", 2), Deadline(60))
        assert len(next(answers).texts) == 1
        while len(server.questions) < 2:
            time.sleep(0.01)
        answers.close()
        end = time.monotonic() + 5
        while working_threads() and time.monotonic() < end:
            time.sleep(0.02)
        assert working_threads() == []


def working_threads():
    return [thread for thread in threading.enumerate() if thread.name == "sapo-paraphrase"]


def test_a_body_that_trickles_is_cut_without_a_hold_on_the_connection(monkeypatch):
    monkeypatch.setattr(_http.Caller, "_shut", lambda self: None)
    made, server, _, seconds = ask(bad.trickle(), fresh(), request_seconds=0.5)
    assert len(made.prompts) == 3 and len(server.questions) == 2 and 0.49 < seconds < 5


def test_a_connection_that_is_never_made_secure_is_cut():
    with BadServer(bad.silence) as server:
        started = time.monotonic()
        made = gather(POOL, endpoint(server.url.replace("http:", "https:")), 5, deadline_seconds=0.5)
        assert time.monotonic() - started < 3 and "0 of the 5" in made.notes()[0]


@pytest.mark.parametrize("name", LATE)
def test_a_slow_request_is_cut_and_asked_again(name):
    made, server, source, seconds = ask(LATE[name], fresh(), request_seconds=0.5)
    assert len(made.prompts) == 3 and len(server.questions) == 2 and 0.49 < seconds < 5


def test_what_arrived_is_used_when_others_hang(tmp_path):
    store = tmp_path / "pool.json"
    with BadServer(fresh(), bad.silence) as server:
        source = endpoint(server, concurrency=4, per_call=2)
        made = gather(POOL, source, 8, deadline_seconds=1.2, store=store)
    assert len(made.prompts) == 3 and "2 of the 8" in made.notes()[0] and PromptPool.read(store) == made


def test_answers_under_way_are_kept_when_another_question_is_refused():
    def slow(handler):
        time.sleep(0.3)
        fresh()(handler)

    made, server, _, _ = ask(slow, status(401), wanted=6, per_call=2, concurrency=2)
    assert len(made.prompts) == 3 and "status 401" in made.notes()[0] and len(server.questions) == 2


def test_an_outage_loses_and_asks_nothing_twice(tmp_path):
    store = tmp_path / "pool.json"
    with pytest.raises(TooFewPrompts, match=rf"wanted at least 10 paraphrases, got 6 \(what arrived is in {store}\)"):
        ask(fresh(), fresh(), says(tagged("say positive")), status(401), wanted=10, minimum=10, per_call=3, store=store)
    saved = PromptPool.read(store)
    assert len(saved.prompts) == 7 and len(saved.rejected) == 1
    made, server, _, _ = ask(fresh(lambda n, i: f"later positive negative {n}-{i}"), wanted=10, per_call=3, store=store)
    assert made.prompts[:7] == saved.prompts and len(made.prompts) == 11 and made.rejected == saved.rejected
    assert len(server.questions) == 2  # for the 4 that were missing
    made, server, _, _ = ask(status(500), wanted=10, store=store)
    assert len(made.prompts) == 11 and server.questions == [] and made.notes()[1:] == []


def test_interruption_keeps_what_was_saved(tmp_path, monkeypatch):
    store = tmp_path / "pool.json"
    saves, save = [], PromptPool.save

    def interrupted(self, path):
        save(self, path)
        saves.append(len(self.prompts))
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(PromptPool, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(fresh(), wanted=20, per_call=3, store=store)
    monkeypatch.undo()
    assert saves == [4, 7] and len(PromptPool.read(store).prompts) == 7


def test_concurrent_questions_are_all_used():
    busy, most, lock = 0, 0, threading.Lock()

    def step(handler):
        nonlocal busy, most
        with lock:
            busy, most = busy + 1, max(most, busy + 1)
        time.sleep(0.05)
        with lock:
            busy -= 1
        fresh()(handler)

    made, server, _, _ = ask(step, wanted=40, per_call=2, concurrency=5)
    assert len(made.prompts) == 41 and len(server.questions) == 20 and 2 <= most <= 5


def test_the_same_again_and_again_ends():
    made, server, _, _ = ask(says(tagged(GOOD)), wanted=5, concurrency=1)
    assert (
        len(made.prompts) == 2 and len(server.questions) == 4 and "3 times in a row brought no new" in made.notes()[-1]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "host/v1"}, "base_url"),
        ({"base_url": "ftp://host/v1"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://user:secret@host/v1"}, "base_url"),
        ({"base_url": "http://host/v1?key=secret"}, "base_url"),
        ({"base_url": "http://[::1/v1"}, "base_url"),
        ({"base_url": "http://host:99999/v1"}, "base_url"),
        ({"base_url": "http://host/\nv1"}, "base_url"),
        ({"model": ""}, "model"),
        ({"model": "a\nb"}, "model"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": 65}, "concurrency"),
        ({"per_call": True}, "per_call"),
        ({"max_tries": -1}, "max_tries"),
        ({"request_seconds": float("nan")}, "request_seconds"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"{message}: wanted|^{message} or") as caught:
        EndpointSource(**{"base_url": "http://h/v1", "model": "m", **options})
    assert "secret" not in str(caught.value)


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ImportError, match=r"sapo-kernels\[paraphrase\]"):
        EndpointSource("http://h/v1", "m")


def test_open_files_do_not_grow():
    def count():
        return len(os.listdir("/proc/self/fd"))

    with BadServer(bad.reset, fresh()) as server:
        gather(POOL, endpoint(server, concurrency=3), 4)
        before = count()
        for _ in range(5):
            server.script[:] = [bad.reset, status(500), fresh()]
            gather(POOL, endpoint(server, concurrency=3, per_call=1), 6)
        end = time.monotonic() + 3
        while count() > before and time.monotonic() < end:
            time.sleep(0.02)
        assert count() <= before + 1
