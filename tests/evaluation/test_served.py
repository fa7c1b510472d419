"""`jaxspec evaluate --endpoint`: streams, counters before and after each task, faults of servers."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jaxspec.__main__ import main
from jaxspec.serving.served_acceptance import Counters, of_answer, parse_counters
from jaxspec.serving.streaming_client import _Heard

PAGE = """# HELP vllm:spec_decode_num_drafts_total Number of drafts.
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {drafts}.0
vllm:spec_decode_num_drafts_total{{engine="1",model_name="m"}} 0
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {drafted}
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="0"}} {first}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="1"}} {second}
vllm:request_success_total{{finished_reason="stop"}} 3.0
"""


class Server(ThreadingHTTPServer):
    """A server that answers with the number of messages, two tokens a chunk, and counts drafts of two tokens."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.shows_counters, self.asked = "", True, []
        self.drafts = self.accepted = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        s = self.server
        found = {
            "/v1/models": json.dumps({"data": [{"id": "m"}]}),
            "/version": json.dumps({"version": "0.99"}),
        }
        if s.shows_counters:
            found["/metrics"] = PAGE.format(
                drafts=s.drafts, drafted=2 * s.drafts, accepted=s.accepted, first=s.accepted, second=0
            )
        text = found.get(self.path)
        self._send(404 if text is None else 200, text or "", "text/plain")

    def do_POST(self) -> None:
        s, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        s.asked.append(body)
        if s.fault == "status":
            return self._send(400, json.dumps({"error": {"message": "no"}}), "application/json")
        s.drafts, s.accepted = s.drafts + 3, s.accepted + 2
        choices: list[Any] = [{"delta": {"role": "assistant", "content": ""}}]
        choices += [{"delta": {"content": f"{len(body['messages'])} "}, "token_ids": [5, 6]} for _ in range(2)]
        chunks: list[dict[str, Any]] = [{"choices": [c]} for c in choices]
        if s.fault == "error":
            chunks.append({"error": {"message": "out of memory"}})
        elif s.fault != "cut":
            chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
            spec = {"num_spec_steps": 3, "num_accepted_draft_tokens": 2, "num_draft_tokens": 6}
            usage = {"prompt_tokens": 7, "completion_tokens": 4}
            chunks.append({"choices": [], "usage": usage, "metrics": {"speculative_decoding": spec}})
        lines = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"]
        if s.fault == "garbage":
            lines[1] = "{"
        self._send(200, "".join(f"data: {line}\n\n" for line in lines), "text/event-stream")

    def _send(self, status: int, text: str, kind: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def words(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    records = [
        {"id": "1", "category": "a", "turns": ["one", "two"]},
        {"id": "2", "category": "b", "turns": ["three"]},
        {"id": "3", "category": "b", "turns": [7]},
    ]
    Path("set.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return ["evaluate", "--endpoint", server.url, "--prompts", "set.jsonl", "--out", "out", "--json", "r.json"]


def answers() -> list[dict[str, Any]]:
    """The rows of answers."""
    lines = [json.loads(line) for line in Path("out/served.jsonl").read_text().splitlines()]
    return [line for line in lines[1:] if "summary" not in line]


def test_a_servers_acceptance_is_what_its_counters_gain_over_each_task(server: Server, words: list[str]):
    server.drafts, server.accepted = 100, 100  # of others, before
    assert main(words) == 0
    result = json.loads(Path("r.json").read_text())
    assert result["server_version"] == "0.99" and result["model"] == "m"
    a, b = result["summary"]
    assert (a["task"], a["drafts"], a["answers"], b["drafts"], b["answers"], b["failed"]) == ("a", 6, 2, 3, 1, 1)
    for row in (a, b):
        assert row["acceptance_length"] == pytest.approx(1 + 2 / 3) and row["tau_micro"] == pytest.approx(1 + 2 / 3)
        assert row["survival"] == pytest.approx([2 / 3, 0]) and row["acceptance_rate"] == pytest.approx(1 / 3)
    rows = answers()
    assert [r["text"] for r in rows if r["id"] == "1"] == ["1 1 ", "3 3 "]  # the second turn holds the first answer
    assert rows[0]["tokens"] == [5, 6, 5, 6] and rows[0]["count"] == 4 and len(rows[0]["chunk_seconds"]) == 2
    assert server.asked[0]["temperature"] == 0 and server.asked[0]["stream_options"] == {"include_usage": True}


def test_a_stopped_run_asks_for_the_tasks_that_are_left(server: Server, words: list[str], capsys):
    assert main(words) == 0
    path, whole = Path("out/served.jsonl"), json.loads(Path("r.json").read_text())["summary"]
    asked, lines = len(server.asked), path.read_bytes().splitlines(keepends=True)
    assert main(words) == 0
    assert len(server.asked) == asked and json.loads(Path("r.json").read_text())["summary"] == whole
    path.write_bytes(b"".join(lines[:-1]))  # the figures of the second task are not there, so its answers do not count
    assert main(words) == 0
    assert len(server.asked) == asked + 1 and len(path.read_bytes().splitlines()) == len(lines)
    assert main([*words, "--max-new-tokens", "9"]) == 1
    assert "max_new_tokens was 256, is 9" in capsys.readouterr().err and len(server.asked) == asked + 1


def test_a_server_is_told_all_that_the_template_renders_and_how_tokens_are_drawn(server: Server, words: list[str]):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    line = {"id": "1", "prompt": "one", "tools": [tool], "chat_template_kwargs": {"short": True}}
    Path("set.jsonl").write_text(json.dumps(line) + "\n")
    assert main([*words, "--top-k", "5", "--template-args", "enable_thinking=false,short=false"]) == 0
    (body,) = server.asked
    assert body["tools"] == [tool] and body["top_k"] == 5
    assert body["chat_template_kwargs"] == {"enable_thinking": False, "short": True}


def test_a_server_without_counters_has_times_alone(
    server: Server, words: list[str], capsys: pytest.CaptureFixture[str]
):
    server.shows_counters = False
    assert main(words) == 0
    assert "shows no counters" in capsys.readouterr().out
    first = json.loads(Path("r.json").read_text())["summary"][0]
    assert first["acceptance_length"] is None and first["tokens_per_second"] > 0 and first["ttft_ms"] > 0


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("status", "status 400"),
        ("error", "out of memory"),
        ("cut", "finish_reason ''"),
        ("garbage", "a chunk is not JSON"),
    ],
)
def test_a_failed_answer_is_a_row_with_its_reason(server: Server, words: list[str], fault: str, told: str):
    server.fault = fault
    assert main(words) == 0
    rows = answers()
    assert told in rows[0]["error"] and not rows[0]["text"]


def test_counters_that_fall_are_those_of_a_new_server():
    before, after = Counters(5, 10, 4, (4.0,)), Counters(7, 14, 7, (5.0, 2.0))
    assert after.since(before) == Counters(2, 4, 3, (1.0, 2.0))
    with pytest.raises(ValueError, match="started again"):
        before.since(after)
    assert Counters(0, 0, 0, ()).figures()["acceptance_length"] is None


def test_pages_without_the_counters_have_none_and_answers_of_sglang_are_read():
    assert parse_counters("# nothing\nother_total 3\n") is None
    found = of_answer(
        {"meta_info": {"spec_verify_ct": 4, "spec_num_correct_drafts": 6, "spec_num_proposed_drafts": 12}}
    )
    assert found is not None and found.rounds == 4 and found.accepted == 6
    assert (
        of_answer({"choices": [], "metrics": None}) is None
        and of_answer({"metrics": {"speculative_decoding": 3}}) is None
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--drafter", "lookup"], "--endpoint has its own drafter"),
        (["--slots", "4"], "--slots is the server's own with --endpoint"),
        (["--template", "chatml"], "--template is the server's own with --endpoint"),
        (["--concurrency", "0"], "concurrency"),
        (["--endpoint", "nowhere"], "must be an address"),
    ],
)
def test_wrong_flags_are_one_sentence(words: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = main([*words, *more])
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2) and said in capsys.readouterr().err


def test_thoughts_are_timed_as_text_is():
    heard = _Heard(time.perf_counter() - 5)
    for delta in ({"role": "assistant"}, {"reasoning_content": "so"}, {"reasoning": "then"}, {"content": "yes"}):
        heard.add({"choices": [{"delta": delta}]})
    heard.add({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}})
    found = heard.answer()
    assert len(found.chunk_seconds) == 3 and found.text == "yes" and found.ttft_seconds == found.chunk_seconds[0]
