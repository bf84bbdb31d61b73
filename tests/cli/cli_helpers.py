"""Fixtures and checks shared by the tests of the readers and of the command line."""

import json
import os
import re
import subprocess
import sys

import pytest

from sapo_peft import tiny_model
from sapo_peft.cli import main as cli
from tests.oracles import small_qwen3

PROMPTS = ["Is it good?", "Say yes or no.", "Answer with one word: is the text below kind?"]
ROWS = [{"sentence": f"text {i}", "label": "yes" if i % 2 else "no, never"} for i in range(4)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def files(tmp_path, model, monkeypatch):
    """Small prompts and data; the working directory; `tiny` is made once for all tests."""
    (tmp_path / "p.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sapo_peft.tiny_random.tiny_model", lambda: model)
    return tmp_path


@pytest.fixture
def tiny(monkeypatch):
    """`tiny`, smaller still."""
    monkeypatch.setattr("sapo_peft.tiny_random.tiny_model", lambda: small_qwen3(2816))


@pytest.fixture
def sapo(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = cli.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


SCORE = ("score", "--prompts", "p.json", "--data", "d.json")


def one_line_error(result, *words):
    """Exit code 2, nothing on stdout, and one printable line on stderr with these words."""
    code, out, err = result
    errors = [line for line in err.splitlines() if not line.startswith("sapo: note:")]
    assert code == 2 and out == "" and len(errors) == 1, err
    assert errors[0].startswith("sapo: error: ") and errors[0].isprintable() and len(errors[0]) < 1200
    for word in words:
        assert word in errors[0]
    return errors[0]


def ranks(out):
    """(prompt index, loss) of each line of the table."""
    rows = re.findall(r"^ *\d+ +(\d+) +([\d.]+)  ", out, re.MULTILINE)
    return [(int(index), float(loss)) for index, loss in rows]


# A job in the background of a shell starts with SIGINT ignored, hence the handler.
CHILD = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = {sys.path!r}
from sapo_peft.cli.main import main
"""


def child(*arguments, **variables):
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{CHILD}sys.exit(main())", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


SENTENCES = [{"sentence": f"s{i}", "label": f"l{i}"} for i in range(3)]


def put(path, value):
    """Write text, bytes or JSON, making folders on the way; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture
def data_folder(tmp_path):
    """A small data folder: two tasks with instructions, paraphrases of one and a half of them."""
    instructions = {
        "task1_a": {
            "instruction": "Original A",
            "suffix": "Say yes or no.",
            "labels": ["yes", "no"],
            "size": [3, 0],
        },
        "task1_b": {"instruction": "Original B", "suffix": "", "labels": [], "text_word": "\u6587\u672c"},
    }
    put(tmp_path / "SUPERNI" / "instructions.json", instructions)
    put(tmp_path / "paraphrases.json", {"task1_a": ["A one", "A two"], "task1_c": ["C one"]})
    for task in ("task1_a", "task1_b"):
        put(tmp_path / "SUPERNI" / task / "train.json", SENTENCES)
        put(tmp_path / "SUPERNI" / task / "test.json", SENTENCES[:1])
    return tmp_path
