"""The key of an endpoint is in no log, error, text or file, whatever the server does with it."""

import io
import logging
import os
import traceback

import pytest

from sapo_kernels.files import DataError
from sapo_peft.paraphrase import EndpointSource, TooFewPrompts, gather
from tests.paraphrase import bad_server as bad
from tests.paraphrase.bad_server import POOL, BadServer, ask, fresh, raw, says, status, tagged

pytest.importorskip("openai")
pytest.importorskip("tenacity")
KEY = "sk-Canary7f3e9b1dQzX-04aa51"
environment = bad.environment

KEY_STEPS = {
    "good": fresh(),
    "401 with the key": status(401, f"Incorrect API key provided: {KEY}."),
    "400 with a part of it": status(400, f"bad key {KEY[:20]}"),
    "500 with the key": status(500, KEY.upper(), Retry_After=KEY),
    "HTML with the key": raw(f"<html>{KEY}</html>", "text/html"),
    "an answer with the key": says(tagged(f"positive negative {KEY}")),
    "the key in the status line": lambda handler: handler.send_error(500, KEY),
}


@pytest.mark.parametrize("name", KEY_STEPS)
def test_the_key_is_written_nowhere(name, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG, "sapo_peft")
    stream, shown = io.StringIO(), []
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s %(args)s"))
    logging.getLogger().addHandler(handler)
    with BadServer(KEY_STEPS[name]) as server:
        source = EndpointSource(server.url, "m", "MY_KEY", request_seconds=0.2, max_tries=2, backoff=0.01)
        try:
            made = gather(POOL, source, 2, minimum=2, deadline_seconds=3, store=tmp_path / "pool.json")
            shown += [made, made.notes()]
        except TooFewPrompts as error:
            while error is not None:
                text = traceback.TracebackException.from_exception(error, capture_locals=True)
                shown += ["".join(text.format()), repr(error), vars(error)]
                error = error.__cause__ or error.__context__
        finally:
            logging.getLogger().removeHandler(handler)
    assert server.headers_seen[0]["authorization"] == f"Bearer {KEY}"  # it was there to be leaked
    shown += [caplog.text, stream.getvalue(), *capfd.readouterr(), repr(source), vars(source)]
    written = "\n".join(map(str, [*shown, *(path.read_text() for path in tmp_path.iterdir())])).lower()
    assert "positive" in written and not any(KEY[i : i + 10].lower() in written for i in range(len(KEY) - 9))


def test_the_key_is_taken_from_the_environment_only(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for options, sent in (({}, f"Bearer {KEY}"), ({"key_variable": "MY_KEY"}, "Bearer none")):
        assert ask(fresh(), **options)[1].headers_seen[0]["authorization"] == sent
    with pytest.raises(ValueError, match="key_variable") as caught:
        EndpointSource("http://h/v1", "m", KEY)
    assert KEY not in str(caught.value)
    EndpointSource("http://10.0.0.1/v1", "m")
    assert "sent unencrypted to 10.0.0.1" in caplog.text
    for wrong in (KEY + "\n", "a b", "schl\u00fcssel"):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        with pytest.raises(DataError, match="OPENAI_API_KEY: expected a key of printable") as caught:
            EndpointSource("http://h/v1", "m")
        assert wrong.strip() not in str(caught.value) and os.environ["OPENAI_API_KEY"] == wrong
