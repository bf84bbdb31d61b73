"""The command line: results, options, and one line for everything that can be wrong."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import sapo_kernels as sk
from sapo_peft import tiny_model, tiny_tokenizer
from sapo_peft.cli import main as cli
from sapo_peft.cli import score as score_command
from tests.cli import cli_helpers
from tests.cli.cli_helpers import PROMPTS, ROWS, SCORE, one_line_error, ranks

files = cli_helpers.files
model = cli_helpers.model
sapo = cli_helpers.sapo


def test_score_prints_a_ranked_table(files, sapo, model):
    code, out, err = sapo(*SCORE, "--out", "s.json")
    assert code == 0 and err == ""
    scores = sk.score_prompts(model, PROMPTS, ROWS, tokenizer=tiny_tokenizer())
    table = ranks(out)
    assert [index for index, _ in table] == scores.ranking()
    for index, loss in table:
        assert abs(loss - float(scores.loss[index])) < 6e-5
    assert "3 prompts x 4 of 4 examples, tiny, float32 on cpu" in out
    assert f"Train with prompt {scores.best}: {PROMPTS[scores.best]}" in out
    assert f"{scores.stats['trie_tokens']} computed for {scores.stats['dense_tokens']}" in out
    assert all(len(line) <= 100 for line in out.splitlines()[1:5])
    saved = sk.PromptScores.load("s.json")
    assert torch.equal(saved.nll, scores.nll) and saved.prompts == PROMPTS


def test_compare(files, sapo):
    code, out, _ = sapo(*SCORE, "--compare", "--examples", "2")
    assert code == 0 and "2 of 4 examples" in out
    line = next(line for line in out.splitlines() if line.startswith("Plain loop"))
    assert "times the time" in line and float(line.split("cell ")[1].split()[0]) < 1e-4


def test_compare_notices_a_difference(files, sapo, monkeypatch):
    from sapo_peft import plain_loop

    real = plain_loop.plain_scores
    monkeypatch.setattr(plain_loop, "plain_scores", lambda *args: real(*args) + 0.1)
    code, out, err = sapo(*SCORE, "--compare")
    assert code == 1 and "off the plain loop" in err and "Train with prompt" in out


def test_options_reach_the_scoring(files, sapo, monkeypatch):
    seen = {}
    build, score = sk.ResponseCache.build, sk.score_prompts

    def spy_build(tokenizer, prompts, examples, **options):
        seen.update(options)
        return build(tokenizer, prompts, examples, **options)

    def spy_score(model, cache, **options):
        seen.update(options)
        return score(model, cache, **options)

    monkeypatch.setattr(sk.ResponseCache, "build", spy_build)
    monkeypatch.setattr(sk, "score_prompts", spy_score)
    arguments = ("--suffix", "S", "--text-word", "W", "--max-source", "99", "--max-target", "7")
    code, _, _ = sapo(*SCORE, *arguments, "--impl", "padded", "--max-tokens", "300", "--quiet")
    assert code == 0
    assert seen == {
        "template": None,
        "suffix": "S",
        "text_word": "W",
        "max_source": 99,
        "max_target": 7,
        "impl": "padded",
        "max_tokens": 300,
        "progress": False,
    }


def test_template_from_text_and_file(files, sapo):
    direct = sapo(*SCORE, "--template", "{prompt}: {input}")
    (files / "t.txt").write_text("{prompt}: {input}\n")
    from_file = sapo(*SCORE, "--template", "t.txt")
    assert direct[0] == from_file[0] == 0 and ranks(direct[1]) == ranks(from_file[1]) != ranks(sapo(*SCORE)[1])
    one_line_error(sapo(*SCORE, "--template", "none.txt"), "--template", "{prompt} and {input}")
    one_line_error(sapo(*SCORE, "--template", "{prompt} only"), "template")
    one_line_error(sapo(*SCORE, "--template", "{prompt}{input}", "--suffix", "x"), "--template", "--suffix")


def test_suffix_of_the_task_is_used_and_can_be_replaced(files, sapo):
    plain = ranks(sapo(*SCORE)[1])
    (files / "p.json").write_text(json.dumps({"prompts": PROMPTS, "suffix": "One word."}))
    assert ranks(sapo(*SCORE)[1]) != plain
    assert ranks(sapo(*SCORE, "--suffix", "")[1]) == plain
    _, _, err = sapo(*SCORE, "--template", "{prompt} {input}")
    assert "suffix is not added" in err


def test_csv_columns_and_empty_labels(files, sapo):
    (files / "d.csv").write_text("a,b\nx,yes\ny,\nz,no\n")
    arguments = ("score", "--prompts", "p.json", "--data", "d.csv", "--input-column", "a", "--target-column", "b")
    one_line_error(sapo(*arguments), "d.csv: line 3", "empty")
    code, out, err = sapo(*arguments, "--skip-empty")
    assert code == 0 and "2 of 3 examples" in out
    assert "sapo: note: d.csv: 1 of the rows read with an empty label left out" in err


def test_duplicates_are_noted_unless_quiet(files, sapo):
    (files / "p.json").write_text(json.dumps(["a b", "c", "a b"]))
    code, out, err = sapo(*SCORE)
    assert code == 0 and err == "sapo: note: prompt 2 repeats prompt 0 exactly\n"
    losses = dict(ranks(out))
    assert losses[0] == losses[2]
    assert sapo(*SCORE, "--quiet")[2] == ""


def test_task_is_found_from_the_data_folder(files, sapo):
    (files / "paraphrases.json").write_text(json.dumps({"task_x": ["one", "two"], "task_y": ["three"]}))
    (files / "task_x").mkdir()
    (files / "task_x" / "train.json").write_text(json.dumps(ROWS))
    for data in ("task_x", "task_x/train.json", "./task_x/"):
        code, out, _ = sapo("score", "--prompts", "paraphrases.json", "--data", data)
        assert code == 0 and out.startswith("task_x: 2 prompts x 4 of 4")
    code, out, _ = sapo("score", "--prompts", "paraphrases.json", "--data", "task_x", "--task", "task_y")
    assert code == 0 and out.startswith("task_y: 1 prompts")
    one_line_error(sapo("score", "--prompts", "paraphrases.json", "--data", "d.json"), "name of a task", "task_y")
    one_line_error(sapo("score", "--prompts", "paraphrases.json", "--data", "task_x", "--task", "task"), "task_x")


def test_bundled_tasks(files, sapo):
    from sapo_peft.assets import task_names

    code, out, err = sapo("score", "--task", task_names()[0], "--examples", "1")
    assert code == 0 and out.startswith(f"{task_names()[0]}: 21 prompts x 1 of ") and "bundled task" in err
    assert "original instruction" in out
    one_line_error(sapo("score", "--task", "nothing"), "wanted a task that is there")
    one_line_error(sapo("score", "--out", "x.json"), "--out", "--task")


def test_several_tasks_are_summed_up(files, sapo, monkeypatch):
    from sapo_peft import assets as bundled

    names = bundled.task_names()[:2]
    monkeypatch.setattr(bundled, "task_names", lambda: names)
    code, out, _ = sapo("score", "--examples", "1")
    assert code == 0 and out.count("Train with prompt") == 2 and "All 2 tasks together:" in out


BAD_CALLS = {
    "no prompts": (("score", "--data", "d.json"), ("--prompts and --data", "--data only")),
    "no data": (("score", "--prompts", "p.json"), ("--prompts only",)),
    "missing prompts": (("score", "--prompts", "x.json", "--data", "d.json"), ("x.json: No such file",)),
    "missing data": (("score", "--prompts", "p.json", "--data", "x.json"), ("x.json: No such file",)),
    "unknown impl": ((*SCORE, "--impl", "fast"), ("--impl", "tree", "'fast'")),
    "no examples": ((*SCORE, "--examples", "0"), ("--examples", "at least 1")),
    "negative": ((*SCORE, "--examples", "-3"), ("--examples",)),
    "words for numbers": ((*SCORE, "--max-tokens", "many"), ("--max-tokens", "'many'")),
    "nan": ((*SCORE, "--max-source", "nan"), ("--max-source",)),
    "unknown option": ((*SCORE, "--exampels", "3"), ("unrecognized arguments: --exampels",)),
    "abbreviation": ((*SCORE, "--exam", "3"), ("unrecognized arguments",)),
    "unknown command": (("scroe",), ("invalid choice: 'scroe'",)),
    "option without value": ((*SCORE, "--model"), ("expected one argument",)),
    "unknown dtype": ((*SCORE, "--dtype", "int8"), ("--dtype", "float32")),
    "column that is not there": ((*SCORE, "--input-column", "zz"), ("'zz'", "'sentence'")),
    "missing model": ((*SCORE, "--model", "./none"), ("--model", "./none", "no such folder")),
    "absolute missing model": ((*SCORE, "--model", "/none/none"), ("--model", "no such folder")),
    "model is a file": ((*SCORE, "--model", "d.json"), ("--model", "got a file")),
    "empty model": ((*SCORE, "--model", ""), ("--model",)),
    "model with a newline": ((*SCORE, "--model", "a\nb"), ("--model", "wanted a folder or a hub name")),
    "missing adapter": ((*SCORE, "--adapter", "./none"), ("--adapter", "no such folder")),
    "missing tokenizer": ((*SCORE, "--tokenizer", "./none"), ("tokenizer ", "no such folder")),
    "out in a missing folder": ((*SCORE, "--out", "no/s.json"), ("--out no/s.json",)),
    "out is a folder": ((*SCORE, "--out", "."), ("--out",)),
    "context too short for the prompt": ((*SCORE, "--max-source", "3"), ("prompt 0, example 0", "3 tokens")),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(files, sapo, name):
    arguments, words = BAD_CALLS[name]
    one_line_error(sapo(*arguments), *words)
    assert sorted(os.listdir(files)) == ["d.json", "p.json"]


BAD_CONTENT = {
    "not JSON": b"Is it good?",
    "UTF-16": '["a"]'.encode("utf-16"),
    "10 MB on one line": b'["' + b"a" * 10_000_000 + b'"]',
    "duplicate keys": b'{"t": ["a"], "t": ["b"]}',
    "empty": b"",
    "empty prompt": b'["a", ""]',
    "NUL": b'["a\\u0000"]',
    "special token": b'["a <|im_end|> b"]',
}


@pytest.mark.parametrize("name", BAD_CONTENT)
def test_bad_prompt_files(files, sapo, name):
    (files / "p.json").write_bytes(BAD_CONTENT[name])
    (files / "s.json").write_text("old")
    one_line_error(sapo(*SCORE, "--out", "s.json"), "rompt" if name == "special token" else "p.json")
    assert (files / "s.json").read_text() == "old"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_is_not_there(files, sapo):
    one_line_error(sapo(*SCORE, "--device", "cuda"), "--device cuda")


def test_control_characters_are_escaped(files, sapo):
    evil = "good\x1b[2J\x1b]0;title\x07 \u202eback\u2066 \x9b31m\u200b\ttab\nline\u2028end"
    (files / "p.json").write_text(json.dumps([evil, "x"]))
    code, out, err = sapo(*SCORE, "--suffix", "\x1b[31m")
    assert code == 0
    for line in (out + err).splitlines():
        assert line.isprintable()
    assert "good\\x1b[2J" in out
    one_line_error(sapo(*SCORE, "--task", "x", "--prompts", "\x1b[2J.json"), "\\x1b[2J.json")
    one_line_error(sapo("score", "--\x1b[2J"), "\\x1b[2J")


def test_braces_are_text(files, sapo):
    (files / "p.json").write_text(json.dumps(["{0.__class__}", "{0:>100000000}", "{input} {prompt} {", "%s %n"]))
    code, out, _ = sapo(*SCORE)
    assert code == 0 and "{0:>100000000}" in out and len(out) < 5000


def test_non_finite_weights(files, sapo, monkeypatch):
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight[ord("y")] = float("nan")
    monkeypatch.setattr("sapo_peft.tiny_random.tiny_model", lambda: broken)
    code, out, err = sapo(*SCORE, "--out", "s.json", "--compare")
    assert code == 2 and "nan" in out and "none of the 3 prompts has a finite loss" in err
    assert sk.PromptScores.load("s.json").nonfinite == [0, 1, 2]


def test_help_version_and_nothing(sapo):
    assert sapo()[0] == 0 and "score" in sapo()[1]
    code, out, _ = sapo("score", "--help")
    assert code == 0 and "--compare" in out and "linearised" in out
    assert sapo("--version")[1] == f"sapo-kernels {sk.__version__}\n"


def test_debug_shows_the_traceback(files, sapo):
    with pytest.raises(FileNotFoundError):
        sapo("score", "--prompts", "x.json", "--data", "d.json", "--debug")


@pytest.mark.parametrize(
    "error, line",
    [
        (KeyError("a"), "KeyError: 'a'"),
        (ValueError("two\nlines \x1b[0m"), "two lines \\x1b[0m"),
        (OSError(28, "No space left on device", "s.json"), "s.json: No space left on device"),
        (RuntimeError(), "no message"),
        (MemoryError("big"), "MemoryError: big"),
        (ValueError("x" * 5000), "xxx"),
    ],
)
def test_any_exception_is_one_line(files, sapo, monkeypatch, error, line):
    def fail(args):
        raise error

    monkeypatch.setattr(score_command, "run", fail)
    one_line_error(sapo(*SCORE), line)


def test_interrupt_and_broken_pipe(files, sapo, monkeypatch):
    def fail(args):
        raise args.error

    monkeypatch.setattr(score_command, "run", fail)
    parse = cli.build_parser

    def with_error(error):
        def build():
            parser = parse()
            parser.set_defaults(error=error)
            return parser

        return build

    monkeypatch.setattr(cli, "build_parser", with_error(KeyboardInterrupt()))
    assert sapo("score") == (130, "", "\nsapo: interrupted\n")
    monkeypatch.setattr(cli, "build_parser", with_error(BrokenPipeError()))
    monkeypatch.setattr(cli, "_drop_stdout", lambda: None)
    assert sapo("score") == (141, "", "")


def test_full_disk_keeps_the_old_scores(files, sapo, monkeypatch):
    (files / "s.json").write_text("old")

    def full(source, target):
        raise OSError(28, "No space left on device", target)

    monkeypatch.setattr(os, "replace", full)
    one_line_error(sapo(*SCORE, "--out", "s.json"), "No space left on device")
    assert (files / "s.json").read_text() == "old" and len(os.listdir(files)) == 3


# A job in the background of a shell starts with SIGINT ignored, hence the handler.
CHILD = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = {sys.path!r}
from sapo_peft.cli.main import main
"""


def child(*arguments, **variables):
    return subprocess.Popen(
        [sys.executable, "-c", f"{CHILD}sys.exit(main())", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


def test_process_ascii_terminal_and_closed_pipe(files):
    """Two real processes: a stdout that cannot show the text, and one that nobody reads."""
    (files / "p.json").write_text(json.dumps(["\u4f60\u597d", "caf\u00e9"]))
    first, second = child(*SCORE, PYTHONIOENCODING="ascii"), child(*SCORE)
    second.stdout.close()
    out, err = first.communicate(timeout=120)
    assert (first.returncode, err) == (0, b"") and b"caf\\xe9" in out
    assert second.stderr.read() == b"" and second.wait(timeout=120) == 141


def test_process_interrupted(files):
    """Ctrl-C while it runs: one line and exit code 130."""
    (files / "d.json").write_text(json.dumps(ROWS * 60))
    process = child(*SCORE, "--compare", "--quiet", PYTHONUNBUFFERED="1")
    process.stdout.readline()  # the scoring is done, the plain loop comes next
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, b"\nsapo: interrupted\n")


def test_help_needs_no_torch():
    code = f"{CHILD}main(['--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
