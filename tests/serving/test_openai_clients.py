"""The package `openai`, versions 3 and 2, against a real socket: every field read, streams equal to whole texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_toys import Running, chat, completion, events, running
from serve_toys import toy_models

from jaxspec.decoding.generation import generate
from jaxspec.decoding.requests import Settings, make_requests
from jaxspec.serving.endpoint import Client, Endpoint, read_reply

SECOND = "JAXSPEC_OPENAI_2"
"""Environment variable that names a folder of openai 2: `pip install --target FOLDER 'openai<3'`."""
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("models")) as one:
        yield one


def answer_of(served: Running, prompt: str, settings: Settings) -> tuple[str, int, str]:
    """Text, tokens and finish as `jaxspec generate` has them for its first prompt."""
    models = served.models
    request = models.request(models.tokenizer.encode_raw(prompt), settings.for_row(0))
    (answer,) = generate(models.engine, models.weights, make_requests([request], width=32))
    return models.tokenizer.decode(answer.tokens), len(answer.tokens), answer.finish


def calls_by(served: Running, folder: str | None) -> dict[str, Any]:
    """Returns what the package brings back, in a process of its own."""
    environment = os.environ | ({} if folder is None else {"PYTHONPATH": folder})
    script = Path(__file__).with_name("openai_calls.py")
    done = subprocess.run(
        [sys.executable, str(script), served.url], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["installed", SECOND])
def found(request: pytest.FixtureRequest, served: Running) -> dict[str, Any]:
    if request.param == "installed":
        pytest.importorskip("openai", reason="the package openai is not installed")
        return calls_by(served, None)
    folder = os.environ.get(SECOND)
    if folder is None:
        pytest.skip(f"{SECOND} names no folder of openai 2 (pip install --target FOLDER 'openai<3')")
    found = calls_by(served, folder)
    assert found["version"].startswith("2.")
    return found


def test_clients_read_every_field(found: dict[str, Any]):
    assert found["models"] == ["target"] and found["model"] == "jaxspec"
    for name, kind, prefix in (("chat", "chat.completion", "chatcmpl-"), ("text", "text_completion", "cmpl-")):
        response = found[name]
        assert response["object"] == kind and response["id"].startswith(prefix) and response["created"] > 1e9
        assert response["model"] == "target" and response["fingerprint"].startswith("fp_")
        (choice,) = response["choices"]
        assert choice["index"] == 0 and choice["finish"] in ("stop", "length") and choice["logprobs"] is None
        assert choice["role"] == ("assistant" if name == "chat" else None)
        usage = response["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["completion_tokens_details"]["accepted_prediction_tokens"] >= 0
    assert found["bare"]["usage"]["completion_tokens"] <= 16


def test_streams_add_up_to_the_whole_texts(found: dict[str, Any]):
    for name in ("chat", "text"):
        whole, stream = found[name], found[f"{name} stream"]
        assert stream["texts"] == [c["text"] for c in whole["choices"]]
        assert stream["finishes"] == [c["finish"] for c in whole["choices"]]
        assert stream["usage"] == whole["usage"] and stream["with_usage"] == 1 and stream["ids"] == 1
        assert stream["chunks"] > 5
    several = found["several stream"]
    assert several["texts"] == [c["text"] for c in found["several"]["choices"]] and len(several["texts"]) == 4
    assert several["usage"] is None and not several["reports"]
    assert found["text"]["choices"][0]["text"] == found["chat"]["choices"][0]["text"]
    texts = [stream["texts"] for stream in found["async"]["streams"]]
    assert texts[0] == texts[3] == [found["async"]["chat"]["choices"][0]["text"]] == found["chat stream"]["texts"]
    assert texts[1] != texts[2]


def test_choices_differ_and_usage_sums_them(found: dict[str, Any]):
    texts = [c["text"] for c in found["several"]["choices"]]
    assert [c["index"] for c in found["several"]["choices"]] == [0, 1, 2, 3] and len(set(texts)) == 4
    assert found["several"]["usage"]["completion_tokens"] > found["text"]["usage"]["completion_tokens"]


def test_chunks_report_their_rounds_on_request(found: dict[str, Any], served: Running):
    reports = found["reports"]["reports"]
    assert [report["round"] for report in reports] == list(range(len(reports)))
    assert all(report.keys() == {"round", "accepted", "nodes"} for report in reports)
    assert all(report["nodes"] == 8 for report in reports[1:])
    tokens = found["chat"]["usage"]["completion_tokens"]
    assert tokens - len(reports) <= sum(report["accepted"] for report in reports) <= tokens


def test_refusals_are_the_clients_own_exceptions(found: dict[str, Any]):
    assert found["refused"] == {
        "range": ["BadRequestError", 400, None, "temperature", "invalid_request_error"],
        "model": ["NotFoundError", 404, "model_not_found", "model", "invalid_request_error"],
        "tools": ["BadRequestError", 400, "unsupported_value", "logprobs", "invalid_request_error"],
    }


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_seed_gives_the_text_of_jaxspec_generate(served: Running, seed: int, temperature: float):
    settings = Settings(60, temperature, seed=seed)
    text, tokens, finish = answer_of(served, "3 and 4 make", settings)
    fields = {"seed": seed, "temperature": temperature, "max_tokens": 60}
    for body in (chat(**fields), chat(**fields, jaxspec={"plain": True}), chat(**fields, n=3)):
        found = served.ask(CHAT, body)[1]
        assert found["choices"][0]["message"]["content"] == text and found["choices"][0]["finish_reason"] == finish
        if body.get("n") is None:
            assert found["usage"]["completion_tokens"] == tokens


def test_a_seed_gives_the_same_text_with_another_tree_and_batch(served: Running, tmp_path: Path):
    body = completion(["3 and", "7 and 8"], n=2, seed=3, max_tokens=48)
    first = served.ask(TEXT, body)[1]["choices"]
    with running(tmp_path, tree="chain:3", batch=2) as other:
        assert other.ask(TEXT, body)[1]["choices"] == first
        served_again = served.ask(TEXT, body | {"seed": 3 + 2**32})[1]["choices"]
        assert served_again == first


def test_without_a_seed_texts_differ(served: Running):
    texts = {served.ask(CHAT, chat())[1]["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(texts) == 3


def test_stop_strings_cut_streams_and_whole_texts_alike(served: Running):
    fields = {"seed": 2, "temperature": 1, "max_tokens": 80}
    text = served.ask(TEXT, completion("9 and 4 make 13, they", **fields))[1]["choices"][0]["text"]
    whole = [at for at in range(1, len(text) - 2) if "\N{REPLACEMENT CHARACTER}" not in text[at : at + 2]]
    stop = text[whole[len(whole) // 2] :][:2]
    for stops in (stop, [stop, "never said"], ["never said"]):
        found = served.ask(TEXT, completion("9 and 4 make 13, they", stop=stops, **fields))[1]
        expected = text[: text.find(stop)] if stop in stops else text
        assert found["choices"][0]["text"] == expected
        body = completion(
            "9 and 4 make 13, they", stop=stops, stream=True, stream_options={"include_usage": True}, **fields
        )
        with served.send(served.post(TEXT, body)) as client:
            chunks = events(read_all(client))
        assert chunks[-1] == "[DONE]" and chunks[-2]["usage"] == found["usage"]
        assert "".join(c["choices"][0]["text"] for c in chunks[:-2]) == expected
        assert chunks[-3]["choices"][0]["finish_reason"] == found["choices"][0]["finish_reason"]


def read_all(client: Any) -> bytes:
    """The body of a chunked response, up to its end."""
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        more = client.recv(1 << 16)
        assert more, "the connection ended before the body"
        data += more
    body, rest = b"", data.partition(b"\r\n\r\n")[2]
    assert b"text/event-stream; charset=utf-8" in data and b"cache-control: no-cache" in data
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


def test_the_projects_own_client_reads_tokens_back(served: Running):
    body = chat(seed=4, temperature=0.7, return_token_ids=True)
    found = served.ask(CHAT, body)[1]
    reply = read_reply(found)
    assert reply.prompt_ids == tuple(served.models.tokenizer.encode_raw("3 and 4 make").tolist())
    assert reply.answer_ids is not None and len(reply.answer_ids) == reply.tokens
    assert served.models.tokenizer.decode(reply.answer_ids) == found["choices"][0]["message"]["content"]
    client = Client(Endpoint(served.url))
    assert client.model == "target"
    client.close()


def test_roles_and_parts_go_through_the_folders_template(served: Running, tmp_path: Path):
    toy_models(tmp_path)
    template = tmp_path / "shown.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant] ")
    with running(tmp_path, template=str(template)) as other:
        said = [
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "3 "}, {"type": "text", "text": "and 4"}],
                "name": None,
            },
            {"role": "assistant", "content": "7"},
            {"role": "user", "content": "5 and 6"},
        ]
        found = other.ask(CHAT, chat(messages=said, return_token_ids=True, seed=1))[1]
        shown = other.models.tokenizer.decode(found["prompt_token_ids"], skip_special=False)
        assert shown == "[system] be brief [user] 3 and 4 [assistant] 7 [user] 5 and 6 [assistant] "
