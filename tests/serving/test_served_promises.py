"""A drafter that `jaxspec serve` serves keeps what its export promised, as seen through its endpoint."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    prompts = [{"id": str(i), "category": "ab"[i % 2], "prompt": f"how much is {i} and 3?"} for i in range(8)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        golden = ("--target", "target", "--golden", "prompts.jsonl", "--golden-dtype", "fp32")
        assert main(["export", "target", "served", "--to", "hf", *golden]) == 0
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Running]:
    flags = {"drafter": str(home / "served"), "tree": "chain:3", "template": None, "max_new_tokens": 128}
    with running(home, **flags) as found:
        yield found


def check(url: str, folder: Path, out: Path) -> tuple[int, dict[str, Any]]:
    """The exit status of `check-served` and its result."""
    words = ["check-served", str(folder), "--endpoint", f"{url}/v1", "--dtype", "fp32", "--json", str(out)]
    return main(words), json.loads(out.read_text())


def test_a_served_drafter_keeps_what_its_golden_prompts_promise(server: Running, home: Path):
    code, result = check(server.url, home / "served", home / "check.json")
    stages = {s["stage"]: s for s in result["stages"]}
    assert code == 0 and result["likely_cause"] is None and stages["prompt ids"]["note"] == "ids"
    passed = [name for name, stage in stages.items() if stage["passed"]]
    assert passed == [
        "prompt ids", "plain answers", "first draft", "unrolled drafts", "rank hits", "output ids",
        "acceptance by position",
    ]  # fmt: skip
    assert stages["auxiliary hidden states"]["note"].startswith("not given by this server")
    assert "first tokens alone" not in stages["plain answers"]["note"]
    assert stages["first draft"]["figure"] == 1 and len(stages["unrolled drafts"]["figure"]) == 2
    assert stages["rank hits"]["figure"] == stages["rank hits"]["expected"]
    # It drafts for itself.
    assert read_golden(home / "served").run("float32").acceptance["survival"][0] > 0.8


def test_a_limit_of_the_server_fails_the_stages_that_meet_it(server: Running, home: Path):
    golden = json.loads((home / "served" / "golden.json").read_text())
    for answer in golden["runs"]["float32"]["answers"]:
        answer["output_ids"] += [7] * 200
    (home / "long.json").write_text(json.dumps(golden))
    code, result = check(server.url, home / "long.json", home / "limit.json")
    failed = {s["stage"]: s["note"] for s in result["stages"] if s["passed"] is False}
    assert code == 1 and failed.keys() == {"plain answers", "first draft", "output ids"}
    assert all("status 400" in note and "max_tokens" in note for note in failed.values())


def changed(folder: Path, name: str, to: Path) -> Path:
    """A copy of a model with one of its tensors negated."""
    shutil.copytree(folder, to)
    (to / "jaxspec.json").unlink(missing_ok=True)  # whose checksums would tell
    (path,) = to.glob("*.safetensors")
    tensors = load_file(path)
    save_file(tensors | {name: -tensors[name]}, path, metadata={"format": "pt"})
    return to


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "stage", "cause"),
    [("drafter", "first draft", "the fusion layer"), ("target", "plain answers", "the target")],
)
def test_the_stage_that_fails_names_what_is_served_wrong(
    home: Path, tmp_path: Path, wrong: str, stage: str, cause: str
):
    given = {"drafter": home / "served", "target": home / "target"}
    given[wrong] = changed(given[wrong], "lm_head.weight", tmp_path / wrong)
    flags = {name: str(path) for name, path in given.items()}
    with running(home, **flags, tree="chain:3", template=None, max_new_tokens=128) as found:
        code, result = check(found.url, home / "served", tmp_path / "check.json")
    assert code == 1 and result["stages"][-1]["stage"] == stage and cause in result["likely_cause"]
    assert [s["stage"] for s in result["stages"] if s["passed"] is False] == [stage]


@pytest.mark.slow
def test_a_wrong_fusion_layer_is_found_at_the_first_draft(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    golden = ("--target", "target", "--golden", "prompts.jsonl", "--golden-dtype", "fp32")
    assert main(["export", "drafter", "head", "--to", "eagle", *golden]) == 0
    wrong = changed(home / "head", "fc.weight", tmp_path / "wrong")
    # Another tree than the golden one: its rounds begin at other places, and hold more children.
    for drafter, tree in ((home / "head", "dynamic:8x3x3"), (wrong, "chain:3")):
        with running(home, drafter=str(drafter), tree=tree, template=None, max_new_tokens=128) as found:
            code, result = check(found.url, home / "head", tmp_path / "check.json")
        failed = [s["stage"] for s in result["stages"] if s["passed"] is False]
        assert code == (drafter == wrong) and failed == ["first draft"] * code
        told = {s["stage"]: s for s in result["stages"]}
        if not code:
            assert told["first draft"]["passed"] and told["unrolled drafts"]["passed"] and told["rank hits"]["passed"]
            assert "it drafts trees" in told["acceptance by position"]["note"]


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
