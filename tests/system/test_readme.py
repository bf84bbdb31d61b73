"""Every command, name, flag and path that the README shows exists."""

from __future__ import annotations

import re
from pathlib import Path

import sapo_kernels as sk
from sapo_peft.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def fences(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found, language
    return found


def test_first_line_says_which_sapo():
    first = README.splitlines()[0]
    assert "State-Adaptive Prompt Optimization" in first and "2606.01967" in first
    assert "not Qwen's Soft Adaptive Policy Optimization" in first


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_links_and_folders_exist():
    paths = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


def test_public_names_exist():
    named = set(re.findall(r"\bsk\.([A-Za-z_]+)", README))
    assert {"score_prompts", "ResponseCache", "tree_attention", "linear_logprob"} <= named
    for name in named:
        assert name in sk.__all__, name
    for name in set(re.findall(r"\bscores\.(?!json\b)([a-z_]+)", README)):
        assert hasattr(sk.PromptScores, name) or name in sk.PromptScores.__dataclass_fields__, name


def test_commands_parse():
    lines = [line.split("#")[0].split() for text in fences("bash") for line in text.splitlines()]
    commands = [line[1:] for line in lines if line[:1] == ["sapo"]]
    assert len(commands) >= 2
    for words in commands:
        # Options of train and sequence are read by the command itself.
        assert build_parser().parse_known_args(words)[0].run is not None


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"\b(TODO|FIXME|TBD|FAMILIES|SPEED)\b", README)
