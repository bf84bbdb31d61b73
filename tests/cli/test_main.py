"""The command line as a whole: help, faults on one line, terminals, and what a plain installation lacks."""

import builtins
import io
import logging
import subprocess
import sys

import pytest

import sapo_kernels as sk
from sapo_peft import terminal
from sapo_peft.cli import main as cli
from sapo_peft.cli import score as score_command
from tests.cli.cli_helpers import CHILD, SCORE, child, one_line_error, put


def test_help_version_and_nothing(sapo):
    assert sapo()[0] == 0 and "score" in sapo()[1]
    for command, word in (("score", "linearised"), ("train", "--weight-decay"), ("sequence", "--adam-beta2")):
        code, out, _ = sapo(command, "--help")
        assert code == 0 and word in out
    assert sapo("--version")[1] == f"sapo-kernels {sk.__version__}\n"
    one_line_error(sapo("scroe"), "invalid choice: 'scroe'")
    one_line_error(sapo("score", "--model"), "expected one argument")
    one_line_error(sapo("score", "--\x1b[2J"), "\\x1b[2J")


def test_help_needs_no_torch():
    code = f"{CHILD}main(['--help']); assert not {{'torch', 'transformers', 'pydantic'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("words", [SCORE, ("train",), ("sequence",)])
def test_a_missing_package_is_named_with_its_extra(files, sapo, monkeypatch, words):
    def without(name, *args, real=builtins.__import__, **options):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **options)

    for name in [name for name in sys.modules if name.startswith(("sapo_peft.cli.options", "sapo_peft.cli.train_op"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    one_line_error(sapo(*words), "transformers is not installed", "pip install 'sapo-kernels[train]'")


def test_debug_shows_the_traceback(files, sapo):
    for words in (("score", "--prompts", "x.json", "--data", "d.json"),
                  ("train", "--prompts", "x.json", "--data", "d.json", "--output", "o")):  # fmt: skip
        with pytest.raises(FileNotFoundError):
            sapo(*words, "--debug")


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


def test_interrupt_and_broken_pipe(sapo, monkeypatch):
    for error, expected in (
        (KeyboardInterrupt(), (130, "", "\nsapo: interrupted\n")),
        (BrokenPipeError(), (141, "", "")),
    ):

        def fail(args, error=error):
            raise error

        monkeypatch.setattr(score_command, "run", fail)
        monkeypatch.setattr(cli, "_drop_stdout", lambda: None)
        assert sapo("score") == expected


def test_a_terminal_that_cannot_show_a_character(files, monkeypatch):
    put(files / "p.json", ["\u4f60\u597d", "caf\u00e9"])
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "argv", ["sapo", *SCORE, "--quiet"])
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main() == 0 and b"caf\\xe9" in out.buffer.getvalue()


def test_process_whose_output_nobody_reads():
    process = child("--version")
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=120) == 141


@pytest.mark.parametrize(
    "text, width, shown",
    [
        ("exactly 10", 10, "exactly 10"),
        ("longer than ten", 10, "longer..."),
        ("\u4f60\u597d\u4e16\u754c\u4f60\u597d", 10, "\u4f60\u597d\u4e16..."),
        ("e\u0301" * 5, 5, "e\u0301" * 5),
        ("a\tb\nc\\", 20, "a\\tb\\nc\\"),
        ("\ud800\ue000\U000e0041", 40, "\\ud800\\ue000\\U000e0041"),
        ("x" * 10_000_000, 8, "xxxxx..."),
    ],
)
def test_cut(text, width, shown):
    assert terminal.cut(text, width) == shown
    assert terminal.width_of(terminal.cut(text, width)) <= width


def test_notes_of_one_kind_are_one_line(capsys):
    empty = "of the rows read with an empty label left out"
    notes = [f"a.csv: 1 {empty}", f"task b: 12 {empty}", "p: 'x' is long", "p: 'y' is long", "p: 'y' is short"]
    logger = logging.getLogger("sapo_peft.some")
    with terminal.log_on_stderr("sapo_peft", quiet=False):
        for note in notes:
            logger.warning("%s", note)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [f"sapo: note: {notes[i]}" for i in (0, 2, 4)]
    assert lines[3:] == [f"sapo: note: 1 more like this one: {notes[i]}" for i in (0, 2)]


def test_doctor(sapo, monkeypatch):
    code, out, _ = sapo("doctor")
    assert code == 0 and "native modules" in out and out.count("\n  ok ") == 2 and "FAILED" not in out

    def broken():
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr("sapo_peft.cli.doctor.CHECKS", (("one", broken), ("two", lambda: "fine")))
    code, out, _ = sapo("doctor")
    assert code == 1 and "FAILED one" in out and "RuntimeError: out of\\nluck" in out and "ok     two" in out
