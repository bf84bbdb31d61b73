"""Every command, name, flag and path that README and docs show exists; the first example prints what is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sapo_kernels as sk
from sapo_peft.cli import sequence, train
from sapo_peft.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    )
}
README = PAGES["README.md"]
# Pages for users; the others speak of what was tried, too.
SHOWN = README + PAGES["docs/guide.md"] + PAGES["docs/promises.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def fences(language: str, text: str = SHOWN) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found, language
    return found


def anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_first_line_says_which_sapo():
    first = README.splitlines()[0]
    assert "State-Adaptive Prompt Optimization" in first and "2606.01967" in first
    assert "not Qwen's Soft Adaptive Policy Optimization" in first
    assert len(README.splitlines()) <= 150
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))


def test_first_example_prints_what_is_shown(capsys):
    exec(compile(fences("python", README)[0], "README.md", "exec"), {})
    printed, shown = capsys.readouterr().out.splitlines(), fences("text", README)[0].splitlines()
    number = re.compile(r"^\d+\.\d+")
    assert [number.sub("", line).rstrip() for line in printed] == [number.sub("", line).rstrip() for line in shown]
    for one, other in zip(printed[:-1], shown[:-1], strict=True):
        assert abs(float(number.match(one)[0]) - float(number.match(other)[0])) < 0.011


@pytest.mark.parametrize("name", PAGES)
def test_links_make_targets_and_modules_exist(name):
    page, folder = PAGES[name], (ROOT / name).parent
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page):
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert set(re.findall(r"`?\bmake ([a-z-]+)`", page)) <= targets
    for module in re.findall(r"python -m ((?:benchmarks|tests|tools|sapo_kernels)[\w.]*)", page):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    rooms = r"`((?:sapo_kernels|python|csrc|tests|tools|benchmarks|docs|examples)/[\w/.-]*)"
    for path in re.findall(rooms, page):
        assert (ROOT / path).exists(), path


def test_public_names_exist():
    named = set(re.findall(r"\bsk\.([A-Za-z_]+)", SHOWN))
    assert {"score_prompts", "ResponseCache", "verify", "tree_attention", "linear_logprob"} <= named
    for name in named:
        assert name in sk.__all__, name
    for name in set(re.findall(r"\bscores\.(?!json\b)([a-z_]+)", SHOWN)):
        assert hasattr(sk.PromptScores, name) or name in sk.PromptScores.__dataclass_fields__, name


def test_commands_parse():
    lines = [line.split("#")[0].split() for text in fences("bash") for line in text.splitlines()]
    commands = [line[1:] for line in lines if line[:1] == ["sapo"]]
    assert len(commands) >= 10
    for words in commands:
        args, rest = build_parser().parse_known_args(words)
        late = {"train": train._options, "sequence": sequence._options}.get(words[0])
        if late is None:
            assert args.run is not None and not rest, words
        elif "--config" not in words:
            late(words[1:])
