"""What replies of endpoints mean: how long to wait, what ended by itself, what would be said again."""

from email.utils import formatdate
from types import SimpleNamespace as Object

import pytest

from sapo_peft.paraphrase.reply import completion, refused, told_wait

NOW = 1_700_000_000.0
WAITS = [
    ({}, "", None),
    ({"retry-after": "5"}, "", 5.0),
    ({"retry-after": "1.5"}, "try again in 20s", 1.5),
    ({"retry-after": "86400000"}, "", 86_400_000.0),
    ({"retry-after-ms": "1500", "retry-after": "2"}, "", 1.5),
    ({"retry-after": formatdate(NOW + 7, usegmt=True)}, "", 7.0),
    ({"retry-after": "Wed, 15 Nov 2023 00:13:27 +0200"}, "", 7.0),
    ({"retry-after": "1m2.5s"}, "", 62.5),
    *(({"retry-after": odd}, "", None) for odd in ("0", "-5", "nan", "", "soon", "1.2.3", "A" * 100_000)),
    ({"retry-after": "Fri, 99 Foo 99999 99:99:99 GMT"}, "", None),
    ({"retry-after": "9" * 99}, "", float("9" * 99) / 1000),
    ({}, "Rate limit reached for m. Please try again in 20s. Limit: 3 / min", 20.0),
    ({}, "Please try again in 6m0s.", 360.0),
    ({}, "retry after 1m2s", 62.0),
    ({}, "Please retry after 26 seconds.", 26.0),
    ({}, "Try again in 1 minute and 5 seconds", 65.0),
    ({}, "try your request again in 320ms", 0.32),
    ({}, "Please wait for 2 hours", 7200.0),
    ({}, '{"error": {"retry_after": 12.5}}', 12.5),
    ({}, '{"retry_after_ms": 1500}', 1.5),
    ({}, '[{"error": {"details": [{"@type": "x/RetryInfo", "retryDelay": "27s"}]}}]', 27.0),
    ({}, "Retry later. The limit is 500 requests.", None),
    ({"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-reset-tokens": "17ms"}, "", 0.017),
    ({"x-ratelimit-reset": "30", "x-ratelimit-remaining": "0"}, "wait 4 s", 4.0),
    ({"ratelimit-reset-a": "30s", "ratelimit-remaining-a": "0", "ratelimit-reset-b": "2s"}, "", 30.0),
    ({"x-ratelimit-reset": str(int((NOW + 9) * 1000))}, "", 9.0),
    ({"x-ratelimit-reset": str(int(NOW + 9))}, "", 9.0),
    ({"anthropic-ratelimit-requests-reset": "2023-11-14T22:13:28Z"}, "", 8.0),
    ({"x-ratelimit-reset-requests": "8h"}, "", None),  # beyond the deadline: it may be another limit's
]  # fmt: skip


@pytest.mark.parametrize(("headers", "body", "seconds"), WAITS)
def test_the_wait_that_is_asked_for(headers, body, seconds):
    assert told_wait(headers, body, 600.0, NOW) == (seconds if seconds is None else pytest.approx(seconds))


def chat(reason, content="text"):
    return Object(choices=[Object(finish_reason=reason, message=Object(content=content))])


@pytest.mark.parametrize("reason", ["stop", "", None, "eos_token", "STOP", "end_turn", "stop_sequence", "COMPLETE"])
def test_what_ended_by_itself_is_taken(reason):
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a "}, {"text": "b"}, None]
    assert completion(chat(reason)).text == "text" and completion(chat(reason, parts)).text == "a b"
    assert completion(chat(reason)).cut is False


def test_what_was_stopped_is_cut_or_refused():
    for reason in ("length", "max_tokens", "MAX_TOKENS", "model_length"):
        assert completion(chat(reason)).cut
    for reason in ("content_filter", "SAFETY", "tool_calls", "function_call", "error", "RECITATION"):
        assert completion(chat(reason)).kind == "answer" and repr(reason.lower()) in completion(chat(reason)).fault
    for content in (None, "", " \n", [], [{"type": "image"}], 7):
        assert completion(chat("stop", content)).fault == "expected a reply with text, got none"


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (500, {"message": "x"}, "failure"),
        (408, None, "failure"),
        (429, {"message": "x"}, "limited"),
        (503, {"message": "retry in 3 s"}, "limited"),
        (400, {"message": "retry in 3 s"}, "refusal"),
        (422, {"detail": [{"msg": "field"}]}, "refusal"),
        (429, {"message": "check your plan and billing details", "status": "RESOURCE_EXHAUSTED"}, "limited"),
        (429, {"message": "check your plan and billing details", "code": "insufficient_quota"}, "refusal"),
        (500, {"message": "This model's maximum context length is 4096 tokens"}, "refusal"),
        (429, {"message": "Request too large for m on tokens per minute: try again in 2s"}, "refusal"),
    ],
)
def test_what_would_be_said_again_is_a_refusal(status, error, kind):
    assert refused(status, error, {}, str(error)).kind == kind


def test_an_error_in_a_reply_with_status_200_is_one():
    for error, kind in (({"message": "x", "code": 429}, "limited"), ({"code": 502}, "failure"), ("no", "refusal")):
        assert completion(Object(choices=None, error=error)).kind == kind
