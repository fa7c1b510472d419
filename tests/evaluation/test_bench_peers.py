"""`jaxspec bench peers`: processes that answer in turns, equal tokens, settings, failures."""

import importlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import write_target

from jaxspec.__main__ import main
from jaxspec.decoding.generation import generate_plain
from jaxspec.decoding.requests import Request, Settings, make_requests
from jaxspec.evaluation.peer_processes import compare_tokens, decode_rate, rate, row_of
from jaxspec.evaluation.peer_workers import PeerPrompt, PeerSpec, TransformersWorker, serve
from jaxspec.evaluation.peers import load_transformers
from jaxspec.serving.loading import load_models

bench_peers: Any = importlib.import_module("jaxspec.infer.bench_peers")

KEYS = {"peer", "version", "settings", "tokens_per_second", "identical_fraction", "near_ties"}
WORDS = ["bench", "peers", "--target", "target", "--prompts", "set.jsonl", "--max-new-tokens", "8", "--repeats", "1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("peers")
    write_target(home / "target")
    questions = [{"id": i, "prompt": f"how much is {i} and 3?"} for i in range(4)]
    (home / "set.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return home


@pytest.fixture
def folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def reply(tokens: list[int], seconds: float = 1.0, prefill: float = 0.5) -> dict:
    return {"tokens": tokens, "seconds": seconds, "prefill_seconds": prefill, "calls": 2, "counted": len(tokens) - 1}


@pytest.mark.slow
def test_peers_answer_the_same_tokens_in_processes_of_their_own(folder: Path):
    pytest.importorskip("transformers")
    more = ("--limit", "2", "--tune", "1", "--drafter", "lookup", "--assistant", "target", "--gguf", "absent.gguf")
    assert main([*WORDS, *more, "--json", "peers.json"]) == 0
    result = json.loads(Path("peers.json").read_text())
    rows = {row["peer"]: row for row in result["rows"]}
    assert list(rows)[:3] == ["jaxspec plain", "jaxspec lookup", "transformers"] and len(rows) == 6
    assert set(result["failed"]) == {"llama.cpp"}
    for row in rows.values():
        assert row.keys() >= KEYS and row["identical_fraction"] + row["near_ties"] / 2 == 1
        assert row["tokens"] <= 2 * 8 and row["x_plain"] > 0
    assert rows["transformers"]["tau"] == rows["jaxspec plain"]["tau"] == 1
    assert rows["transformers assisted"]["tau"] > 1  # the target drafts for itself
    assert rows["transformers assisted, tuned"]["settings"]["schedule"] == "constant"


def test_the_table_shows_the_tree_that_a_drafter_was_saved_with(capsys: pytest.CaptureFixture[str]):
    figures = ("tokens_per_second", "x_plain", "decode_tokens_per_second", "x_plain_decode", "tau")
    shared = {"version": "1", **dict.fromkeys(figures, 1.0), "identical_fraction": 1.0, "near_ties": 0}
    rows = [
        {"peer": "jaxspec plain", "settings": {}, **shared},
        {"peer": "jaxspec HEAD", "settings": {"drafter": "HEAD", "tree": "chain:3"}, **shared},
    ]
    bench_peers.print_result({"target": "tiny", "count": 1, "threads": 2, "rows": rows, "failed": {}})
    lines = capsys.readouterr().out.splitlines()
    assert any("jaxspec HEAD" in line and "chain:3" in line for line in lines)


def test_rates_are_over_all_prompts_and_ratios_need_equal_tokens(folder: Path):
    assert rate([reply([1, 2]), reply([1, 2, 3], 4.0)]) == 1.0
    assert decode_rate([reply([1, 2]), reply([1, 2, 3], 4.0)]) == 3 / 4 and decode_rate([reply([1])]) is None
    row = row_of(
        "a", PeerSpec("a", "jaxspec", "t", {}, 1, 8, 8), {"version": "1"}, [[reply([1, 2])], [reply([1, 2], 3.0)]]
    )
    assert row["tokens_per_second"] == pytest.approx((2 + 2 / 3) / 2) and row["tau"] == 0.5
    models = load_models("target")
    asked = [Request(np.asarray([1, 2, 3]), Settings(4, stop_ids=models.stop_ids))] * 2
    same = compare_tokens(models, asked, [reply([1, 2])] * 2, [reply([1, 2]), reply([1])])
    assert same == {"identical_fraction": 0.5, "near_ties": 0, "differing": 1}
    other = compare_tokens(models, asked[:1], [reply([1, 2])], [reply([1, 9])])
    assert other["near_ties"] + other["differing"] == 1


def test_a_worker_that_cannot_start_says_why():
    told = io.StringIO()
    serve(PeerSpec("x", "llama.cpp", "absent.gguf", {}, 1, 8, 8), io.StringIO(), told)
    assert "failed" in json.loads(told.getvalue())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "peers"], "--prompts is missing"),
        ([*WORDS, "--tree", "chain:2"], "--tree needs a --drafter"),
        ([*WORDS, "--repeats", "0"], "repeats"),
        ([*WORDS[:5], "absent.jsonl"], "absent.jsonl: no such file"),
        ([*WORDS, "--drafter", "absent"], "absent"),
    ],
)
def test_wrong_flags_are_one_sentence(folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2) and said in capsys.readouterr().err


def test_transformers_decodes_without_the_settings_of_the_models_folder(folder: Path):
    pytest.importorskip("transformers")
    strict = Path(shutil.copytree("target", "strict"))
    about = json.loads((strict / "generation_config.json").read_text())
    (strict / "generation_config.json").write_text(json.dumps(about | {"repetition_penalty": 9.0, "do_sample": True}))
    models = load_models("strict")
    request = models.request(models.tokenizer.encode_raw("how much is 2 and 3?"), Settings(12))
    (plain,) = generate_plain(models.engine, models.weights, make_requests([request]))
    (theirs,) = load_transformers("strict", models)(make_requests([request]))
    worker = TransformersWorker(PeerSpec("t", "transformers", "strict", {}, 1, 64, 12))
    prompt = PeerPrompt([int(t) for t in request.tokens], list(models.stop_ids))
    assert theirs.tolist() == worker.answer(prompt)["tokens"] == plain.tokens.tolist()
