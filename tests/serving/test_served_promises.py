"""A drafter that `jaxspec serve` serves keeps what its export promised, as seen through its endpoint."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("starlette")

from http_toys import Running, running, serve
from random_models import write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.evaluation.golden import read_golden
from jaxspec.serving import loading


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that drafts for itself, exported with golden prompts."""
    home = tmp_path_factory.mktemp("promises")
    write_target(home / "target")
    write_drafter(home / "drafter")
    prompts = [{"id": str(i), "category": "ab"[i % 2], "prompt": f"how much is {i} and 3?"} for i in range(4)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        golden = ("--target", "target", "--golden", "prompts.jsonl")
        assert main(["export", "target", "served", "--to", "hf", *golden]) == 0
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Running]:
    flags = {"drafter": str(home / "served"), "tree": "chain:3", "template": None, "max_new_tokens": 128}
    with running(home, **flags) as found:
        yield found


def test_a_served_drafter_keeps_what_its_golden_prompts_promise(server: Running, home: Path):
    words = ["check-served", str(home / "served"), "--endpoint", f"{server.url}/v1", "--dtype", "fp32"]
    assert main([*words, "--json", str(home / "check.json")]) == 0
    stages = {s["stage"]: s for s in json.loads((home / "check.json").read_text())["stages"]}
    assert stages["prompt ids"]["passed"] and stages["prompt ids"]["note"] == "ids"
    assert stages["output ids"]["passed"] and stages["acceptance by position"]["passed"]
    assert read_golden(home / "served").acceptance["survival"][0] > 0.8  # it drafts for itself


def test_an_evaluation_reads_the_servers_counters_by_task(server: Running, home: Path):
    words = ["evaluate", "--endpoint", f"{server.url}/v1", "--prompts", str(home / "prompts.jsonl")]
    words += ["--max-new-tokens", "24", "--out", str(home / "out"), "--concurrency", "2"]
    assert main([*words, "--json", str(home / "result.json")]) == 0
    result = json.loads((home / "result.json").read_text())
    assert result["server_version"] and [row["task"] for row in result["summary"]] == ["a", "b"]
    for row in result["summary"]:
        assert row["failed"] == 0 and row["drafts"] > 0 and 3 < row["acceptance_length"] <= 4
        assert row["survival"] == sorted(row["survival"], reverse=True) and row["tokens"] > 0


def test_the_fingerprint_is_another_where_only_the_weights_are(home: Path, tmp_path: Path):
    other = shutil.copytree(home / "target", tmp_path / "target")
    (path,) = other.glob("*.safetensors")
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": 2 * tensors["model.norm.weight"]}, path, metadata={"format": "pt"})
    names = [
        serve.fingerprint_of(args, loading.load_models(args.target))
        for args in (serve.Args(target=str(t), name="one") for t in (home / "target", home / "target", other))
    ]
    assert names[0] == names[1] != names[2]


def test_ids_of_a_conversation_are_told(server: Running):
    body = {"model": "target", "messages": [{"role": "user", "content": "3 and 4"}], "add_generation_prompt": True}
    status, found, _ = server.ask("/tokenize", body)
    assert status == 200 and found["count"] == len(found["tokens"]) > 3
    status, found, _ = server.ask("/tokenize", {"model": "target", "messages": []})
    assert status == 400 and found["error"]["param"] == "messages"
