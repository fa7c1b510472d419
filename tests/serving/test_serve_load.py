"""Many clients at once, some slow, some rude: no answer lost or mixed, every row freed, bounded memory, a clean end."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_toys import LIMITS, Running, chat, completion, events, running
from serve_toys import toy_models
from test_openai_clients import read_all

from jaxspec.serving import http_answers
from jaxspec.serving.http_answers import EventStream

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPTS = [f"{i} and {i + 3} make" for i in range(12)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("models")) as one:
        yield one


def slowed(served: Running, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.05) -> None:
    """Makes rounds take time, so that a client can act between them."""
    slots = served.scheduler.lanes["speculative"].slots
    step = slots.step
    monkeypatch.setattr(slots, "step", lambda: (time.sleep(seconds), step())[1])


def asked(number: int) -> dict[str, Any]:
    """One of the requests that clients send, whose text is known."""
    heat = (0.0, 0.7, 1.0)[number % 3]
    return chat(PROMPTS[number], seed=number, temperature=heat, max_tokens=40 + number)


def text_of(chunks: list[Any]) -> str:
    assert chunks[-1] == "[DONE]"
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]][-1] in ("stop", "length")
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])


class Clients:
    """Clients of all manners, each in a thread, until the time is over."""

    def __init__(self, served: Running, expected: list[str]) -> None:
        self.served, self.expected = served, expected
        self.done: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.manners: tuple[Callable[[random.Random, int], None], ...] = (
            self.whole, self.stream, self.slow, self.leave, self.vanish, self.half, self.garbage,
        )  # fmt: skip

    def run(self, count: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        threads = [threading.Thread(target=self._one, args=(i, deadline)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 120)
        assert not any(thread.is_alive() for thread in threads)

    def _one(self, index: int, deadline: float) -> None:
        draw = random.Random(index)
        while time.monotonic() < deadline:
            manner, number = draw.choice(self.manners), draw.randrange(len(PROMPTS))
            try:
                manner(draw, number)
                self.done[manner.__name__] += 1
            except Exception as error:
                self.faults.append(f"{manner.__name__} {number}: {type(error).__name__} {error}")

    def whole(self, draw: random.Random, number: int) -> None:
        status, found, _ = self.served.ask(CHAT, asked(number))
        assert status == 200 and found["choices"][0]["message"]["content"] == self.expected[number]

    def stream(self, draw: random.Random, number: int) -> None:
        with self.served.send(self.served.post(CHAT, asked(number) | {"stream": True})) as client:
            assert text_of(events(read_all(client))) == self.expected[number]

    def slow(self, draw: random.Random, number: int) -> None:
        """Reads little at a time, with pauses, through a small window."""
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.settimeout(60)
            client.connect(("127.0.0.1", self.served.port))
            client.sendall(self.served.post(CHAT, asked(number) | {"stream": True, "jaxspec": {"tree": True}}))

            class Slowly:
                def recv(self, _: int) -> bytes:
                    time.sleep(0.01 * draw.random())
                    return client.recv(1000)

            assert text_of(events(read_all(Slowly()))) == self.expected[number]

    def leave(self, draw: random.Random, number: int) -> None:
        """Leaves in the middle of the answer."""
        with self.served.send(self.served.post(CHAT, asked(number) | {"stream": True, "n": 2})) as client:
            client.recv(draw.randrange(1, 2000))

    def vanish(self, draw: random.Random, number: int) -> None:
        """Leaves with a reset before there is an answer."""
        with self.served.send(self.served.post(CHAT, asked(number))) as client:
            time.sleep(0.05 * draw.random())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def half(self, draw: random.Random, number: int) -> None:
        data = self.served.post(CHAT, asked(number))
        with self.served.send(data[: draw.randrange(1, len(data))]):
            time.sleep(0.05 * draw.random())

    def garbage(self, draw: random.Random, number: int) -> None:
        with self.served.send(draw.randbytes(draw.randrange(1, 500)) + b"\r\n\r\n") as client:
            assert client.recv(20).startswith(b"HTTP/1.1 4")


def resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(served: Running, count: int, seconds: float) -> None:
    """Lets clients of all manners at the server, and checks all that must hold."""
    expected = [served.ask(CHAT, asked(i))[1]["choices"][0]["message"]["content"] for i in range(len(PROMPTS))]
    assert len(set(expected)) == len(PROMPTS)
    Clients(served, expected).run(count, min(2.0, seconds))
    served.until_idle()
    before, tally = resident(), dataclasses.replace(served.scheduler.tally)
    clients = Clients(served, expected)
    clients.run(count, seconds)
    served.until_idle()
    assert not clients.faults, clients.faults[:3]
    assert all(clients.done[manner.__name__] for manner in clients.manners), clients.done
    told = sum(clients.done[name] for name in ("whole", "stream", "slow"))
    after = served.scheduler.tally
    assert (
        after.answered - tally.answered >= told and after.cancelled > tally.cancelled and after.failed == tally.failed
    )
    assert resident() - before < 150 * 2**20
    assert not served.server.server_state.tasks
    assert served.ask(CHAT, asked(3))[1]["choices"][0]["message"]["content"] == expected[3]


def test_a_dozen_clients_get_their_own_answers_whatever_the_others_do(served: Running):
    load(served, 12, 6.0)


@pytest.mark.slow
def test_fifty_clients_for_a_minute(served: Running):
    load(served, 50, 60.0)


def test_a_client_that_leaves_frees_its_rows_within_a_round(served: Running, monkeypatch: pytest.MonkeyPatch):
    slowed(served, monkeypatch)
    tally = served.scheduler.tally
    for stream in (True, False):
        before, rounds = tally.cancelled, tally.rounds
        with served.send(served.post(TEXT, completion("1 and", n=4, max_tokens=96, seed=5, stream=stream))) as client:
            if stream:
                assert client.recv(100).startswith(b"HTTP/1.1 200")
            while tally.rounds < rounds + 8:
                time.sleep(0.01)
        served.until_idle(5)
        assert before < tally.cancelled <= before + 4


def test_answers_come_while_they_are_written(served: Running, monkeypatch: pytest.MonkeyPatch):
    slowed(served, monkeypatch)
    with served.send(served.post(CHAT, asked(9) | {"stream": True})) as client:
        begun, marks = time.monotonic(), []
        data = b""
        while b"[DONE]" not in data:
            data += client.recv(1 << 16)
            marks.append(time.monotonic() - begun)
    assert marks[-1] > 2 * marks[1] and len(marks) >= 5


class Stuck:
    """A client's socket that takes the head of a response and then nothing."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive(self) -> Any:
        await asyncio.Event().wait()


def test_a_client_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_answers, "DRAIN_SECONDS", 0.1)
    client, given_up = Stuck(), threading.Event()

    async def lines() -> AsyncIterator[bytes]:
        while True:
            yield b"data: {}\n\n"

    stream = EventStream(lines(), given_up.set)
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, client.receive, client.send), 10))
    assert given_up.is_set() and [m["type"] for m in client.sent] == ["http.response.start", "http.response.body"]


def test_a_server_that_stops_ends_every_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with running(tmp_path) as stopping:
        slowed(stopping, monkeypatch, 0.2)
        bodies = [chat(PROMPTS[i], max_tokens=96, seed=i, stream=True) for i in range(3)]
        clients = [stopping.send(stopping.post(CHAT, body)) for body in bodies]
        for client in clients:
            assert client.recv(1).startswith(b"H")
        begun = time.monotonic()
        stopping.server.should_exit = True
        ends = [events(b"".join(parts_of(client)))[-1] for client in clients]
        assert time.monotonic() - begun < 5
        assert all(end == "[DONE]" or end["error"]["type"] == "server_error" for end in ends)
        assert any(end != "[DONE]" for end in ends)
        stopping.thread.join(5)
        assert not stopping.thread.is_alive() and not stopping.scheduler.held


def parts_of(client: socket.socket) -> Iterator[bytes]:
    """The chunks of a body, of a response whose first byte has been read."""
    with client:
        data = b"".join(iter(lambda: client.recv(1 << 16), b""))
    rest = data.partition(b"\r\n\r\n")[2]
    assert rest.endswith(b"0\r\n\r\n"), "the stream has no end"
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        yield rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]


def test_the_program_ends_cleanly_on_a_signal(tmp_path: Path):
    toy_models(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = {name.replace("_", "-"): value for name, value in LIMITS.items()}
    flags |= {
        "target": tmp_path / "target",
        "drafter": tmp_path / "drafter",
        "port": port,
        "json": tmp_path / "out.json",
    }
    command = [sys.executable, "-m", "jaxspec", "serve", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                assert time.monotonic() < deadline and process.poll() is None
                try:
                    client = socket.create_connection(("127.0.0.1", port), timeout=60)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.2)
            body = json.dumps(chat(seed=77, max_tokens=20, stream=True)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            with client:
                assert text_of(events(read_all(client)))
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=20)
            assert process.returncode == 0 and time.monotonic() - begun < 20  # of a busy machine
        finally:
            process.kill()
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["command"] == "serve" and told["answered"] == 1 and told["tokens"] <= 20 and told["failed"] == 0
    assert "seed 77" in said and "3 and 4" not in said and "Traceback" not in said
