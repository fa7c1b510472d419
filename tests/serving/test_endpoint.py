"""`jaxspec regenerate --endpoint`: a real socket that fails in every way, and nothing lost and nothing twice."""

import collections
import importlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from quiet_handler import QuietHandler

from jaxspec.__main__ import main
from jaxspec.data.conversations import read_conversations
from jaxspec.data.messages import parse_conversation
from jaxspec.serving.endpoint import Endpoint, wire_messages

endpoint: Any = importlib.import_module("jaxspec.serving.endpoint")


class Server(ThreadingHTTPServer):
    """A server whose `answer` is called for every request, with the number of times it has come before."""

    daemon_threads = True

    def __init__(self, answer: Callable[["Handler", dict[str, Any], int], Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.seen: collections.Counter[str] = collections.Counter()
        self.bodies: list[dict[str, Any]] = []
        self.flying = self.most = 0
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has gone

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(QuietHandler):
    server: Server

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "the-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = json.dumps(body["messages"])
        server = self.server
        with server.lock:
            before = server.seen[key]
            server.seen[key] += 1
            server.bodies.append(body)
            server.flying += 1
            server.most = max(server.most, server.flying)
        try:
            server.answer(self, body, before)
        finally:
            with server.lock:
                server.flying -= 1

    def reply(self, value: Any, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(value).encode(), status, None, **headers)

    def send(self, data: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)


def said(text: str, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A response as vLLM writes it."""
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return {
        "choices": [choice | {"token_ids": [7, 8, 9]}],
        "prompt_token_ids": [1, 2],
        "usage": {"completion_tokens": 3},
    }


def echo(handler: Handler, body: dict[str, Any], before: int) -> None:
    handler.reply(said(f"answer to {body['messages'][-1]['content']}"))


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(answer: Callable[..., Any] = echo) -> Server:
        server = Server(answer)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are as asked, and else a moment."""
    monkeypatch.setattr(endpoint, "_LONGEST_WAIT", 0.2)


def questions(path: Path, count: int) -> Path:
    lines = [{"id": f"q{i}", "source": "s", "messages": [{"role": "user", "content": f"q{i}"}]} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(server: Server, prompts: Path, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    words = ["regenerate", "--endpoint", server.url, "--prompts", str(prompts), "--out", str(out), "--json", f"{out}.j"]
    code = main([*words, "--concurrency", "4", "--timeout", "1", *flags])
    return code, json.loads(Path(f"{out}.j").read_text())


def records(out: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def test_every_question_is_answered_once_with_its_tokens(serve: Callable[..., Server], tmp_path: Path):
    def answer(handler: Handler, body: dict[str, Any], before: int) -> None:
        time.sleep(0.05)  # so that requests meet
        echo(handler, body, before)

    server, out = serve(answer), tmp_path / "out.jsonl"
    code, result = run(server, questions(tmp_path / "q.jsonl", 30), out)
    assert code == 0 and set(server.seen.values()) == {1} and 1 < server.most <= 4
    found = records(out)
    assert {id: r["messages"][1]["content"] for id, r in found.items()} == {
        f"q{i}": f"answer to q{i}" for i in range(30)
    }
    assert found["q0"]["answers"] == [{"message": 1, "answer_ids": [7, 8, 9], "prompt_ids": [1, 2]}]
    assert found["q0"]["made_with"] == {"model": "the-model"} and found["q0"]["finish"] == "stop"
    assert server.bodies[0]["model"] == "the-model" and server.bodies[0]["return_token_ids"] is True
    assert (result["conversations"], result["failures"]) == (30, {})
    assert len(read_conversations(out)) == 30
    run(server, tmp_path / "q.jsonl", out)
    assert set(server.seen.values()) == {1}


def reset(handler: Handler, *_: Any) -> None:
    handler.connection.shutdown(2)
    handler.close_connection = True


FAULTS: dict[str, Callable[[Handler], Any]] = {
    "status 500": lambda h: h.reply({"error": "boom"}, 500),
    "status 503": lambda h: h.reply({}, 503, retry_after="0.05"),
    "status 429": lambda h: h.reply({}, 429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"),
    "reset": reset,
    "half body": lambda h: (h.send(b'{"choices": [', length=500), reset(h)),
    "not JSON": lambda h: h.send(b"<html>gateway</html>"),
    "no object": lambda h: h.reply([]),
    "slow": lambda h: (time.sleep(1.5), h.reply(said("late"))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_tried_again(serve: Callable[..., Server], tmp_path: Path, fault: str):
    def answer(handler: Handler, body: dict[str, Any], before: int) -> None:
        if before == 0 and body["messages"][0]["content"] in ("q1", "q4"):
            FAULTS[fault](handler)
        else:
            echo(handler, body, before)

    server, out = serve(answer), tmp_path / "out.jsonl"
    code, result = run(server, questions(tmp_path / "q.jsonl", 6), out)
    assert code == 0 and result["failures"] == {}
    assert {r["messages"][1]["content"] for r in records(out).values()} == {f"answer to q{i}" for i in range(6)}
    assert sorted(server.seen.values()) == [1, 1, 1, 1, 2, 2]


def test_what_stays_is_counted_by_kind_and_asked_again_by_the_next_run(
    serve: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    broken = True

    def answer(handler: Handler, body: dict[str, Any], before: int) -> None:
        text = body["messages"][0]["content"]
        if broken and text == "q0":
            handler.reply({"error": "down"}, 500)
        elif broken and text == "q1":
            handler.reply({"error": "seed is not known"}, 400)
        elif broken and text == "q2":
            handler.reply(said("", "content_filter"))
        elif text == "q3":
            handler.reply({"error": "This model's maximum context length is 8 tokens"}, 400)
        else:
            echo(handler, body, before)

    server, out = serve(answer), tmp_path / "out.jsonl"
    prompts = questions(tmp_path / "q.jsonl", 8)
    code, result = run(server, prompts, out, "--tries", "2")
    assert code == 1
    assert result["failures"] == {"status 500": 1, "status 400": 1, "finish content_filter": 1}
    assert result["unfit"] == 1 and sorted(records(out)) == ["q4", "q5", "q6", "q7"]
    assert "3 conversations have no answer yet" in capsys.readouterr().err
    broken = False
    code, result = run(server, prompts, out, "--tries", "2")
    assert code == 0 and sorted(records(out)) == ["q0", "q1", "q2", "q4", "q5", "q6", "q7"]
    assert max(server.seen.values()) == 3  # twice in the first run, once in the second


@pytest.mark.parametrize(("status", "sentence"), [(401, "check the key"), (404, "check the address or the model")])
def test_a_refusal_of_all_requests_ends_the_run_with_one_sentence(
    serve: Callable[..., Server], tmp_path: Path, status: int, sentence: str, capsys: pytest.CaptureFixture[str]
):
    server = serve(lambda handler, body, before: handler.reply({"error": "no"}, status))
    flags = ["--prompts", str(questions(tmp_path / "q.jsonl", 20)), "--out", str(tmp_path / "out.jsonl")]
    assert main(["regenerate", "--endpoint", server.url, "--concurrency", "2", *flags]) == 1
    shown = capsys.readouterr().err
    assert sentence in shown and "Traceback" not in shown
    assert sum(server.seen.values()) <= 4


def test_nobody_there_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--prompts", str(questions(tmp_path / "q.jsonl", 1)), "--out", str(tmp_path / "out.jsonl"), "--tries", "2"]
    assert main(["regenerate", "--endpoint", "http://127.0.0.1:9", *flags]) == 1
    assert "http://127.0.0.1:9/v1/models" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_servers_that_do_not_know_token_ids_are_asked_without(serve: Callable[..., Server], tmp_path: Path):
    def answer(handler: Handler, body: dict[str, Any], before: int) -> None:
        if "return_token_ids" in body:
            handler.reply({"error": "unknown field return_token_ids"}, 400)
        else:
            response = said("hm")
            del response["choices"][0]["token_ids"], response["prompt_token_ids"]
            handler.reply(response)

    out = tmp_path / "out.jsonl"
    code, result = run(serve(answer), questions(tmp_path / "q.jsonl", 5), out)
    assert code == 0 and result["tokens"] == 15
    assert all("answers" not in record for record in records(out).values())


CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def test_calls_get_their_recorded_results_and_thoughts_stay_with_their_query(
    serve: Callable[..., Server], tmp_path: Path
):
    """A call, its recorded result, an answer; then another turn, which is sent without the old thoughts."""

    def answer(handler: Handler, body: dict[str, Any], before: int) -> None:
        last = body["messages"][-1]
        if last["role"] == "user" and last["content"] == "weather?":
            handler.reply(said("", "tool_calls", reasoning="look it up", tool_calls=[CALL]))
        else:
            handler.reply(said(f"after {last['content']}", reasoning_content="hm"))

    record = {
        "id": "t",
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        "chat_template_kwargs": {"enable_thinking": True},
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "old"}]},
            {"role": "tool", "tool_call_id": "old", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
            {"role": "user", "content": "thanks"},
        ],
    }
    (tmp_path / "t.jsonl").write_text(json.dumps(record))
    server, out = serve(answer), tmp_path / "out.jsonl"
    assert run(server, tmp_path / "t.jsonl", out)[0] == 0
    (found,) = records(out).values()
    assert [m["role"] for m in found["messages"]] == ["user", "assistant", "tool", "assistant", "user", "assistant"]
    assert found["messages"][1]["reasoning_content"] == "look it up"
    assert found["messages"][2] == {"role": "tool", "content": "rain", "tool_call_id": "call-1"}
    assert found["messages"][5]["content"] == "after thanks"
    first, second, third = server.bodies
    assert first["tools"] == record["tools"] and first["chat_template_kwargs"] == {"enable_thinking": True}
    assert second["messages"][1]["reasoning_content"] == "look it up"
    assert second["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
    assert not any("reasoning_content" in m for m in third["messages"])
    assert parse_conversation(found, id="", source="").messages[1]["tool_calls"][0]["function"]["name"] == "weather"


def test_a_conversation_whose_calls_the_server_did_not_make_is_known_again(
    serve: Callable[..., Server], tmp_path: Path
):
    turns = [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    turns += [{"role": "tool", "content": "rain"}, {"role": "user", "content": "thanks"}]
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "t", "messages": turns}))
    server, out = serve(), tmp_path / "out.jsonl"
    for _ in range(2):
        assert run(server, tmp_path / "t.jsonl", out)[0] == 0
    assert sum(server.seen.values()) == 2  # its two turns, once


def test_a_state_that_a_kill_left_half_written_is_begun_anew(serve: Callable[..., Server], tmp_path: Path):
    (tmp_path / "out.jsonl.state").write_text('{"target": "ti')
    assert run(serve(), questions(tmp_path / "q.jsonl", 2), tmp_path / "out.jsonl")[0] == 0


def test_a_call_without_a_recorded_result_ends_its_conversation(serve: Callable[..., Server], tmp_path: Path):
    server = serve(lambda handler, body, before: handler.reply(said("", "tool_calls", tool_calls=[CALL])))
    out = tmp_path / "out.jsonl"
    code, result = run(server, questions(tmp_path / "q.jsonl", 2), out)
    assert code == 0 and result["unmatched_calls"] == 2
    assert {r["finish"] for r in records(out).values()} == {"calls"}


@pytest.mark.parametrize(
    "response",
    [
        {},
        {"choices": []},
        {"choices": [None]},
        {"choices": [{"message": None, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": "x"}}]},
    ],
)
def test_answers_that_are_none_are_failures_of_one_conversation(response: dict[str, Any]):
    with pytest.raises(endpoint.RequestFailed):
        endpoint.read_reply(response)


def test_figures_and_ids_that_cannot_be_are_not_used():
    reply = endpoint.read_reply(said("x") | {"usage": "x", "prompt_token_ids": [10**30]})
    assert (reply.tokens, reply.answer_ids, reply.prompt_ids) == (3, (7, 8, 9), None)


def test_addresses_are_completed_and_wrong_ones_refused():
    assert Endpoint("http://a:1").base == "http://a:1/v1" and Endpoint("https://a/x/v2/").base == "https://a/x/v2"
    wrong: list[dict[str, Any]] = [{"url": "a:1"}, {"url": "http://a", "tries": 0}, {"url": "http://a", "timeout": 0.0}]
    for fields in wrong:
        with pytest.raises(ValueError):
            Endpoint(**fields)
    assert wire_messages([{"role": "user", "content": "a"}]) == [{"role": "user", "content": "a"}]


def test_lines_of_a_stream_end_at_line_feeds_alone():
    text = 'data: {"content": "a\u2028b\u0085c"}'
    chunks = [part.encode() for part in (text + "\r\n\ndata: ", "[DONE]\n", "rest")]
    cut = chunks[0].index("\u2028".encode()) + 1  # within a character
    assert list(endpoint._lines([chunks[0][:cut], chunks[0][cut:], *chunks[1:]])) == [text, "", "data: [DONE]", "rest"]


def test_whoever_stops_asking_waits_for_nobody():
    begun, never = [], threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        return item if item != 1 else int(never.wait(60))

    made = endpoint.in_flight(work, range(9), 2)
    started = time.monotonic()
    assert next(made) == 0
    made.close()
    assert time.monotonic() - started < 10 and len(begun) <= 3
    assert sorted(endpoint.in_flight(lambda item: 2 * item, range(9), 4)) == [2 * item for item in range(9)]
    with pytest.raises(ZeroDivisionError):
        list(endpoint.in_flight(lambda item: 1 // item, [1, 0], 1))


@pytest.mark.parametrize("url", ["http://localhost:port/v1", "http://[::1:8000/v1"])
def test_an_address_that_is_none_is_a_sentence(url: str):
    with pytest.raises(ValueError, match="which is no address"):
        endpoint.Client(endpoint.Endpoint(url, "m"))
