"""A process that has imported everything once and forks for each job, so that a point takes a second or two.

``python -m tests.endurance.server`` reads requests, a JSON object a line, and answers with one each; see `Server`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from tests.trainer.training_helpers import environment

ROOT = Path(__file__).resolve().parents[2]
_CLONE_NEWNS, _CLONE_NEWUSER, _MS_REMOUNT, _MS_REC_PRIVATE = 0x20000, 0x10000000, 32, 0x44000


class Server:
    """The other end: one job at a time, unless one was stopped."""

    def __enter__(self) -> Server:
        command = [sys.executable, "-m", "tests.endurance.server"]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
        )
        assert json.loads(self.child.stdout.readline()) == {"ready": True}
        return self

    def __exit__(self, *_) -> None:
        self.child.stdin.close()
        self.child.wait(60)

    def ask(self, **request: Any) -> dict[str, Any]:
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        return json.loads(self.child.stdout.readline())

    def run(self, job: str, here: Path, run: Path, stop: int | None = None, sent: int = signal.SIGKILL) -> dict:
        """rc (negative: the signal), err, events: how many file calls there were."""
        return self.ask(do="run", job=job, here=str(here), run=str(run), stop=stop, sent=int(sent))

    def go_on(self, pid: int) -> dict:
        return self.ask(do="continue", pid=pid)

    def full_disk(self, job: str, here: Path, run: Path, pages: int) -> dict:
        """A disk with so many free pages of 4 KiB: {"first", "second", "used", "result", "left after"} or {"fault"}."""
        return self.ask(do="disk", job=job, here=str(here), run=str(run), pages=pages)


# ---- in the process itself


def _fork(job: str, here: Path, run: Path, stop: int | None, sent: int) -> tuple[int, Any]:
    """(pid, temporary file with what it says) of a child that does a job."""
    said = tempfile.NamedTemporaryFile("w+", delete=False)  # noqa: SIM115
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(said.name + ".err", os.O_RDWR | os.O_CREAT), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            from sapo_peft.cli.main import main
            from tests.endurance.jobs import words_of
            from tests.endurance.wire import Wire

            os.chdir(here)
            wire, known = Wire(here, stop, sent), set(sys.modules)
            wire.install()
            code = main(words_of(job, here, run))
            wire.on = False
            new = sorted(set(sys.modules) - known)
            said.write(json.dumps({"events": wire.count, "modules": new}))
            said.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return pid, said


def _ended(pid: int, said: Any) -> dict[str, Any]:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return {"stopped": pid}
    found = {"rc": os.waitstatus_to_exitcode(status), "events": None}
    text = Path(said.name).read_text()
    found.update(json.loads(text) if text else {})
    _warm(found.pop("modules", []))
    place = Path(f"{said.name}.err")
    found["err"] = place.read_text(errors="replace")
    place.unlink()
    said.close()
    os.unlink(said.name)
    return found


def _warm(modules: list[str]) -> None:
    """Import what a job has imported, so that the next one need not, and keep all of it from the cycle collector."""
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    if modules:
        gc.freeze()


def _mount(here: Path, size: str, flags: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(here), b"tmpfs", ctypes.c_ulong(flags), size.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(here))


def _full_disk(request: dict[str, Any], reply: int) -> None:
    """In a child with mounts of its own: a job on a disk that is too small, and again on one that is not."""
    from tests.endurance.jobs import JOBS, left_over, prepare

    job, here, run = request["job"], Path(request["here"]), Path(request["run"])
    found: dict[str, Any] = {}
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNS) and libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER):
            raise OSError(ctypes.get_errno(), "no mount namespace")
        libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None)
        here.mkdir(exist_ok=True)
        _mount(here, "size=64m")
        prepare(here)
        used = os.statvfs(here)
        pages = used.f_blocks - used.f_bfree + request["pages"]
        _mount(here, f"size={pages * 4}k", _MS_REMOUNT)
        found["first"] = _ended(*_fork(job, here, run, None, signal.SIGKILL))
        _mount(here, "size=64m", _MS_REMOUNT)
        # What was done need not be done again, and an export may not.
        done = found["first"]["rc"] == 0
        found["second"] = found["first"] if done else _ended(*_fork(job, here, run, None, signal.SIGKILL))
        found["used"] = used.f_bfree - os.statvfs(here).f_bfree
        found["result"] = JOBS[job].result(here) if found["second"]["rc"] == 0 else None
        found["left after"] = left_over(here)
    except BaseException as error:
        found["fault"] = f"{type(error).__name__}: {error}"
    os.write(reply, json.dumps(found).encode())


def serve() -> None:
    """Import, say that it is ready, and answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    import torch

    torch.set_num_threads(1)
    # What the jobs import when they run.
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401

    import sapo_peft.paraphrase
    import sapo_peft.report
    import sapo_peft.sequence.runner
    import sapo_peft.tiny_random
    import sapo_peft.trainer.attach
    from tests.oracles import small_qwen3

    sapo_peft.tiny_random.tiny_model = lambda: small_qwen3(2816)
    stopped: dict[int, Any] = {}
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "continue":
            os.kill(request["pid"], signal.SIGCONT)
            found = _ended(request["pid"], stopped.pop(request["pid"]))
        elif request["do"] == "disk":
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    _full_disk(request, write)
                finally:
                    os._exit(0)
            os.close(write)
            with os.fdopen(read, "rb") as answer:
                found = json.loads(answer.read() or b'{"fault": "no answer"}')
            os.waitpid(pid, 0)
        else:
            here, run = Path(request["here"]), Path(request["run"])
            pid, said = _fork(request["job"], here, run, request["stop"], request["sent"])
            found = _ended(pid, said)
            if "stopped" in found:
                stopped[pid] = said
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    serve()
