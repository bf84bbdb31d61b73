"""Atomic writing under failures and kills, and the strict JSON reader on hostile files."""

import contextlib
import errno
import json
import os
import random
import stat
import subprocess
import sys
import time

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


def test_write_refuses_directory_and_fifo(tmp_path):
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "f")
    for name in ("d", "f"):
        with pytest.raises(DataError, match="expected a path for a regular file"):
            atomic_write(tmp_path / name, b"x")
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "missing" / "a", b"x")
    assert names(tmp_path) == ["d", "f"]


def test_order_of_calls_is_durable(tmp_path, monkeypatch):
    """fsync of the file, then the rename, then fsync of the directory."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(fd):
        calls.append("fsync dir" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        fsync(fd)

    def spy_replace(source, target):
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    atomic_write(tmp_path / "a", b"x")
    assert calls == ["fsync file", "replace", "fsync dir"]


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


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    atomic_write(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


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


def test_write_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None, True, "\u00e9\u4f60 {0} \\u0041"], "b": {"c": 1e-300}, "d": 0.1 + 0.2}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "\u4f60".encode() in (tmp_path / "a.json").read_bytes()


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


GOOD = {
    "byte-order mark": (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
    "crlf": (b'{"a":\r\n 1}\r\n', {"a": 1}),
    "escapes": (b'"\\u00e9\\n\\ud83d\\ude00"', "\u00e9\n\U0001f600"),
    "brackets in strings": (b'["' + b"[{" * 500 + b'\\"]"]', ["[{" * 500 + '"]']),
    "deep": (("[" * 64 + "]" * 64).encode(), json.loads("[" * 64 + "]" * 64)),
    "NaN as text": (b'{"NaN": "Infinity"}', {"NaN": "Infinity"}),
    "numbers": (b"[0, -0.0, 1e308, 5e-324, 123456789012345678901234567890]",
                [0, -0.0, 1e308, 5e-324, 123456789012345678901234567890]),
    "format field": (b'"{0.__class__} {0:>100000000}"', "{0.__class__} {0:>100000000}"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_json(tmp_path, name):
    (tmp_path / "a.json").write_bytes(GOOD[name][0])
    assert read_json(tmp_path / "a.json") == GOOD[name][1]


BAD = {
    "empty": (b"", "got the end of the text"),
    "NaN": (b'{"a": [1, NaN]}', "line 1 column 11: expected a finite number, got 'NaN'"),
    "1e999": (b'[0,\n {"x": 1e999}]', "line 2 column 8: expected a finite number, got '1e999'"),
    "duplicate key": (b'{"a": 1,\n "b": "\\"}a", "a": 3}', "line 2 column 15: expected each key once, got 'a' again"),
    "duplicate key, inner": (
        b'{"b": [{"b": {"c": 1,\r\n"c": 1}}]}',
        "line 2 column 1: expected each key once, got 'c'",
    ),
    "half a pair": (
        b'{"a": "\\ud83d\\ude00",\n "b": "\\ud800"}',
        "line 2 column 7: expected text, got a lone surrogate",
    ),
    "depth 100,000, open": (b"[" * 100_000, "levels of nesting"),
    "5,000 digits": (b"[" + b"9" * 5000 + b"]", "line 1 column 2: Exceeds the limit (4300 digits)"),
    "raw NUL": (b'["a\x00b"]', "NUL"),
    "Latin-1": (b'{"a":\n "caf\xe9"}', "line 2: expected UTF-8 text, got byte 0xe9 at offset 11"),
    "overlong UTF-8": (b'"\xc0\xaf"', "expected UTF-8"),
    "cut character": (b'"\xe4\xbd', "expected UTF-8"),
    "UTF-16 LE, mark": ('["a"]'.encode("utf-16"), "got UTF-16"),
    "UTF-16 BE": ('["a"]'.encode("utf-16-be"), "got a NUL byte"),
    "gzip": (b"\x1f\x8b\x08\x00abc", "got a NUL byte"),
    "truncated": (b'{"a": [1, 2', "not valid JSON"),
    "truncated string": (b'{"a": "b', "Unterminated string"),
    "concatenated": (b'{"a": 1}{"a": 2}', "Extra data"),
    "trailing comma": (b"[1, 2,]", "not valid JSON"),
    "HTML": (b"<!DOCTYPE html><html>", "not valid JSON"),
    "pickle": (b"\x80\x04K\x01.", "expected UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_json(tmp_path, name):
    path = tmp_path / "bad.json"
    path.write_bytes(BAD[name][0])
    with pytest.raises(DataError) as caught:
        read_json(path)
    message = str(caught.value)
    assert BAD[name][1] in message and str(path) in message
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


def test_sparse_gigabyte_is_refused_quickly(tmp_path):
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.truncate(2**30)
    started = time.perf_counter()
    with pytest.raises(DataError, match="larger file"):
        read_json(path, max_bytes=2**20)
    assert time.perf_counter() - started < 5


def test_directory_fifo_and_device_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "f.json")
    for path, what in ((tmp_path, "a directory"), (tmp_path / "f.json", "a FIFO"), ("/dev/zero", "a device")):
        with pytest.raises(DataError, match=f"expected a regular file, got {what}"):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_no_file_descriptor_is_lost(tmp_path):
    (tmp_path / "bad.json").write_bytes(b"[")
    os.mkfifo(tmp_path / "f.json")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        write_json(tmp_path / "a.json", 1)
        for name in ("bad.json", "f.json", "."):
            with pytest.raises(DataError):
                read_json(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("unit", ['"', '"\\"', '\\"', '"a":', "[", '{"a":"', '"\\', ",", "1,", '["",'])
def test_time_is_linear_on_repeated_fragments(unit):
    """A quadratic scan would take minutes on these."""
    text = unit * (400_000 // len(unit))
    started = time.perf_counter()
    with pytest.raises(DataError):
        parse_json(text, "x")
    assert time.perf_counter() - started < 10


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


def test_read_text_keeps_line_ends(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    assert read_text(tmp_path / "a") == "a\r\nb\n"
