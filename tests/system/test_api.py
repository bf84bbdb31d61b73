"""Every public name has a docstring with what it needs, and docs/api.md says what they say."""

from __future__ import annotations

import dataclasses

import pytest

from tools import api_docs


def test_every_public_name_says_what_it_needs(capsys):
    assert api_docs.main(["--check"]) == 0, capsys.readouterr().out


def undocumented(a): ...


def silent(a, b):
    """Adds `a`."""
    if b:
        raise ValueError(b)
    return a


@dataclasses.dataclass
class Half:
    """Holds `a`."""

    a: int
    b: int

    def method(self):
        return self.a

    @property
    def whole(self) -> int:
        """Both."""
        return self.a + self.b


def test_what_is_missing_is_named():
    assert api_docs.faults("f", undocumented) == ["f: expected a docstring, got none"]
    assert api_docs.faults("g", silent) == [
        "g: expected what it raises, got nothing of it", "g: expected a word on b, got none",
    ]  # fmt: skip
    assert api_docs.faults("Half", Half) == [
        "Half: expected a word on b, got none", "Half.method: expected a docstring, got none",
    ]  # fmt: skip
    assert api_docs.faults("CONSTANT", 7) == []


def test_the_html_shows_public_names_only(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is of the extra docs")
    api_docs.write_html(tmp_path)
    page = (tmp_path / "sapo_peft.html").read_text(encoding="utf-8")
    assert 'id="attach_sapo"' in page and "_HOMES" not in page
    assert (tmp_path / "sapo_kernels.html").exists() and not (tmp_path / "sapo_kernels").exists()
