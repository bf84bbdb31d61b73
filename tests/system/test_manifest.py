"""Manifests: every damage to a folder is found and named; a folder between two writes is sound."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest

from sapo_kernels import files
from sapo_kernels.files import DataError, atomic_write, write_json
from sapo_kernels.manifest import MANIFEST, check_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    """Two files, one of them in a folder, and a folder inside with a manifest of its own."""
    for name, text in {"a.json": "{}\n", "sub/b.bin": "\0\1" * 50, "inner/deep/c.txt": "text", "inner/d": ""}.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    write_manifest(tmp_path / "run" / "inner", "part")
    write_manifest(tmp_path / "run", "whole")
    return tmp_path / "run"


def test_what_is_listed(folder):
    document = json.loads((folder / MANIFEST).read_text())
    assert list(document["files"]) == ["a.json", f"inner/{MANIFEST}", "sub/b.bin"]
    assert document["files"]["sub/b.bin"]["size"] == 100 and "pending" not in document
    check_manifest(folder, "whole")
    check_manifest(folder / "inner", "part")
    moved = shutil.copytree(folder, folder.with_name("moved"))
    check_manifest(moved, "whole")


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "a.json").unlink(), "a.json: expected this file"),
    (lambda f: (f / "a.json").write_text("[]\n"), "a.json: expected sha256"),
    (lambda f: (f / "sub" / "b.bin").write_bytes(b"\0"), "expected size 100 bytes as in sapo_manifest.json, got 1"),
    (lambda f: (f / "sub" / "new.bin").write_text(""), "new.bin: expected only files that"),
    (lambda f: (f / "inner" / "deep" / "c.txt").write_text("texT"), "c.txt: expected sha256"),
    (lambda f: (f / "inner" / "e").write_text(""), "e: expected only files that"),
    (lambda f: (f / "inner" / MANIFEST).unlink(), f"inner/{MANIFEST}: expected this file"),
    (lambda f: write_manifest(f / "inner", "other"), f"inner/{MANIFEST}: expected"),
    (lambda f: shutil.rmtree(f / "inner"), f"inner/{MANIFEST}: expected this file"),
    (lambda f: (f / MANIFEST).unlink(), "expected the manifest of this folder, got none"),
    (lambda f: (f / MANIFEST).write_text("{"), "not valid JSON"),
    (lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text() + " "), "got an edited one"),
    (lambda f: (f / MANIFEST).write_text("[]"), "expected a manifest of whole, version 1"),
    (lambda f: write_manifest(f, "part"), "expected a manifest of whole"),
    (lambda f: write_json(f / MANIFEST, {"schema": "whole", "version": 1, "files": []}), "got an edited one"),
    (lambda f: ((f / "a.json").unlink(), (f / "a.json").symlink_to("/etc/hostname")), "expected a regular file"),
    (lambda f: (f / "more").symlink_to("sub"), "more: expected a folder, got a link"),
])  # fmt: skip
def test_damage_is_named(folder, damage, words):
    damage(folder)
    with pytest.raises(DataError) as error:
        check_manifest(folder, "whole")
    assert words in str(error.value)


def test_every_flipped_bit_is_found(folder):
    draw, files = random.Random(3), [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for number in range(300):
        path = files[number % len(files)]
        before = path.read_bytes()
        if not before:
            continue
        after = bytearray(before)
        after[draw.randrange(len(after))] ^= 1 << draw.randrange(8)
        path.write_bytes(after)
        with pytest.raises(DataError):
            check_manifest(folder, "whole")
        path.write_bytes(before)
    check_manifest(folder, "whole")


def test_between_two_writes_both_states_are_sound(folder):
    write_manifest(folder, "whole", pending={"a.json": b"[]", "new.json": b"{}"})
    check_manifest(folder, "whole")
    atomic_write(folder / "a.json", b"[]")
    check_manifest(folder, "whole")
    atomic_write(folder / "new.json", b"{}")
    check_manifest(folder, "whole")
    (folder / "new.json").write_bytes(b"{ ")
    with pytest.raises(DataError, match="new.json: expected sha256"):
        check_manifest(folder, "whole")
    (folder / "new.json").write_bytes(b"{}")
    write_manifest(folder, "whole")
    (folder / "a.json").write_bytes(b"{}\n")
    with pytest.raises(DataError, match="a.json: expected size 2 bytes"):
        check_manifest(folder, "whole")


def test_what_is_passed_over(folder):
    (folder / "log.txt").write_text("x")
    (folder / "sub" / ".sapo-0123456789abcdef.tmp").write_text("left by a kill")
    (folder / "scratch" / "deep").mkdir(parents=True)
    (folder / "scratch" / "deep" / "x").write_text("x")
    check_manifest(folder, "whole", skip=lambda path: path in ("log.txt", "scratch/"))
    # What a reader passes over may be listed, and be another file by now.
    (folder / "a.json").unlink()
    check_manifest(folder, "whole", skip=lambda path: path in ("log.txt", "scratch/", "a.json"))
    with pytest.raises(DataError, match="a.json: expected this file"):
        check_manifest(folder, "whole", skip=lambda path: path == "scratch/")


def test_files_and_folders_are_on_disk_before_the_manifest(folder, monkeypatch):
    flushed, plain = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), plain(fd))[1])
    write_manifest(folder, "whole")
    names = [os.path.relpath(path, folder) for path in flushed]
    last = next(i for i, name in enumerate(names) if name.startswith(".sapo-"))
    assert {"a.json", "sub/b.bin", f"inner/{MANIFEST}", ".", "sub", "inner"} <= set(names[:last])
    assert names[last + 1 :] == ["."]


def test_what_killed_writers_have_left_is_removed_for_one_file_only(tmp_path):
    for name in ("a.json", "b.json"):
        atomic_write(tmp_path / name, name)
        place = files._temporary(str(tmp_path / name))
        (tmp_path / f"{place}0123abcd.tmp").write_text("half")
    files.remove_temporary(tmp_path / "a.json")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([f"{files._temporary('b.json')}0123abcd.tmp", "a.json", "b.json"])
    assert (tmp_path / "a.json").read_text() == "a.json"
