"""GGUF: names of packaged models, files, and what loading leaves behind."""

from __future__ import annotations

import hashlib

import pytest

from sapo_kernels.files import DataError
from sapo_peft import gguf


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Two distributions that hold a file in two parts; returns how to put another in their place."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    packages = {"a-part1": b"GGUF one", "a-part2": b" and two"}

    def part(distribution, file):
        path = tmp_path / f"{file}.{distribution}"
        if distribution not in packages:
            return None
        path.write_bytes(packages[distribution])
        return path

    whole = hashlib.sha256(b"".join(packages.values())).hexdigest()
    monkeypatch.setattr(gguf, "_part", part)
    monkeypatch.setitem(gguf.MODELS, "a", gguf.Packaged("hub/a", "a.gguf", whole, tuple(packages)))
    return packages


def test_parts_are_assembled_once_and_verified(packages, tmp_path):
    folder, file = gguf.resolve("a")
    path = tmp_path / "cache" / "sapo_peft" / "a.gguf"
    assert (folder, file) == (str(path.parent), "a.gguf") and path.read_bytes() == b"GGUF one and two"
    made = path.stat().st_mtime_ns
    assert gguf.resolve("a") == (folder, file) and path.stat().st_mtime_ns == made
    packages["a-part2"] = b" and TWO"
    path.unlink()
    with pytest.raises(DataError, match=r"^a: .*a\.gguf: expected SHA-256 [0-9a-f]{64}, got"):
        gguf.resolve("a")


def test_without_its_package_a_name_is_a_hub_id(packages):
    del packages["a-part1"]
    assert gguf.resolve("a") == ("hub/a", None)


def test_a_file_is_taken_by_its_path_and_others_are_refused(tmp_path):
    good = tmp_path / "model.gguf"
    good.write_bytes(b"PK\x03\x04")
    assert gguf.resolve(str(good)) == (str(tmp_path), "model.gguf")
    for name, message in (("none.gguf", "no such file"), ("gpt9", "smollm2")):
        with pytest.raises(DataError, match=message):
            gguf.resolve(name)
    with pytest.raises(DataError, match=r"model\.gguf: cannot be loaded as GGUF"):
        gguf.load_gguf(str(tmp_path), "model.gguf")
