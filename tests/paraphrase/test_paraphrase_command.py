"""`sapo paraphrase`: from an endpoint, a model and a file; what it prints, writes and refuses."""

import json
import os
import time

import pytest

from sapo_peft.data.prompt_pool import PromptPool
from sapo_peft.paraphrase import LocalModelSource
from tests.cli import cli_helpers
from tests.cli.cli_helpers import child, one_line_error
from tests.paraphrase import bad_server
from tests.paraphrase.bad_server import BadServer, fresh, says, silence, status, tagged

files = cli_helpers.files
model = cli_helpers.model
sapo = cli_helpers.sapo
environment = bad_server.environment
KEY = "sk-Canary7f3e9b1dQzX-04aa51"
ASK = ("paraphrase", "--prompts", "o.json", "--out", "pool.json")


@pytest.fixture(autouse=True)
def original(files):
    document = {"prompts": ["Is it positive or negative?"], "labels": ["positive", "negative"], "suffix": "One word."}
    (files / "o.json").write_text(json.dumps(document))
    (files / "f.txt").write_text("a positive negative\nno\nA  positive negative\nb positive negative <x>\n")


@pytest.fixture
def endpoint():
    pytest.importorskip("openai")
    pytest.importorskip("tenacity")
    return lambda server: (*ASK, "--paraphrase-with", server.url, "--model", "m")


def test_from_an_endpoint(sapo, files, endpoint, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    texts = ["positive, negative, \x1b[31m{0.__class__}", "negative or positive?", "IS IT positive  or negative?"]
    usage = {"prompt_tokens": 1200, "completion_tokens": 30, "cost": 0.5}
    with BadServer(says(tagged("a positive", *texts), usage=usage), fresh()) as server:
        code, out, err = sapo(*endpoint(server), "--count", "4", "--key-variable", "MY_KEY")
    assert code == 0 and err == "" and server.headers_seen[0]["authorization"] == f"Bearer {KEY}"
    assert "o: the original and its paraphrases: 4 kept, 3 rejected" in out
    assert "the label 'negative'" in out and "U+001B" in out and "\x1b" not in out and KEY not in out + err
    assert "endpoint:m  negative or positive?" in out and "Pool written to pool.json." in out
    assert "as the endpoint counts it: 1,200 tokens in, 30 out, cost 0.5." in out
    assert all(len(line) <= 100 for line in out.splitlines())
    made = PromptPool.read("pool.json")
    assert len(made.prompts) == 5 and made.suffix == "One word." and made.task == "o"


def test_an_outage_is_resumed(sapo, endpoint):
    with BadServer(says(tagged("1 positive negative")), status(401)) as server:
        arguments = (*endpoint(server), "--count", "6")
        code, out, err = sapo(*arguments)
        assert code == 0 and "1 kept" in out and len(err.splitlines()) == 1
        assert "sapo: note: endpoint:m: 1 of the 6 paraphrases arrived" in err and "status 401" in err
        assert sapo(*arguments, "--quiet")[2] == ""
        one_line_error(sapo(*arguments, "--minimum", "3"), "at least 3 paraphrases, got 1", "pool.json")
        server.script[:] = [fresh()]
        code, out, err = sapo(*arguments)
        assert code == 0 and "6 kept" in out and "1 paraphrases from an earlier run" in err
        assert PromptPool.read("pool.json").prompts[1] == "1 positive negative"
        assert sapo(*arguments, "--overwrite")[0] == 0
    assert "1 positive negative" not in PromptPool.read("pool.json").prompts


def saved():
    return len(PromptPool.read("pool.json").prompts) if os.path.exists("pool.json") else 0


def test_one_run_at_a_time_and_one_that_is_killed_is_resumed(sapo, endpoint):
    with BadServer(fresh(), fresh(), silence) as server:
        arguments = endpoint(server)
        process = child(*arguments)
        try:
            end = time.monotonic() + 60
            while saved() < 11 and process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            one_line_error(sapo(*arguments), "pool.json: another process is writing here")
        finally:
            process.kill()
            process.communicate(timeout=20)
        assert saved() == 11
        server.script[:] = [fresh()]
        code, out, _ = sapo(*arguments)
    # Two, two that were missing, and perhaps the one that was cut off.
    assert code == 0 and "20 kept" in out and len(server.questions) <= 5


def test_from_a_file(sapo, files):
    code, out, err = sapo(*ASK, "--from", "f.txt")
    assert code == 0 and err == "" and "2 kept, 2 rejected" in out
    assert PromptPool.read("pool.json").provenance == ("original", "file:f.txt", "file:f.txt")
    code, out, err = sapo(*ASK, "--from", "f.txt", "--count", "9", "--overwrite")
    assert code == 0 and "2 of the 9" in err
    (files / "o.json").write_text(json.dumps(["Use <x> positive"]))
    code, out, _ = sapo(*ASK, "--from", "f.txt", "--marker", "<x>", "--overwrite")
    assert code == 0 and "1 kept" in out and "the marker '<x>'" in out


def test_from_a_model(sapo, model, monkeypatch):
    # Random weights write no tags: the pool stays as it was, and that is said.
    seeds = []
    monkeypatch.setattr(LocalModelSource, "_generate", lambda *given: seeds.append(given[2]) or "x")
    one_line_error(sapo(*ASK, "--paraphrase-with", "tiny", "--seed", "5", "--quiet"), "at least 1", "got 0", "without")
    assert seeds[0] == 5
    code, out, err = sapo(*ASK, "--paraphrase-with", "tiny", "--minimum", "0", "--count", "2")
    assert code == 0 and "0 kept" in out and "0 of the 2" in err


def test_an_output_that_is_an_input_or_not_ours_is_refused_unless_overwrite(sapo, files):
    (files / "ins.json").write_text(json.dumps({"t": {"instruction": "A positive"}, "u": {"instruction": "B"}}))
    ours = PromptPool.build("o", "Is it positive or negative?", suffix="One word.")
    ours.save("p.json")
    (files / "link.json").symlink_to("p.json")
    for arguments, words in (
        (("--prompts", "ins.json", "--task", "t", "--out", "ins.json"), ("another file than --prompts", "--overwrite")),
        (("--prompts", "p.json", "--out", "link.json"), ("another file than --prompts",)),
        (("--prompts", "o.json", "--out", "ins.json"), ("ins.json: expected a saved pool", "overwrite")),
        (("--prompts", "ins.json", "--task", "t", "--out", "p.json"), ("p.json: expected a pool of the task 't'",)),
        (("--prompts", "o.json", "--out", "f.txt"), ("f.txt",)),
        (("--prompts", "o.json", "--out", "new.txt"), ("ends in .json",)),
    ):
        before = {path: path.read_bytes() for path in files.iterdir() if path.suffix != ".lock"}
        one_line_error(sapo("paraphrase", "--from", "f.txt", *arguments), *words)
        assert before == {path: path.read_bytes() for path in files.iterdir() if path.suffix != ".lock"}
    code, out, _ = sapo("paraphrase", "--from", "f.txt", "--prompts", "o.json", "--out", "ins.json", "--overwrite")
    assert code == 0 and PromptPool.read("ins.json").task == "o"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--paraphrase-with or --from", "neither")),
        (("--from", "f", "--paraphrase-with", "x"), ("both",)),
        (("--paraphrase-with", "http://127.0.0.1:1/v1"), ("--model",)),
        (("--paraphrase-with", "tiny", "--model", "m"), ("--model",)),
        (("--from", "f", "--key-variable", "X"), ("--key-variable",)),
        (("--from", "none.txt"), ("none.txt", "No such file")),
        (("--from", "f.txt", "--minimum", "5", "--count", "2"), ("wanted, minimum: expected", "got 2 and 5")),
        (("--from", "f.txt", "--count", "0", "--minimum", "0"), ("wanted", "at least 1", "got 0")),
        (("--from", "f.txt", "--count", "9" * 5000), ("--count",)),
        (("--from", "f.txt", "--deadline", "nan"), ("deadline", "got nan")),
        (("--from", "f.txt", "--out", "no/where.json"), ("no/where.json", "folder")),
        (("--from", "f.txt", "--marker", "<Y>"), ("marker '<Y>'",)),
        (("--paraphrase-with", "http://u:secret@h/v1", "--model", "m"), ("base_url",)),
        (("--paraphrase-with", "./none"), ("--paraphrase-with './none': expected",)),
    ],
)
def test_faults_take_one_line(sapo, files, arguments, words):
    before = sorted(os.listdir(files))
    assert "secret" not in one_line_error(sapo(*ASK, *arguments), *words)
    assert sorted(os.listdir(files)) == before
