"""Golden prompts of an export, and servers that are held to them."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from random_models import write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.decoding.generation import generate, generate_plain
from jaxspec.decoding.requests import Settings, make_requests
from jaxspec.evaluation.golden import Golden, acceptance_of, read_golden
from jaxspec.evaluation.served_check import check_prompts, likely_cause, parting
from jaxspec.serving.loading import load_models
from jaxspec.serving.streaming_client import StreamedAnswer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("golden")
    write_target(home / "target")
    write_drafter(home / "drafter")
    prompts = [{"id": str(i), "prompt": f"how much is {i} and 3?"} for i in range(3)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        words = ["export", "drafter", "served", "--to", "eagle", "--target", "target", "--golden", "prompts.jsonl"]
        assert main(words) == 0
    return home


@pytest.fixture
def golden(home: Path, monkeypatch: pytest.MonkeyPatch) -> Golden:
    monkeypatch.chdir(home)
    return read_golden("served")


def test_golden_prompts_are_what_decoding_does(golden: Golden):
    models = load_models("target", drafter="served", tree="chain:3")
    accepted = np.zeros(4, int)
    for prompt in golden.prompts:
        request = models.request(np.asarray(prompt.prompt_ids), Settings(golden.facts["new_tokens"]))
        requests = make_requests([request])
        (plain,), (drafted,) = (
            generate_plain(models.engine, models.weights, requests),
            generate(models.engine, models.weights, requests),
        )
        assert plain.tokens.tolist() == prompt.output_ids and len(prompt.margins) == len(prompt.output_ids)
        assert min(prompt.margins) >= 0
        kept = np.bincount(drafted.call_of)[1:] - 1
        for round_, draft in enumerate(prompt.drafts[: drafted.calls - 1]):
            first = 1 + int(np.sum(kept[:round_] + 1))
            assert draft[: kept[round_]] == prompt.output_ids[first : first + kept[round_]]
        accepted += drafted.accepted
    assert golden.acceptance["rounds"] == accepted.sum()
    assert golden.acceptance["survival"][0] == pytest.approx(accepted[1:].sum() / accepted.sum())


def test_a_folder_of_jaxspecs_own_has_golden_prompts_too(golden: Golden):
    assert main(["export", "drafter", "own", "--target", "target", "--golden", "prompts.jsonl"]) == 0
    own = read_golden("own")
    assert own.acceptance == golden.acceptance and own.facts["format_of_drafter"] == "orbax"


def test_acceptance_by_position_is_that_of_histograms():
    found = acceptance_of(np.asarray([[1, 2, 1], [0, 0, 4]]))
    assert found["rounds"] == 8 and found["survival"] == pytest.approx([7 / 8, 5 / 8])
    assert found["acceptance_length"] == pytest.approx(1 + 12 / 8)


class Server(ThreadingHTTPServer):
    """A server that does what golden prompts say, or something else."""

    def __init__(self, golden: Golden) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.golden, self.fault, self.drafts = golden, "", 0


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        s = self.server
        n, name = s.drafts, "vllm:spec_decode_num"
        survival = [x + 0.3 * (s.fault == "acceptance") for x in s.golden.acceptance["survival"]]
        page = f"{name}_drafts_total {n}\n{name}_draft_tokens_total {3 * n}\n"
        page += f"{name}_accepted_tokens_total {n * sum(survival)}\n"
        page += "".join(
            f'{name}_accepted_tokens_per_pos_total{{position="{i}"}} {n * x}\n' for i, x in enumerate(survival)
        )
        found = {"/v1/models": json.dumps({"data": [{"id": "m"}]}), "/metrics": page}
        self._send(200 if self.path in found else 404, found.get(self.path, ""))

    def do_POST(self) -> None:
        s, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            ids = next(p.prompt_ids for p in s.golden.prompts if p.messages == body["messages"])
            return self._send(200, json.dumps({"tokens": ids[1:] if s.fault == "template" else ids}))
        prompt = next(p for p in s.golden.prompts if p.prompt_ids == body["prompt"])
        s.drafts += 100
        ids = list(prompt.output_ids)
        if s.fault == "tokens":
            at = int(np.argmax(prompt.margins))
            ids[at] += 1
        chunks = [
            {"choices": [{"text": prompt.output_text, "token_ids": ids}]},
            {"choices": [{"finish_reason": "stop"}]},
        ]
        self._send(200, "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n")

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server(golden: Golden) -> Iterator[Server]:
    with Server(golden) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.mark.parametrize(
    ("fault", "failed", "cause"),
    [
        ("", None, None),
        ("template", "prompt ids", "chat template"),
        ("tokens", "output ids", "mask, position or commit"),
        ("acceptance", "acceptance by position", ""),
    ],
)
def test_a_server_is_held_to_its_golden_prompts(server: Server, fault: str, failed: str | None, cause: str | None):
    server.fault = fault
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    code = main(["check-served", "served", "--endpoint", url, "--dtype", "fp32", "--json", "check.json"])
    result = json.loads(Path("check.json").read_text())
    stages = {s["stage"]: s["passed"] for s in result["stages"]}
    assert code == (failed is not None) and [k for k, v in stages.items() if v is False] == [failed] * code
    if failed is None:
        assert stages["output ids"] and stages["acceptance by position"] and result["likely_cause"] is None
        assert stages["first draft"] is None  # a server does not show it
    else:
        assert list(stages)[-1] == failed and (cause or "") in result["likely_cause"]


@pytest.mark.parametrize(
    ("served", "cause"),
    [
        ([0.0, 0.0, 0.0], "nothing is accepted"),
        ([0.3, 0.2, 0.15], "the first position is poor"),
        ([0.7, 0.05, 0.0], "the second position collapses"),
        ([0.7, 0.5, 0.05], "falls from position 3 on: trained with 2 draft steps"),
        ([0.64, 0.45, 0.32], "everything is somewhat low"),
        ([0.99, 0.99, 0.99], "too good"),
    ],
)
def test_causes_are_told_from_acceptance_by_position(served: list[float], cause: str):
    assert cause in likely_cause(np.asarray(served), np.asarray([0.7, 0.5, 0.36]))


def test_answers_part_where_their_ids_do(golden: Golden):
    prompt = golden.prompts[0]

    def said(tokens: list[int], text: str) -> StreamedAnswer:
        return StreamedAnswer(text, tuple(tokens), len(tokens), 1, "stop", 0.1, 0.2, (), None)

    assert parting(prompt, said(prompt.output_ids, "")) is None
    assert parting(prompt, said(prompt.output_ids[:-1], "")) is None  # without the stop id
    assert parting(prompt, said([*prompt.output_ids[:3], 299, *prompt.output_ids[4:]], "")) == 3
    assert parting(prompt, said(prompt.output_ids[:4], "")) == 4
    assert parting(prompt, said([], prompt.output_text)) is None
    assert parting(prompt, said([], prompt.output_text[:5] + "\0")) is not None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["check-served", "absent", "--endpoint", "http://localhost:1/v1"], "absent: no such file"),
        (["check-served", "served"], "--endpoint is missing"),
        (
            ["check-served", "target/config.json", "--endpoint", "http://localhost:1/v1"],
            "is not a file of golden prompts",
        ),
        (["export", "drafter", "x", "--golden", "prompts.jsonl"], "--golden needs --target"),
        (
            [
                "export",
                "drafter",
                "y",
                "--to",
                "eagle",
                "--target",
                "target",
                "--golden",
                "prompts.jsonl",
                "--golden-tree",
                "dynamic:8x3x3",
            ],
            "servers verify chains",
        ),
    ],
)
def test_wrong_flags_are_one_sentence(golden: Golden, words: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2) and told in capsys.readouterr().err


def test_the_tools_and_variables_of_a_prompt_are_kept_and_sent(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    line = {"id": "t", "prompt": "how much?", "tools": [tool], "chat_template_kwargs": {"short": True}}
    Path("tools.jsonl").write_text(json.dumps(line) + "\n")
    template = Path(shutil.copytree("target", "reader")) / "chat_template.jinja"
    template.write_text(
        "{% if short %}. {% endif %}{% for tool in tools or [] %}say {% endfor %}" + template.read_text()
    )
    words = ["export", "drafter", "tooled", "--to", "eagle", "--target", "reader", "--golden", "tools.jsonl"]
    assert main(words) == 0
    (prompt,) = read_golden("tooled").prompts
    assert prompt.tools == [tool] and prompt.variables == {"short": True}
    sent: list[Any] = []
    client: Any = SimpleNamespace(tokenize=lambda context: sent.append(context) or prompt.prompt_ids)
    assert check_prompts(client, [prompt])[0].passed
    assert sent[0]["tools"] == [tool] and sent[0]["chat_template_kwargs"] == {"short": True}
