"""`sapo paraphrase`: from an endpoint, a model and a file; what it prints, writes and refuses."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from sapo_peft.cli import main as cli
from sapo_peft.data.prompt_pool import PromptPool
from sapo_peft.paraphrase.retry import Backoff
from tests.cli import cli_helpers
from tests.cli.cli_helpers import one_line_error
from tests.paraphrase.bad_server import BadServer, fresh, says, silence, status, tagged

files = cli_helpers.files
model = cli_helpers.model
sapo = cli_helpers.sapo
KEY = "sk-Canary7f3e9b1dQzX-04aa51"
ASK = ("paraphrase", "--prompts", "o.json", "--out", "pool.json")


@pytest.fixture(autouse=True)
def original(files, monkeypatch):
    document = {"prompts": ["Is it positive or negative?"], "labels": ["positive", "negative"], "suffix": "One word."}
    (files / "o.json").write_text(json.dumps(document))
    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name.startswith("OPENAI"):
            monkeypatch.delenv(name)


def test_from_an_endpoint(sapo, files, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    texts = ["positive, negative, \x1b[31m{0.__class__}", "negative or positive?", "IS IT positive  or negative?"]
    with BadServer(says(tagged("a positive", *texts)), fresh()) as server:
        code, out, err = sapo(*ASK, "--paraphrase-with", server.url, "--model", "m", "--count", "4")
    assert code == 0 and err == ""
    assert "o: the original and its paraphrases: 4 kept, 1 merged, 2 rejected" in out
    assert "expected the label 'negative'" in out and "U+001B" in out and "\x1b" not in out and KEY not in out + err
    assert "endpoint:m  negative or positive?" in out and "Pool written to pool.json." in out
    assert all(len(line) <= 100 for line in out.splitlines())
    made = PromptPool.read("pool.json")
    assert len(made.prompts) == 5 and made.suffix == "One word." and made.task == "o"
    assert KEY not in (files / "pool.json").read_text()


def test_options_reach_the_source(sapo, monkeypatch):
    pytest.importorskip("openai")
    from sapo_peft import paraphrase

    seen = {}

    class Spy(paraphrase.EndpointSource):
        def __init__(self, *given, **options):
            seen.update(options, given=given)
            super().__init__(*given, **options)

        def paraphrase(self, request, deadline):
            seen.update(wanted=request.wanted, seconds=deadline.seconds)
            raise paraphrase.SourceError("gone")

    # Set where lazy names land, and taken away again afterwards.
    monkeypatch.setitem(vars(paraphrase), "EndpointSource", Spy)
    arguments = ("--concurrency", "3", "--request-seconds", "7", "--key-variable", "MY_KEY", "--deadline", "9")
    result = sapo(*ASK, "--paraphrase-with", "http://h/v1", "--model", "m", "--count", "6", "--seed", "5", *arguments)
    one_line_error(result, "gone")
    backoff, same = seen.pop("backoff"), Backoff(seed=5)
    assert [backoff.wait(n) for n in (1, 2, 3)] == [same.wait(n) for n in (1, 2, 3)]
    assert seen.pop("given") == ("http://h/v1", "m")
    assert seen == {"concurrency": 3, "request_seconds": 7.0, "key_variable": "MY_KEY", "wanted": 6, "seconds": 9.0}


def test_an_outage_is_gone_on_from(sapo):
    pytest.importorskip("openai")
    with BadServer(says(tagged("1 positive negative")), status(401)) as server:
        arguments = (*ASK, "--paraphrase-with", server.url, "--model", "m", "--concurrency", "1", "--count", "6")
        code, out, err = sapo(*arguments)
        assert code == 0 and "1 kept" in out and len(err.splitlines()) == 1
        assert "sapo: note: endpoint:m: 1 of the 6 paraphrases asked for are there" in err and "status 401" in err
        assert sapo(*arguments, "--quiet")[2] == ""
        one_line_error(sapo(*arguments, "--minimum", "3"), "wanted at least 3 paraphrases, got 1", "pool.json")
        server.script[:] = [fresh()]
        code, out, err = sapo(*arguments)
    assert code == 0 and "6 kept" in out and "1 paraphrases from an earlier run" in err
    assert PromptPool.read("pool.json").prompts[1] == "1 positive negative"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_is_gone_on_from(sapo, files, number):
    pytest.importorskip("openai")
    with BadServer(fresh(), fresh(), silence) as server:
        arguments = (*ASK, "--paraphrase-with", server.url, "--model", "m", "--concurrency", "1")
        code = f"import sys; sys.path[:0] = {sys.path!r}; from sapo_peft import cli; sys.exit(cli.main())"
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
        try:
            end = time.monotonic() + 60
            while len(server.questions) < 3 and process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            process.send_signal(number)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
        assert process.returncode == (130 if number == signal.SIGINT else -number), err
        assert err.strip() == ("sapo: interrupted" if number == signal.SIGINT else "")
        assert len(PromptPool.read("pool.json").prompts) == 11
        server.script[:] = [fresh()]
        code, out, _ = sapo(*arguments)
    assert code == 0 and "20 kept" in out and len(server.questions) == 5


def test_from_a_file(sapo, files):
    (files / "f.txt").write_text("a positive negative\nno\nA  positive negative\nb positive negative <x>\n")
    code, out, err = sapo(*ASK, "--from", "f.txt")
    assert code == 0 and err == "" and "2 kept, 1 merged, 1 rejected" in out
    assert PromptPool.read("pool.json").provenance == ("original", "file:f.txt", "file:f.txt")
    code, out, err = sapo("paraphrase", "--prompts", "o.json", "--out", "q.json", "--from", "f.txt", "--count", "9")
    assert code == 0 and "2 of the 9" in err
    (files / "o.json").write_text(json.dumps(["Use <x> positive"]))
    arguments = ("paraphrase", "--prompts", "o.json", "--out", "r.json", "--from", "f.txt", "--marker", "<x>")
    code, out, _ = sapo(*arguments)
    assert code == 0 and "1 kept" in out and "expected the marker '<x>'" in out


def test_from_a_model(sapo, model, monkeypatch):
    # Random weights write no tags: the pool stays as it was, and that is said.
    from sapo_peft.paraphrase import local_model

    seeds = []
    monkeypatch.setattr(
        local_model.LocalModelSource, "_generate", lambda self, ids, seed, deadline: (seeds.append(seed) or "x", False)
    )
    one_line_error(sapo(*ASK, "--paraphrase-with", "tiny", "--seed", "5", "--quiet"), "at least 1", "got 0", "without")
    assert seeds[0] == 5
    code, out, err = sapo(*ASK, "--paraphrase-with", "tiny", "--minimum", "0", "--count", "2")
    assert code == 0 and "0 kept" in out and "0 of the 2" in err


def test_special_tokens_of_the_tokenizer_are_refused(sapo, files, monkeypatch):
    from sapo_peft import loading as _loading
    from sapo_peft import tiny_tokenizer

    monkeypatch.setattr(_loading, "_load_tokenizer", lambda name: tiny_tokenizer())
    (files / "f.txt").write_text("a positive negative <|im_end|>\nb positive negative\n")
    code, out, _ = sapo(*ASK, "--from", "f.txt", "--tokenizer", "any")
    assert code == 0 and "1 kept" in out and "special token" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--paraphrase-with or --from", "neither")),
        (("--from", "f", "--paraphrase-with", "x"), ("both",)),
        (("--paraphrase-with", "http://127.0.0.1:1/v1"), ("--model",)),
        (("--paraphrase-with", "tiny", "--model", "m"), ("--model",)),
        (("--from", "f", "--key-variable", "X"), ("--key-variable",)),
        (("--from", "none.txt"), ("none.txt", "No such file")),
        (("--from", "o.json", "--minimum", "5", "--count", "2"), ("--minimum", "--count 2")),
        (("--from", "o.json", "--count", "0"), ("--count", "at least 1")),
        (("--from", "o.json", "--count", "9" * 5000), ("--count",)),
        (("--from", "o.json", "--deadline", "nan"), ("--deadline",)),
        (("--from", "o.json", "--task", "u", "--prompts", "p.json", "--out", "d.json"), ("d.json",)),
        (("--from", "o.json", "--out", "no/where.json"), ("no/where.json", "folder")),
        (("--from", "o.json", "--marker", "<Y>"), ("marker '<Y>'",)),
        (("--paraphrase-with", "http://u:secret@h/v1", "--model", "m"), ("base_url",)),
        (("--paraphrase-with", "./none"), ("none",)),
    ],
)
def test_faults_take_one_line(sapo, files, arguments, words):
    before = sorted(path.name for path in files.iterdir())
    assert "secret" not in one_line_error(sapo(*ASK, *arguments), *words)
    assert sorted(path.name for path in files.iterdir()) == before


def test_the_logger_is_left_as_it_was(sapo, files):
    logger = logging.getLogger("sapo_peft.paraphrase")
    before = logger.level, logger.propagate, list(logger.handlers)
    (files / "f.txt").write_text("a positive negative\n")
    assert sapo(*ASK, "--from", "f.txt")[0] == 0
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_the_parser_does_not_load_torch():
    from tests.system.test_imports import fresh_python

    code = (
        "import argparse, sys; sys.path.insert(0, 'python'); from sapo_peft import paraphrase_command as command; "
        "command.add_parser(argparse.ArgumentParser().add_subparsers()); "
        "print('torch' in sys.modules, 'openai' in sys.modules)"
    )
    assert fresh_python(code) == "False False\n"
    assert "paraphrase_command" in cli.COMMANDS
