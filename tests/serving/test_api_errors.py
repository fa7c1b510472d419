"""Refusals of the server: each with its status, type and field, before any work; and the door that keeps others out."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_toys import Running, chat, completion, running, serve

from jaxspec.serving import http_guard
from jaxspec.serving.api_errors import ApiError
from jaxspec.serving.api_request import ServedLimits, read_completion
from jaxspec.serving.http_app import Service

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = "3 and 4 make 7, they say " * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    with running(folder) as one:
        yield one


BODIES = {
    "no JSON": b"{'model': 'target'}",
    "nothing": b"",
    "not UTF-8": b'{"model": "\xff"}',
    "garbage": bytes(range(256)) * 8,
    "a list": b"[1]",
    "NaN": b'{"model": "target", "prompt": "a", "temperature": NaN}',
    "infinity": b'{"model": "target", "prompt": "a", "temperature": -Infinity}',
    "a number of 9,999 digits": b'{"model": "target", "prompt": "a", "seed": ' + b"9" * 9999 + b"}",
    "deep": b'{"model": ' + b"[" * 100 + b"]" * 100 + b"}",
    "deeper than Python": b'{"model": ' + b"[" * 200_000,
    "strings without an end": b'"\\' * 200_000,
    "a key twice": b'{"model": "target", "prompt": "a", "seed": 1, "seed": 2}',
    "cut short": b'{"model": "target", "prompt": "a"',
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_body_that_is_no_sound_json_object_is_refused(served: Running, path: str, name: str):
    status, found, _ = served.ask(path, BODIES[name])
    assert (status, found["error"]["type"]) == (400, "invalid_request_error") and found["error"]["message"]


FIELDS: list[tuple[str, dict[str, Any], str | None]] = [
    *((CHAT, chat(**{name: value}), name) for name, value in [
        ("temperature", 2.1), ("temperature", -0.1), ("temperature", "0"), ("temperature", True),
        ("temperature", 10**400), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.0), ("max_tokens", 97),
        ("max_tokens", 10**30), ("max_tokens", "9"), ("n", 0), ("n", 5), ("n", True), ("seed", 1.5), ("seed", 2**63),
        ("seed", "1"), ("stop", 5), ("stop", ["a"] * 5), ("stop", [""]), ("stop", "a" * 257), ("stop", [None]),
        ("stop", "\ud800"), ("stream", 1), ("stream", "true"), ("stream_options", {"include_usage": True}),
        ("top_p", 0.5), ("top_p", True), ("top_k", 5), ("presence_penalty", 1), ("frequency_penalty", -0.5),
        ("repetition_penalty", 1.1), ("logit_bias", {"5": 1}), ("logprobs", True), ("top_logprobs", 3),
        ("tools", [{"type": "function"}]), ("functions", [{}]), ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}), ("modalities", ["audio"]), ("audio", {"voice": "x"}),
        ("reasoning_effort", "high"), ("chat_template", "{{ 1 }}"), ("messages", None), ("messages", []),
        ("messages", "hello"), ("model", None), ("model", 7), ("jaxspec", "yes"), ("jaxspec", {"what": 1}),
        ("return_token_ids", 1), ("chat_template_kwargs", [1]),
    ]),
    (CHAT, chat(messages=["a"]), "messages[0]"),
    (CHAT, chat(messages=[{"role": "tool", "content": "a"}]), "messages[0].role"),
    (CHAT, chat(messages=[{"role": ["user"], "content": "a"}]), "messages[0].role"),
    (CHAT, chat(messages=[{"role": "user"}]), "messages[0].content"),
    (CHAT, chat(messages=[{"role": "user", "content": []}]), "messages[0].content"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0]"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text", "text": 1}]}]), "messages[0].content[0]"),
    (CHAT, chat(messages=[{"role": "user", "content": "\udfff"}]), "messages[0].content"),
    (CHAT, chat(messages=[{"role": "assistant", "content": "a", "tool_calls": [{}]}]), "messages[0].tool_calls"),
    (CHAT, chat(messages=[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]), "messages"),
    (CHAT, chat(chat_template_kwargs={"x": 1}), "messages"),
    (CHAT, chat(max_completion_tokens=3), "max_tokens"),
    (TEXT, completion(None), "prompt"),
    (TEXT, completion([]), "prompt"),
    (TEXT, completion(""), "prompt"),
    (TEXT, completion({"a": 1}), "prompt"),
    (TEXT, completion([1, "a"]), "prompt"),
    (TEXT, completion([[]]), "prompt"),
    (TEXT, completion([1, 300]), "prompt"),
    (TEXT, completion([-1]), "prompt"),
    (TEXT, completion([2**80]), "prompt"),
    (TEXT, completion([True]), "prompt"),
    (TEXT, completion(["a"] * 17), "prompt"),
    (TEXT, completion("\ud83e"), "prompt"),
    (TEXT, completion(echo=True), "echo"),
    (TEXT, completion(suffix="x"), "suffix"),
    (TEXT, completion(best_of=2), "best_of"),
    (TEXT, completion(logprobs=0), "logprobs"),
    (CHAT, chat(LONG), None),
    (TEXT, completion(LONG), None),
    (TEXT, completion([5] * 97), None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), FIELDS, ids=lambda x: str(x)[:60] if isinstance(x, str) else "")
def test_a_field_that_cannot_be_used_is_named(served: Running, path: str, body: dict[str, Any], param: str | None):
    if path == TEXT and body["prompt"] == "":
        body = body | {"prompt": []}
    status, found, _ = served.ask(path, body)
    assert (status, found["error"]["param"]) == (400, param), found
    assert found["error"]["message"] and found["error"]["type"] == "invalid_request_error"
    assert (found["error"]["code"] == "context_length_exceeded") == (param is None)


NEUTRAL = {
    "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": False, "tools": [],
    "tool_choice": "none", "response_format": {"type": "text"}, "stop": None, "n": None, "stream": False, "user": "me",
    "metadata": {"a": 1}, "no_one_knows_this": [1], "temperature": 0, "seed": -1, "modalities": ["text"], "top_k": -1,
}  # fmt: skip


def test_fields_that_change_nothing_and_unknown_ones_are_taken(served: Running):
    plain = served.ask(CHAT, chat(temperature=0))[1]["choices"][0]
    status, found, _ = served.ask(CHAT, chat(**NEUTRAL))
    assert status == 200 and found["choices"][0]["message"] == plain["message"]


def test_models_addresses_and_methods_that_are_not_there(served: Running):
    for status, path, method, body in (
        (404, CHAT, "POST", chat(model="other")),
        (404, TEXT, "POST", completion(model="../etc")),
        (404, "/v1/embeddings", "POST", {}),
        (404, "/v1/models/other", "GET", {}),
        (404, "/demo.py", "GET", {}),
        (404, "/..%2f..%2fetc/passwd", "GET", {}),
        (405, CHAT, "GET", {}),
        (405, CHAT, "OPTIONS", {}),
        (405, "/v1/models", "POST", {}),
    ):
        found = served.ask(path, body, method)
        assert found[0] == status and found[1]["error"]["message"], (path, found)
        assert (found[1]["error"]["code"] == "model_not_found") == (status == 404 and "model" in str(found[1]))
        assert "access-control-allow-origin" not in found[2]
    assert served.ask("/v1/models/target", b"", "GET")[1]["id"] == "target"


def test_bodies_of_other_types_and_too_long_ones_are_refused(served: Running):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/json; charset=latin-1"):
        assert served.ask(CHAT, chat(), content_type=kind)[0] == 415
    assert served.ask(CHAT, chat(), content_type="application/json; charset=UTF-8")[0] == 200
    assert served.ask(CHAT, chat(), content_encoding="gzip")[0] == 415
    for more in (1, http_guard.MOST_BYTES, 5 * http_guard.MOST_BYTES):
        assert served.ask(CHAT, b" " * (http_guard.MOST_BYTES + more))[0] == 413
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with served.send(head + b"content-length: 99999999999\r\n\r\n") as client:
        assert client.recv(64).startswith(b"HTTP/1.1 413")
    with served.send(head + b"transfer-encoding: chunked\r\n\r\n") as client:
        client.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n1\r\n \r\n0\r\n\r\n")
        assert client.recv(64).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_arrive_is_given_up(served: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_guard, "BODY_SECONDS", 0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with served.send(head + b'content-length: 50\r\n\r\n{"model"') as client:
        answer = client.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()
    with served.send(head + b'content-length: 50\r\n\r\n{"model"'):
        pass  # gone in the middle of its body
    with served.send(b"\x16\x03\x01" + bytes(range(256)) + b"\r\n\r\n") as client:
        assert client.recv(64).startswith(b"HTTP/1.1 400")
    assert served.ask(CHAT, chat())[0] == 200


def test_other_hosts_and_pages_are_kept_out(served: Running):
    own = f"127.0.0.1:{served.port}"
    for headers, status in (
        ({"host": own}, 200),
        ({"host": f"localhost:{served.port}"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": own, "origin": f"http://{own}"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:80"}, 403),
        ({"host": "10.0.0.1"}, 403),
        ({"host": own, "origin": "https://evil.example"}, 403),
        ({"host": own, "origin": "null"}, 403),
        ({"host": own, "origin": "http://localhost:1"}, 403),
    ):
        for path, method in (("/v1/models", "GET"), ("/", "GET")):
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            response.read()
            connection.close()
            assert response.status == status, headers
            assert response.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in response.headers["content-security-policy"]


def test_a_server_with_a_key_asks_for_it_but_shows_its_page(folder: Path):
    with running(folder, api_key="sesame", batch=4) as keyed:
        for authorization in ("", "Bearer other", "Bearer", "Basic sesame", "Bearer sesam", "Bearer s\xe9same"):
            status, found, headers = keyed.ask(CHAT, chat(), authorization=authorization)
            assert (status, found["error"]["code"]) == (401, "invalid_api_key") and headers["www-authenticate"]
        assert keyed.ask("/tokenize", chat(), authorization="")[0] == 401
        assert keyed.ask(CHAT, chat(), authorization="Bearer sesame")[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", keyed.port, timeout=60)
        connection.request("GET", "/")
        assert b'type="password"' in connection.getresponse().read()
        connection.close()


def test_a_full_queue_asks_to_come_again(served: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served.scheduler, "most_waiting", 1)
    monkeypatch.setattr(served.scheduler.lanes["speculative"].slots, "free", [])
    status, found, headers = served.ask(CHAT, chat(n=3))
    assert (status, headers["retry-after"], found["error"]["type"]) == (429, "2", "rate_limit_error")
    monkeypatch.undo()
    assert served.ask(CHAT, chat(n=3))[0] == 200


def test_a_fault_of_the_server_shows_no_traceback(served: Running, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(Service, "encode", fail)
    status, found, _ = served.ask(CHAT, chat())
    assert status == 500 and found["error"]["type"] == "server_error" and "secret" not in json.dumps(found)


def test_more_answers_than_may_ever_wait_are_refused_for_good():
    limits = ServedLimits("target", 96, 96, 256, 300, most_answers=3)
    assert read_completion(completion(["a", "b", "c"]), limits).choices == 1
    with pytest.raises(ApiError, match="lets 3 wait") as refused:
        read_completion(completion(["a", "b"], n=2), limits)
    assert refused.value.status == 400 and refused.value.param == "n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--port", "70000"], "--port"),
        (["--batch", "0"], "--batch"),
        (["--tree", "chain:3"], "--drafter"),
        (["--api-key", "a\nb"], "ASCII"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_a_sentence(flags: list[str], said: str, capsys: pytest.CaptureFixture):
    with pytest.raises((SystemExit, ValueError)) as refused:
        serve.main(flags)
    assert said in capsys.readouterr().err + str(refused.value)


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(served: Running):
    with pytest.raises(ValueError, match=f"port {served.port} .*: give another --port"):
        serve.main(["--target", "no such folder", "--port", str(served.port)])


def test_without_its_packages_the_verb_says_how_to_install_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jaxspec-decoding\[serve\]'"):
        serve.main([])


def test_the_key_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch):
    assert serve.Args().key is None
    monkeypatch.setenv("JAXSPEC_API_KEY", "sesame")
    assert serve.Args().key == "sesame" and serve.Args(api_key="other").key == "other"


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize"])
def test_a_client_that_leaves_while_it_posts_is_no_failure(served: Running, path: str):
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"9")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    scope |= {"raw_path": path.encode(), "root_path": "", "scheme": "http", "http_version": "1.1"}
    app: Any = served.server.config.app
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400
