"""A server of tiny random models on a real socket, and requests to it without a client library."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve_toys import toy_models

from jaxspec.serving.http_server import DemoServer
from jaxspec.serving.loading import Models
from jaxspec.serving.scheduler import Scheduler

serve: Any = importlib.import_module("jaxspec.infer.serve")
LIMITS: dict[str, Any] = {"longest": 96, "max_new_tokens": 96, "batch": 4, "template": "none", "port": 0}


class Running:
    """A server that listens."""

    def __init__(self, server: DemoServer, scheduler: Scheduler, models: Models, thread: threading.Thread) -> None:
        self.server, self.scheduler, self.models, self.thread = server, scheduler, models, thread

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any, method: str = "POST", **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers of a response; `body` is sent as it is where it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), sent)
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text else None, dict(response.headers)

    def send(self, data: bytes) -> socket.socket:
        """A connection over which some bytes have gone."""
        found = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        found.sendall(data)
        return found

    def post(self, path: str, body: Any) -> bytes:
        """A request as bytes."""
        text = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(text)}\r\n\r\n".encode() + text

    def until_idle(self, seconds: float = 60.0) -> None:
        """Waits until every row is free and nothing waits."""
        deadline = time.monotonic() + seconds
        lanes = self.scheduler.lanes
        while self.scheduler.held or self.scheduler.waiting:
            assert time.monotonic() < deadline, "rows are still taken"
            time.sleep(0.01)
        assert sorted(lanes["speculative"].slots.free) == list(range(LIMITS["batch"]))


def chat(text: str = "3 and 4 make", **fields: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"model": "target", "messages": [{"role": "user", "content": text}], "max_tokens": 24, **fields}


def completion(prompt: Any = "3 and 4 make", **fields: Any) -> dict[str, Any]:
    """The body of a completion."""
    return {"model": "target", "prompt": prompt, **fields}


@contextlib.contextmanager
def running(folder: Path, **flags: Any) -> Iterator[Running]:
    """Runs a server in a thread of this process, and checks that it ends."""
    models = toy_models(folder)
    given = LIMITS | {"target": str(folder / "target"), "drafter": str(folder / "drafter"), "tree": "dynamic:8x3x3"}
    server, scheduler = serve.make_server(serve.Args(**(given | flags)))
    scheduler.start()
    bound = serve.bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield Running(server, scheduler, models, thread)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive() and scheduler.join(5)


def events(data: bytes) -> list[Any]:
    """The values of server-sent events; the last is the text `[DONE]`."""
    lines = data.decode("ascii").split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]
