"""The key of an endpoint is in no log, error, text or file, whatever the server does with it."""

import io
import logging
import os
import traceback

import pytest

from sapo_kernels.files import DataError
from sapo_peft.paraphrase import EndpointSource, TooFewPrompts, gather
from tests.paraphrase import bad_server as bad
from tests.paraphrase.bad_server import POOL, BadServer, ask, endpoint, fresh, raw, says, status, tagged

pytest.importorskip("openai")
KEY = "sk-Canary7f3e9b1dQzX-04aa51"
environment = bad.environment


def everything_written(caplog, stream, *more):
    return "\n".join([caplog.text, stream.getvalue(), *map(str, more)])


KEY_STEPS = {
    "good": fresh(),
    "401 with the key": status(401, f"Incorrect API key provided: {KEY}."),
    "400 with the key": status(400, f"Bearer {KEY} is bad"),
    "400 with a part of it": status(400, f"bad key {KEY[:20]}"),
    "500 with the key": status(500, KEY, X_Echo=KEY),
    "429 with the key": status(429, KEY, Retry_After=KEY),
    "HTML with the key": raw(f"<html>{KEY}</html>", "text/html"),
    "broken JSON with the key": raw(f'{{"x": {KEY}'),
    "the key as a JSON key twice": raw(f'{{"{KEY}": 1, "{KEY}": 2}}'),
    "the key as the finish reason": says("x", KEY),
    "an answer with the key": says(tagged(f"positive negative {KEY}")),
    "an answer with a tag with the key": says(f"<paraphrase {KEY[:16]}>"),
    "the key in the status line": lambda handler: handler.send_error(500, KEY),
    "reset": bad.reset,
    "silence": bad.silence,
}


@pytest.mark.parametrize("name", KEY_STEPS)
def test_the_key_is_written_nowhere(name, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    stream, store = io.StringIO(), tmp_path / "pool.json"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s %(args)s"))
    logging.getLogger().addHandler(handler)
    source = None
    try:
        with BadServer(KEY_STEPS[name]) as server:
            source = endpoint(server, key_variable="MY_KEY", request_seconds=0.2, max_tries=2)
            made = gather(POOL, source, 2, minimum=2, deadline_seconds=3, store=store)
        shown = [made, made.notes()]
    except TooFewPrompts as error:
        seen, shown = error, []
        while seen is not None:
            text = traceback.TracebackException.from_exception(seen, capture_locals=True)
            shown += ["".join(text.format()), repr(seen), str(seen), vars(seen)]
            seen = seen.__cause__ or seen.__context__
    finally:
        logging.getLogger().removeHandler(handler)
    assert server.headers_seen[0]["authorization"] == f"Bearer {KEY}"  # it was there to be leaked
    files = [path.read_text() for path in tmp_path.iterdir()]
    out, err = capfd.readouterr()
    written = everything_written(
        caplog, stream, *files, *shown, repr(source), vars(source), out, err, os.listdir(tmp_path)
    )
    assert "HTTP" in written or "http" in written
    for start in range(0, len(KEY) - 9):
        assert KEY[start : start + 10].lower() not in written.lower()


def test_the_key_is_taken_from_the_environment_only(monkeypatch, caplog):
    _, server, _, _ = ask(fresh())
    assert KEY not in str(server.headers_seen)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    _, server, _, _ = ask(fresh())
    assert server.headers_seen[0]["authorization"] == f"Bearer {KEY}"
    assert (
        KEY not in os.environ.get("MY_KEY", "")
        and ask(fresh(), key_variable="MY_KEY")[1].headers_seen[0]["authorization"] == "Bearer none"
    )
    for options in ({"key_variable": f"{KEY}"}, {"model": f"m-{KEY}"}, {"base_url": f"http://h/{KEY}"}):
        with pytest.raises(ValueError) as caught:
            EndpointSource(**{"base_url": "http://h/v1", "model": "m", **options})
        assert KEY not in str(caught.value)
    EndpointSource("http://10.0.0.1/v1", "m")
    assert "sent unencrypted to 10.0.0.1" in caplog.text
    for wrong in (KEY + "\n", "a b", "schl\u00fcssel"):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        with pytest.raises(DataError, match="OPENAI_API_KEY: wanted a key of printable") as caught:
            EndpointSource("http://h/v1", "m")
        assert wrong.strip() not in str(caught.value)
