"""Golden prompts of an export, and servers that are held to them."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from quiet_handler import QuietHandler
from random_models import random_weights, write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.checkpoints.models import save_drafter
from jaxspec.decoding.generation import generate, generate_plain, run_rounds, start
from jaxspec.decoding.requests import Settings, make_requests
from jaxspec.drafters import Medusa, MedusaConfig
from jaxspec.evaluation.golden import Golden, GoldenRun, acceptance_of, rank_hits, read_golden, round_places
from jaxspec.evaluation.served_check import check_prompts, check_served, parting
from jaxspec.evaluation.timing import grow
from jaxspec.serving.endpoint import Client, Endpoint
from jaxspec.serving.loading import load_models


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("golden")
    write_target(home / "target")
    write_drafter(home / "drafter")
    prompts = [{"id": str(i), "prompt": f"how much is {i} and 3?"} for i in range(8)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        words = ["export", "drafter", "served", "--to", "eagle", "--target", "target", "--golden", "prompts.jsonl"]
        assert main([*words, "--golden-dtype", "fp32"]) == 0
    return home


@pytest.fixture
def golden(home: Path, monkeypatch: pytest.MonkeyPatch) -> Golden:
    monkeypatch.chdir(home)
    return read_golden("served")


def test_the_chain_is_as_long_as_the_drafters_pass(golden: Golden):
    assert golden.facts["tree"] == "chain:3"
    module = Medusa(MedusaConfig(32, 2))
    save_drafter("medusa", "medusa", module, random_weights(module, 0.3, 5))
    words = ["export", "medusa", "short", "--target", "target", "--golden", "prompts.jsonl", "--golden-dtype", "fp32"]
    assert main(words) == 0
    short = read_golden("short")
    assert short.facts["tree"] == "chain:2" and len(short.run("float32").acceptance["survival"]) == 2


def test_golden_prompts_are_what_decoding_does(golden: Golden):
    models = load_models("target", drafter="served", tree="chain:3")
    accepted = np.zeros(4, int)
    run = golden.run("float32")
    for prompt, kept in zip(golden.prompts, run.answers, strict=True):
        request = models.request(np.asarray(prompt.prompt_ids), Settings(golden.facts["new_tokens"]))
        requests = make_requests([request])
        (plain,) = generate_plain(models.engine, models.weights, requests)
        (drafted,) = generate(models.engine, models.weights, requests)
        assert plain.tokens.tolist() == kept.output_ids and len(kept.margins) == len(kept.output_ids)
        assert min(kept.margins) >= 0
        # The ranks give the rounds of decoding.
        taken = np.bincount(drafted.call_of)[1:]
        places = round_places(kept.ranks, 99)
        assert places == [1 + int(sum(taken[:i])) for i in range(len(taken))]
        assert [draft.at for draft in kept.drafts] == list(range(1, places[:4][-1] + 1))
        for draft in kept.drafts:
            for depth, (top, rank) in enumerate(zip(draft.top, kept.ranks[draft.at - 1], strict=False)):
                assert (top[0] == kept.output_ids[draft.at + depth]) == (rank == 0)
                if rank:
                    break
        accepted += drafted.accepted
    assert run.acceptance["rounds"] == accepted.sum()
    assert run.acceptance["survival"][0] == pytest.approx(accepted[1:].sum() / accepted.sum())


def test_a_draft_is_the_chain_that_a_round_drafts(golden: Golden):
    models = load_models("target", drafter="served", tree="chain:3")
    kept = golden.run("float32").answers[0]
    request = models.request(np.asarray(golden.prompts[0].prompt_ids), Settings(golden.facts["new_tokens"]))
    state = start(models.engine, models.weights, make_requests([request]))
    drafts = {draft.at: draft for draft in kept.drafts}
    for at in round_places(kept.ranks, 4):
        tree = grow(models.engine, models.weights, state)
        assert [top[0] for top in drafts[at].top] == tree.token_BN[0, 1:].tolist()
        assert all(len(top) == 10 and len(of) == 9 for top, of in zip(*drafts[at][1:], strict=True))
        state = run_rounds(models.engine, models.weights, state, np.int32(1))


def test_a_folder_of_jaxspecs_own_has_golden_prompts_in_both_dtypes(golden: Golden):
    assert main(["export", "drafter", "own", "--target", "target", "--golden", "prompts.jsonl"]) == 0
    own = read_golden("own")
    assert own.run("float32") == golden.run("float32") and own.facts["format_of_drafter"] == "orbax"
    assert list(own.runs) == ["float32", "bfloat16"] and len(own.run("bfloat16").answers) == 8


def test_ranks_give_rounds_and_hits():
    ranks = [[0, 0, 0], [3, 0, 0], [-1, 0, 1], [0, 1], [0]]
    assert round_places(ranks, 9) == [1, 5] and round_places(ranks[1:], 2) == [1, 2]
    hits = rank_hits([ranks, []])
    assert [depth["starts"] for depth in hits] == [5, 4, 3]
    assert hits[0]["hits"] == [3, 0, 0, 1, *[0] * 6] and hits[1]["hits"][:2] == [3, 1]


def test_what_is_not_known_is_null_in_the_file(tmp_path: Path):
    unknown = acceptance_of(np.zeros((8, 3), int))
    assert unknown["survival"] == [None, None] == unknown["low"] and unknown["acceptance_length"] is None
    assert acceptance_of(np.asarray([[1, 1], [0, 2], [1, 0]]))["low"] == [None]
    file = tmp_path / "golden.json"
    Golden({}, [], {"float32": GoldenRun([], [], unknown)}).save(file)
    assert "NaN" not in file.read_text() and read_golden(file).run("float32").acceptance == unknown


def test_acceptance_by_position_is_that_of_histograms():
    found = acceptance_of(np.asarray([[1, 2, 1], [0, 0, 4]]))
    assert found["rounds"] == 8 and found["survival"] == pytest.approx([7 / 8, 5 / 8])
    assert found["acceptance_length"] == pytest.approx(1 + 12 / 8)


class Server(ThreadingHTTPServer):
    """A server that does what golden prompts say, or something else."""

    def __init__(self, golden: Golden) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.golden, self.fault, self.drafts, self.asked = golden, "", 0, 0
        self.done = threading.Event()


class Handler(QuietHandler):
    server: Server

    def do_GET(self) -> None:
        s = self.server
        n, name = s.drafts, "vllm:spec_decode_num"
        survival = [x + 0.3 * (s.fault == "acceptance") for x in s.golden.run("float32").acceptance["survival"]]
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
        number = next(i for i, p in enumerate(s.golden.prompts) if p.prompt_ids == body["prompt"])
        answer = s.golden.run("float32").answers[number]
        s.asked += 1
        if s.fault == "limit" and body["max_tokens"] > 1 and "jaxspec" not in body:
            return self._send(400, json.dumps({"error": {"message": f"max_tokens is {body['max_tokens']}, above 1"}}))
        if s.fault == "stuck" and s.asked > 3:
            s.done.wait(20)
        if s.fault == "garbled":
            return self._send(200, "no such thing", encoding="gzip")
        if s.fault == "dead" and s.asked > 12:
            self.close_connection = True
            return None
        s.drafts += 100
        ids = list(answer.output_ids)
        if s.fault == "target":
            ids[0] += 1
        if s.fault == "tokens":
            ids[1 + int(np.argmax(answer.margins[1:]))] += 1
        chunks = [
            {"choices": [{"text": answer.output_text, "token_ids": ids[: body["max_tokens"]], "finish_reason": None}]},
            {"choices": [{"finish_reason": "stop"}]},
        ]
        self._send(200, "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n")

    def _send(self, status: int, text: str, encoding: str = "identity") -> None:
        self.send_response(status)
        self.send_header("content-encoding", encoding)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server(golden: Golden) -> Iterator[Server]:
    with Server(golden) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.done.set()
        running.shutdown()


@pytest.mark.parametrize(
    ("fault", "failed", "cause"),
    [
        ("", None, None),
        ("template", "prompt ids", "chat template"),
        ("target", "plain answers", "the target, which decodes without drafts here"),
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
        notes = {s["stage"]: s["note"] for s in result["stages"]}
        for name in ("auxiliary hidden states", "first draft", "unrolled drafts", "rank hits"):
            assert stages[name] is None and notes[name].startswith("not given by this server: ")
        assert "first tokens alone" in notes["plain answers"]
        assert "800 rounds, fewer than 4,000" in notes["acceptance by position"]
    else:
        assert list(stages)[-1] == failed and (cause or "") in result["likely_cause"]


@pytest.mark.parametrize(
    ("fault", "failed", "told"),
    [
        ("limit", "output ids", "status 400: "),
        ("stuck", "plain answers", "no answer within 0.5 s"),
        ("dead", "output ids", "disconnected"),
        ("garbled", "plain answers", "Error -3"),
    ],
)
def test_a_request_that_fails_fails_its_stage(server: Server, fault: str, failed: str, told: str):
    server.fault = fault
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    with closing(Client(Endpoint(url, tries=1, timeout=0.5))) as client:
        found = check_served(client, server.golden, dtype="float32")
    (stage,) = (s for s in found.stages if s.passed is False)
    assert stage.stage == failed and stage.note.startswith("prompt '") and told in stage.note and found.likely_cause
    # A server that still answers is asked on.
    assert (found.stages[-1].stage == "speed") == (fault == "limit")


def test_a_server_that_refuses_answers_so_long_ends_the_verb_with_1(server: Server):
    server.fault = "limit"
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    assert main(["check-served", "served", "--endpoint", url, "--dtype", "fp32", "--json", "limit.json"]) == 1
    result = json.loads(Path("limit.json").read_text())
    assert "a limit of the server" in result["likely_cause"]
    assert {s["stage"]: s["note"] for s in result["stages"]}["speed"] == "not measured: answers failed"


def test_answers_part_where_their_ids_do(golden: Golden):
    answer = golden.run("float32").answers[0]
    ids = answer.output_ids
    assert parting(answer, ids, "") is None
    assert parting(answer, ids[:-1], "") is None  # without the stop id
    assert parting(answer, [*ids[:3], 299, *ids[4:]], "") == 3
    assert parting(answer, ids[:4], "") == 4
    assert parting(answer, [], answer.output_text) is None
    assert parting(answer, [], answer.output_text[:5] + "\0") is not None


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
        (["export", "drafter", "x", "--golden", "few.jsonl", "--target", "target"], "are 8 to 16, and these are 3"),
        (["check-served", "served", "--endpoint", "http://localhost:1/v1"], "of float32, not bfloat16"),
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
    lines = Path("prompts.jsonl").read_text().splitlines(keepends=True)
    Path("few.jsonl").write_text("".join(lines[:3]))
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2) and told in capsys.readouterr().err and not Path("x").exists()


def test_the_tools_and_variables_of_a_prompt_are_kept_and_sent(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    line = {"prompt": "how much?", "tools": [tool], "chat_template_kwargs": {"short": True}}
    Path("tools.jsonl").write_text((json.dumps(line) + "\n") * 8)
    template = Path(shutil.copytree("target", "reader")) / "chat_template.jinja"
    template.write_text(
        "{% if short %}. {% endif %}{% for tool in tools or [] %}say {% endfor %}" + template.read_text()
    )
    words = ["export", "drafter", "tooled", "--to", "eagle", "--target", "reader", "--golden", "tools.jsonl"]
    assert main([*words, "--golden-dtype", "fp32"]) == 0
    prompt, *_ = read_golden("tooled").prompts
    assert prompt.tools == [tool] and prompt.variables == {"short": True}
    sent: list[Any] = []
    client: Any = SimpleNamespace(tokenize=lambda context: sent.append(context) or prompt.prompt_ids)
    assert check_prompts(client, [prompt])[0].passed
    assert sent[0]["tools"] == [tool] and sent[0]["chat_template_kwargs"] == {"short": True}
