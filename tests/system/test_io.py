"""Atomic writing under failures and kills, and the strict JSON reader on hostile files."""

import contextlib
import errno
import json
import os
import random
import stat
import subprocess
import sys

import pytest

import sapo_kernels.files as io
from sapo_kernels.files import DataError, atomic_write, parse_json, read_json, read_text, write_json


def names(folder):
    return sorted(os.listdir(folder))


def test_write_new_and_replace(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_write(path, "first \u00e9")
    assert path.read_bytes() == "first \u00e9".encode()
    for data in (b"second", b"", b"x" * (3 * 2**20 + 1)):
        atomic_write(str(path), data)
        assert path.read_bytes() == data
    monkeypatch.chdir(tmp_path)
    atomic_write("n" * 255, b"y")
    (tmp_path / "link").symlink_to("a.json")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.json", "link", "n" * 255]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_follows_umask_or_the_old_file(tmp_path, umask, mode):
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "old").chmod(0o640)
    old = os.umask(umask)
    try:
        for name in ("new", "old"):
            atomic_write(tmp_path / name, b"x")
    finally:
        os.umask(old)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "old")] == [mode, 0o640]


def test_what_is_no_regular_file_is_refused_without_blocking(tmp_path):
    """And no file descriptor is lost, nor at a text that is refused."""
    (tmp_path / "d").mkdir()
    (tmp_path / "bad.json").write_bytes(b"[")
    os.mkfifo(tmp_path / "f")
    before = len(os.listdir("/proc/self/fd"))
    for path, kind in ((tmp_path / "d", "a directory"), (tmp_path / "f", "a FIFO"), ("/dev/zero", "a device")):
        with pytest.raises(DataError, match=f"expected a path for a regular file, got {kind}"):
            atomic_write(path, b"x")
        with pytest.raises(DataError, match=f"expected a regular file, got {kind}"):
            read_json(path)
    with pytest.raises(DataError):
        read_json(tmp_path / "bad.json")
    for call in (read_json, lambda path: atomic_write(path, b"x")):
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "missing" / "a")
    assert names(tmp_path) == ["bad.json", "d", "f"] and len(os.listdir("/proc/self/fd")) == before


def test_order_of_calls_is_durable(tmp_path, monkeypatch):
    """fsync of the file, then the rename, then fsync of the directory."""
    calls, replace, write = [], os.replace, os.write
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(stat.S_ISDIR(os.fstat(fd).st_mode)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))  # short writes are completed
    atomic_write(tmp_path / "a", b"0123456789")
    assert calls == [False, "replace", True] and (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "chmod", "close", "second write"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_failing_call_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    path, name, count = tmp_path / "a", call.split()[-1], [0]
    path.write_bytes(b"old")
    real = getattr(os, name)

    def fail(*args, **kwargs):
        count[0] += 1
        if call == "second write" and count[0] < 3:
            return real(args[0], args[1][:3])
        if call == "close":
            real(*args)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(type(error)) as caught:
            atomic_write(path, b"0123456789")
    assert caught.value is error and path.read_bytes() == b"old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("code, raised", [(errno.EINVAL, False), (errno.EIO, True)])
def test_directory_that_cannot_be_flushed(tmp_path, monkeypatch, code, raised):
    real = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, "directory")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="directory") if raised else contextlib.nullcontext():
        atomic_write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and names(tmp_path) == ["a"]


KILLER = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("io_alone", sys.argv[1])
io = importlib.util.module_from_spec(spec); spec.loader.exec_module(io)
left = int(sys.argv[3])
real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "close")}
def guard(name):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*args, **kwargs)
    return call
for name in real:
    setattr(os, name, guard(name))
io.write_json(sys.argv[2], ["new"] * 1000)
"""


def test_kill_at_every_call_keeps_one_whole_version(tmp_path):
    """SIGKILL before the n-th file call, for every n: the file is the old one or the new one."""
    path = tmp_path / "a.json"
    seen = set()
    for point in range(20):
        write_json(path, "old")
        command = [sys.executable, "-c", KILLER, io.__file__, str(path), str(point)]
        done = subprocess.run(command, timeout=60)
        content = read_json(path)
        assert content in ("old", ["new"] * 1000)
        seen.add(str(content)[:3])
        if done.returncode == 0:
            break
        assert done.returncode < 0
    assert done.returncode == 0 and point >= 6 and len(seen) == 2


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), {"a": [float("-inf")]}, "\ud800", {1, 2}, {1: "a", "1": "b"}],
)
def test_write_json_refuses_what_cannot_be_read_back(tmp_path, value):
    write_json(tmp_path / "a.json", "old")
    cycle = []
    cycle.append(cycle)
    for refused in (value, cycle):
        with pytest.raises(DataError):
            write_json(tmp_path / "a.json", refused)
    assert read_json(tmp_path / "a.json") == "old" and names(tmp_path) == ["a.json"]


DEEP = "[" * 64 + "]" * 64


@pytest.mark.parametrize(("data", "expected"), [
    (b'\xef\xbb\xbf{"a":\r\n 1}\r\n', {"a": 1}),
    (b'"\\u00e9\\n\\ud83d\\ude00 {0.__class__}"', "\u00e9\n\U0001f600 {0.__class__}"),
    (DEEP.encode(), json.loads(DEEP)), (b'{"NaN": "Infinity"}', {"NaN": "Infinity"}),
    (b"[0, -0.0, 1e308, 5e-324, 123456789012345678901234567890, null, true]",
     [0, -0.0, 1e308, 5e-324, 123456789012345678901234567890, None, True]),
])  # fmt: skip
def test_good_json(tmp_path, data, expected):
    (tmp_path / "a.json").write_bytes(data)
    assert read_json(tmp_path / "a.json") == expected
    write_json(tmp_path / "a.json", expected)
    assert read_json(tmp_path / "a.json") == expected
    assert read_text(tmp_path / "a.json").isascii() == str(expected).isascii(), "text stays text"
    (tmp_path / "a.json").write_bytes(b"a\r\nb\n")
    assert read_text(tmp_path / "a.json") == "a\r\nb\n"


@pytest.mark.parametrize(("data", "expected"), [
    (b"", "got the end of the text"), (b'{"a": [1, 2', "not valid JSON"), (b'{"a": 1}{"a": 2}', "Extra data"),
    (b'{"a": [1, NaN]}', "line 1 column 11: expected a finite number, got 'NaN'"),
    (b'[0,\n {"x": 1e999}]', "line 2 column 8: expected a finite number, got '1e999'"),
    (b'{"a": 1,\n "b": "\\"}a", "a": 3}', "line 2 column 15: expected each key once, got 'a' again"),
    (b'{"b": [{"b": {"c": 1,\r\n"c": 1}}]}', "line 2 column 1: expected each key once, got 'c'"),
    (b"[" * 100_000, "levels of nesting"), (b"[" + b"9" * 5000 + b"]", "line 1 column 2: Exceeds the limit"),
    (b'["a\x00b"]', "got a NUL byte"),
    (b'{"a": "\\ud83d\\ude00",\n "b": "\\ud800"}', "line 2 column 7: expected text, got a lone surrogate"),
    (b'{"a":\n "caf\xe9"}', "line 2: expected UTF-8 text, got byte 0xe9 at offset 11"),
    ('["a"]'.encode("utf-16"), "got UTF-16"),
])  # fmt: skip
def test_bad_json(tmp_path, data, expected):
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_json(path)
    message = str(caught.value)
    assert expected in message and str(path) in message
    assert len(message) < 400 + len(str(path)) and message.isascii() and message.isprintable()


def test_size_bound_is_exact_and_messages_are_bounded(tmp_path):
    path = tmp_path / "a.json"
    key = "\x1b[2J\u202e" * 10_000
    path.write_text("[" + json.dumps({key: 1})[:-1] + "," + json.dumps(key) + ": 2}]", encoding="utf-8")
    with pytest.raises(DataError, match="each key once") as caught:
        read_json(path)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()
    path.write_bytes(b'"' + b"x" * 98 + b'"')
    assert len(read_json(path, max_bytes=100)) == 98
    with pytest.raises(DataError, match="expected at most 99 bytes"):
        read_json(path, max_bytes=99)


def test_mutated_json_raises_only_data_error():
    """Random edits of a valid document: parsed like `json` parses it, or `DataError`."""
    rng = random.Random(0)
    seed = '{"task": [{"a": "x\\u00e9\\\\", "b": [1, -2.5e3, null, true]}, {"a": "{}[]", "c": {}}], "n": 12}'
    pieces = [*'"\\{}[],: ', "1e999", "NaN", "\\ud800", "\\u0000", '"a":', "9" * 200]
    accepted = 0
    for _ in range(5000):
        text = seed
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(["", rng.choice(pieces)]) + text[at + rng.randint(0, 3) :]
        try:
            value = parse_json(text, "x")
        except DataError as error:
            assert len(str(error)) < 400
            continue
        accepted += 1
        assert value == json.loads(text)
    assert 0 < accepted < 5000
