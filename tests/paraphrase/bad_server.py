"""A chat-completions server on 127.0.0.1 that misbehaves on request: one step of a script per question.

A step is a function of the handler. The last step of a script repeats. Every question is recorded.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sapo_peft.data.prompt_pool import PromptPool
from sapo_peft.paraphrase import EndpointSource, gather

Step = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BadServer

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.question = json.loads(body)
        with self.server.lock:
            self.number = len(self.server.questions)
            self.server.questions.append(self.question)
            self.server.headers_seen.append({k.lower(): v for k, v in self.headers.items()})
            script = self.server.script
            step = script.pop(0) if len(script) > 1 else script[0]
        with suppress(BrokenPipeError, ConnectionResetError):
            step(self)
        if self.server.stopped.is_set():
            self.close_connection = True

    def log_message(self, *_):
        pass

    @property
    def asked(self) -> int:
        """How many paraphrases the question wants."""
        found = re.search(r"Write (\d+) different", self.question["messages"][-1]["content"])
        return int(found.group(1)) if found else 1

    def send(self, body: bytes | str, status: int = 200, kind: str = "application/json", **headers: str):
        body = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


class BadServer(ThreadingHTTPServer):
    """Runs until the `with` block ends; `script` may be changed at any time."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *script: Step):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.questions, self.headers_seen = list(script), [], []
        self.lock, self.stopped, self.sent = threading.Lock(), threading.Event(), 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass


def completion(text, finish: str | None = "stop", **more) -> str:
    """A chat completion with `text` as its content."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], **more})


def says(text, finish: str | None = "stop", **more) -> Step:
    return lambda handler: handler.send(completion(text, finish, **more))


def tagged(*texts: str) -> str:
    return "\n".join(f"<paraphrase>{text}</paraphrase>" for text in texts)


def fresh(make: Callable[[int, int], str] = lambda n, i: f"Is it positive or negative, kind {n}-{i}?") -> Step:
    """Good answers, never the same twice: as many as are asked for, `make(question number, index)` each."""
    return lambda handler: handler.send(completion(tagged(*(make(handler.number, i) for i in range(handler.asked)))))


def status(code: int, message: str = "no", error: dict | None = None, **headers: str) -> Step:
    body = json.dumps({"error": {"message": message, **(error or {})}})
    return lambda handler: handler.send(body, code, **headers)


def raw(body: bytes | str, kind: str = "application/json", code: int = 200, **headers: str) -> Step:
    return lambda handler: handler.send(body, code, kind, **headers)


def reset(handler: Handler) -> None:
    """Half a reply, then a TCP reset."""
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"id"')
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def silence(handler: Handler) -> None:
    """Never a byte."""
    handler.server.stopped.wait(60)


def trickle(handler: Handler) -> None:
    """One byte of the body now and then, without end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 90000\r\n\r\n")
    end = time.monotonic() + 60
    while not handler.server.stopped.wait(0.05) and time.monotonic() < end:
        handler.wfile.write(b" ")
        handler.wfile.flush()
    handler.close_connection = True


# ---- asking it: shared by the tests of the endpoint

POOL = PromptPool.build("t", "Is it positive or negative?", labels=["positive", "negative"])


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No proxy, and no setting of the client, from the machine that the tests run on."""
    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name.startswith("OPENAI"):
            monkeypatch.delenv(name)


def ask(*script, wanted=2, deadline=20.0, minimum=0, store=None, pool=POOL, **options):
    """(the pool, the server, the source, seconds) after one `gather` from a server with this script."""
    with BadServer(*script) as server:
        source = EndpointSource(server.url, "m", **{"backoff": 0.01, **options})
        started = time.monotonic()
        made = gather(pool, source, wanted, minimum, deadline, store)
        return made, server, source, time.monotonic() - started


def flood(handler: Handler) -> None:
    """A body of a gibibyte without a length, as fast as it is taken."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    for _ in range(2**14):
        handler.wfile.write(b" " * 65536)
        handler.server.sent += 65536
    handler.close_connection = True
