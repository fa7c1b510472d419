"""A server whose answers have the shape of vLLM's, SGLang's or llama.cpp's, and that can fail in every way."""

import json
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from quiet_handler import QuietHandler

PAGE = """# HELP vllm:spec_decode_num_drafts_total Number of drafts.
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {drafts}.0
vllm:spec_decode_num_drafts_total{{engine="1",model_name="m"}} 0
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {drafted}
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="0"}} {accepted}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="1"}} 0
vllm:request_success_total{{finished_reason="stop"}} 3.0
"""
GAUGES = """# TYPE sglang:spec_accept_length gauge
sglang:spec_accept_length{engine_type="unified",model_name="m",tp_rank="0",dp_rank="0"} 2.5
sglang:spec_accept_length{engine_type="unified",model_name="m",tp_rank="0",dp_rank="1"} 3.5
sglang:spec_accept_rate{engine_type="unified",model_name="m",tp_rank="0",dp_rank="0"} 0.5
sglang:spec_verify_calls_total{engine_type="unified"} 40
"""
ROUNDS, ACCEPTED, DRAFTED, TOKENS = 3, 2, 6, 6
"""Of every answer: its rounds accept 1, 1 and 0 of two drafted tokens, and prefill gives the first token."""


class Server(ThreadingHTTPServer):
    """A server that answers with the number of messages, in three chunks of two tokens.

    `kind` is what it is. `fault` is what is wrong with a request whose last message is in `faulty`, or with all.
    `strict` servers refuse fields that they do not know, by name or not.
    """

    daemon_threads = True

    def __init__(self, kind: str = "vllm") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind, self.fault, self.strict = kind, "", ""
        self.faulty: tuple[str, ...] = ()
        self.shows_counters = kind == "vllm"
        self.asked: list[dict[str, Any]] = []
        self.drafts = self.accepted = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has gone

    def page(self) -> str | None:
        """Returns the metrics page; None where there is none."""
        if self.kind == "sglang":
            return GAUGES
        if not self.shows_counters:
            return None
        return PAGE.format(drafts=self.drafts, drafted=2 * self.drafts, accepted=self.accepted)

    def last_chunks(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the chunks behind the text, as a server of this kind sends them."""
        end: dict[str, Any] = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        usage: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": TOKENS}}
        if self.kind == "vllm":
            told = {"num_spec_steps": ROUNDS, "num_accepted_draft_tokens": ACCEPTED, "num_draft_tokens": DRAFTED}
            told |= {"acceptance_histogram": [1, 2, 0], "mean_acceptance_length": 1 + ACCEPTED / ROUNDS}
            return [end, usage | {"metrics": {"speculative_decoding": told, "time_to_first_token_ms": 3.5}}]
        if self.kind == "sglang" and body.get("return_spec_tokens_details"):
            told = {"spec_verify_ct": ROUNDS, "spec_num_correct_drafts": ACCEPTED, "spec_num_proposed_drafts": DRAFTED}
            told |= {"spec_correct_drafts_histogram": [1, 2], "spec_accept_rate": ACCEPTED / DRAFTED}
            told |= {"spec_accept_length": TOKENS / ROUNDS, "spec_cap_lens_histogram": []}
            return [end, {"choices": [], "sglext": {"spec_tokens_details": told}}, usage | {"sglext": None}]
        if self.kind == "llama.cpp":
            timings = {"cache_n": 0, "prompt_n": 7, "predicted_n": TOKENS, "predicted_ms": 4.0}
            return [end, usage | {"timings": timings | {"draft_n": DRAFTED, "draft_n_accepted": ACCEPTED}}]
        return [end, usage]


class Handler(QuietHandler):
    server: Server

    def do_GET(self) -> None:
        found = {
            "/v1/models": json.dumps({"data": [{"id": "m"}]}),
            "/version": json.dumps({"version": "0.99"}),
            "/metrics": self.server.page(),
        }
        text = found.get(self.path)
        self._send(404 if text is None else 200, text or "", "text/plain")

    def do_POST(self) -> None:
        s, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        s.asked.append(body)
        unknown = [name for name in ("return_token_ids", "return_spec_tokens_details") if name in body]
        if s.strict and unknown:
            said = f"Unrecognized request arguments: {unknown}" if s.strict == "by name" else "bad request"
            return self._send(400, json.dumps({"error": {"message": said}}), "application/json")
        fault = s.fault if not s.faulty or body["messages"][-1]["content"] in s.faulty else ""
        if fault.startswith("status "):
            return self._send(int(fault[7:]), json.dumps({"error": {"message": "no"}}), "application/json")
        if fault == "hangs up":
            self.close_connection = True
            return None
        if fault == "restart":
            s.drafts = s.accepted = 0
        s.drafts, s.accepted = s.drafts + ROUNDS, s.accepted + ACCEPTED
        return self._send(200, "".join(f"data: {line}\n\n" for line in self._lines(body, fault)), "text/event-stream")

    def _lines(self, body: dict[str, Any], fault: str) -> list[str]:
        chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
        for _ in range(3):
            ids = {"token_ids": [5, 6]} if self.server.kind == "vllm" else {}
            chunks.append({"choices": [{"index": 0, "delta": {"content": f"{len(body['messages'])} "}, **ids}]})
        if fault == "error":
            chunks.append({"error": {"message": "out of memory"}})
        elif fault == "too long":
            chunks.append({"error": {"message": "too long", "code": 400}})
        elif fault.startswith("finish "):
            chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": fault[7:]}]})
        elif fault != "cut":
            chunks += self.server.last_chunks(body)
        if fault == "miscounts":
            chunks[-1]["metrics"]["speculative_decoding"]["num_draft_tokens"] = 1
        lines = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"]
        return [lines[0], "{", *lines[2:]] if fault == "garbage" else lines

    def _send(self, status: int, text: str, kind: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def served_words(server: Server) -> list[str]:
    """Returns the verb's words for two tasks, the first of two turns; writes their file here."""
    records = [{"id": "1", "category": "a", "turns": ["one", "two"]}, {"id": "2", "category": "b", "turns": ["three"]}]
    Path("set.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return ["evaluate", "--endpoint", server.url, "--prompts", "set.jsonl", "--out", "out", "--json", "r.json"]


def answers() -> list[dict[str, Any]]:
    """Returns the rows of answers."""
    lines = [json.loads(line) for line in Path("out/served.jsonl").read_text().splitlines()]
    return [line for line in lines[1:] if "sitting" not in line]


def summary() -> list[dict[str, Any]]:
    """Returns the figures by task."""
    return json.loads(Path("r.json").read_text())["summary"]
