"""`jaxspec bench peers`: processes that answer in turns, equal tokens, settings, failures."""

import importlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import SIZE, random_weights, write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.checkpoints.models import save_drafter
from jaxspec.decoding.generation import generate_plain
from jaxspec.decoding.requests import Request, Settings, make_requests
from jaxspec.drafters import DraftLM, DraftLMConfig
from jaxspec.evaluation import peer_turns
from jaxspec.evaluation.machine import drift_of
from jaxspec.evaluation.peer_processes import PeerProcess, compare_tokens, decode_rate, rate, row_of
from jaxspec.evaluation.peer_turns import GRID, PLAIN, PeerLedger, choose, take_turns
from jaxspec.evaluation.peer_workers import KINDS, PeerPrompt, PeerSpec, TransformersWorker, Worker, serve
from jaxspec.evaluation.peers import load_transformers, readable_folder
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


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch):
    """A machine that is as fast at all times."""
    monkeypatch.setattr(peer_turns, "copy_bandwidth", lambda: 1e10)


def reply(tokens: list[int], seconds: float = 1.0, prefill: float = 0.5, first: int = 1) -> dict:
    counts = {"first": first, "calls": 2, "counted": len(tokens) - 1}
    return {"tokens": tokens, "seconds": seconds, "prefill_seconds": prefill, **counts}


class ToyPeer:
    """Answers with its number, and fails or is interrupted at one of its prompts."""

    def __init__(self, number: int, *, fails_at: int = -1, failure: BaseException | None = None) -> None:
        self.number, self.fails_at, self.failure = number, fails_at, failure
        self.asked: list[PeerPrompt] = []
        self.closed = False

    def ask(self, asked: PeerPrompt) -> dict:
        self.asked.append(asked)
        if len(self.asked) - 1 == self.fails_at and self.failure is not None:
            raise self.failure
        return reply([self.number, *asked.tokens])

    def close(self) -> None:
        self.closed = True


def requests(count: int) -> list[Request]:
    return [Request(np.asarray([number]), Settings(4, stop_ids=(0,))) for number in range(count)]


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
    ends = [f"{name}_{end}" for name in figures for end in ("min", "max")]
    shared = {"version": "1", **dict.fromkeys([*figures, *ends], 1.0), "identical_fraction": 1.0, "near_ties": 0}
    rows = [
        {"peer": "jaxspec plain", "settings": {}, **shared},
        {"peer": "jaxspec HEAD", "settings": {"drafter": "HEAD", "tree": "chain:3"}, **shared},
    ]
    bench_peers.print_result(TOLD | {"rows": rows, "failed": {}})
    lines = capsys.readouterr().out.splitlines()
    assert any("jaxspec HEAD" in line and "chain:3" in line for line in lines)


TOLD = {"target": "tiny", "count": 1, "threads": 2, "repeats": 5, "copy_bandwidth": {"bytes_per_second": [1e9, 1e9]}}


def test_the_table_says_least_and_greatest_few_repeats_and_a_bandwidth_that_moved(capsys: pytest.CaptureFixture[str]):
    row = row_of(
        "a", PeerSpec("a", "jaxspec", "t", {}, 1, 8, 8), {"version": "1"}, [[reply([1, 2], s)] for s in (1, 2, 4)]
    ) | {"x_plain": None, "x_plain_decode": None, "identical_fraction": 1.0, "near_ties": 0}
    assert [row[f"tokens_per_second{end}"] for end in ("", "_min", "_max")] == [1.0, 0.5, 2.0]
    assert [row[f"ttft_ms{end}"] for end in ("", "_min", "_max")] == [500.0] * 3
    bench_peers.print_result(TOLD | {"rows": [row], "failed": {}})
    steady = capsys.readouterr().out
    assert "0.5 to 2" in steady and "1.0 to 1.0 GB/s" in steady
    assert "refused" not in steady and "times to rely on" not in steady
    moved = {"repeats": 3, "copy_bandwidth": {"bytes_per_second": [1e9, 1.2e9]}}
    bench_peers.print_result(TOLD | moved | {"rows": [row], "failed": {}})
    told = capsys.readouterr().out
    assert "1.0 to 1.2 GB/s, 20% apart: over 10%, so ratios are refused" in told
    assert "repeats: 3; times to rely on are medians of 5 or more" in told


def test_ratios_are_refused_where_the_copy_bandwidth_moved():
    moves = [drift_of(figures) for figures in ([], [5.0], [10.0, 10.9], [10.9, 10.0], [10.0, 11.5, 10.0])]
    assert [drift.steady for drift in moves] == [None, None, True, True, False]
    assert [drift.refused for drift in moves] == [False, False, False, False, True]
    assert moves[0].sentence() == moves[1].sentence() == ""


def test_a_peer_that_fails_is_left_out_and_the_others_go_on():
    plain, other, third = ToyPeer(1), ToyPeer(2, fails_at=3, failure=ValueError("no memory")), ToyPeer(3)
    peers, ledger = {PLAIN: plain, "other": other, "third": third}, PeerLedger()
    take_turns(peers, requests(2), {"third": {"tokens": 2}}, ledger, repeats=2)
    assert list(peers) == [PLAIN, "third"] and other.closed and not third.closed
    assert ledger.failed == {"other": "no memory"}
    runs = ledger.passes(list(peers), 2)
    assert [[r["tokens"] for r in run] for run in runs["third"]] == [[[3, 0], [3, 1]]] * 2
    assert len(plain.asked) == len(third.asked) == 2 + 2 * 2 and len(other.asked) == 4
    assert {prompt.settings["tokens"] for prompt in third.asked} == {2}
    assert ledger.drift.moved is not None


def test_plain_decoding_that_fails_ends_the_run():
    with pytest.raises(ValueError, match="jaxspec plain, which all others are held to: it broke"):
        take_turns(
            {PLAIN: ToyPeer(1, fails_at=0, failure=ValueError("it broke"))}, requests(1), {}, PeerLedger(), repeats=1
        )


def test_a_stopped_run_goes_on_behind_its_last_turn(tmp_path: Path):
    path, of = tmp_path / "p.json.partial", str(tmp_path / "p.json")
    stopped = {PLAIN: ToyPeer(1), "other": ToyPeer(2, fails_at=5, failure=KeyboardInterrupt())}
    with pytest.raises(KeyboardInterrupt):
        take_turns(stopped, requests(2), {}, PeerLedger(path, {"repeats": 2}, of), repeats=2)
    known = PeerLedger(path, {"repeats": 2}, of)
    assert sorted(known.turns) == [(0, 0), (0, 1), (1, 0)] and len(known.passes([PLAIN], 2)[PLAIN]) == 1
    goes_on = {PLAIN: ToyPeer(1), "other": ToyPeer(2)}
    take_turns(goes_on, requests(2), {}, known, repeats=2)
    assert [p.tokens for p in goes_on[PLAIN].asked] == [[1], [1]]  # a first turn that is not counted, and the one left
    again = PeerLedger(path, {"repeats": 2}, of)
    runs = again.passes([PLAIN, "other"], 2)
    assert [[r["tokens"] for r in run] for run in runs["other"]] == [[[2, 0], [2, 1]]] * 2
    assert len(again.drift.bytes_per_second) == 3  # the end of the first session is not known
    with pytest.raises(ValueError, match="was begun with other settings"):
        PeerLedger(path, {"repeats": 3}, of)
    again.finish()
    assert not path.exists()


def test_settings_that_were_tried_are_not_tried_again():
    peer, ledger = ToyPeer(1, fails_at=4, failure=KeyboardInterrupt()), PeerLedger()
    with pytest.raises(KeyboardInterrupt):
        choose({"tuned": peer}, "tuned", requests(1), ledger)
    assert [line["settings"] for line in ledger.of("tried")] == GRID[:3]
    peer, peers = ToyPeer(1), {}
    peers["tuned"] = peer
    assert choose(peers, "tuned", requests(1), ledger)["tuned"] in GRID
    assert [prompt.settings for prompt in peer.asked] == [GRID[3], *GRID[3:]]
    failing = {"tuned": ToyPeer(1, fails_at=0, failure=ValueError("no such setting"))}
    assert choose(failing, "tuned", requests(1), PeerLedger()) == {} and not failing
    assert choose({}, "tuned", requests(1), ledger) == {}


def test_the_tokens_of_a_first_call_that_checks_drafts_are_not_decodings():
    # 17 tokens, 9 of them of the first call, and 8 in the second behind it.
    assert decode_rate([reply(list(range(17)), seconds=3.0, prefill=2.0, first=9)]) == 8
    assert decode_rate([reply(list(range(9)), first=9)]) is None


class FailingWorker(Worker):
    """A worker that answers odd prompts alone."""

    def load(self) -> None:
        self.version = "1"

    def answer(self, asked: PeerPrompt) -> dict:
        if asked.tokens[0] % 2 == 0:
            raise RuntimeError("no even\nprompts")
        return reply(asked.tokens)


def test_a_worker_that_cannot_answer_says_why_and_answers_the_next_prompt(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(KINDS, "failing", FailingWorker)
    prompts = "".join(json.dumps({**PeerPrompt([n], [0])._asdict(), "settings": {}}) + "\n" for n in (2, 3))
    told = io.StringIO()
    serve(PeerSpec("x", "failing", "t", {}, 64, 8, 8), io.StringIO(prompts), told)
    _, failed, answered = map(json.loads, told.getvalue().splitlines())
    assert failed == {"failed": "RuntimeError: no even prompts"} and answered["tokens"] == [3]


def test_a_process_that_fails_or_ends_is_one_sentence():
    talk = 'print(\'{{"version": "1"}}\', flush=True); input(); {}'
    spec = PeerSpec("x", "jaxspec", "t", {}, 1, 8, 8)

    def started(then: str) -> PeerProcess:
        return PeerProcess(spec, lambda _: [sys.executable, "-c", talk.format(then)])

    failing, ending = started('print(\'{"failed": "no"}\', flush=True); input()'), started("raise SystemExit(3)")
    with pytest.raises(ValueError, match=r"^no$"):
        failing.ask(PeerPrompt([1], [0]))
    for _ in range(2):
        with pytest.raises(ValueError, match="its process ended with code 3"):
            ending.ask(PeerPrompt([1], [0]))
    failing.close()
    ending.close()


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
        ([*WORDS, "--threads", "0"], "--threads is 0; it must be at least 1"),
        ([*WORDS, "--threads", "-1"], "--threads is -1; it must be at least 1"),
        ([*WORDS, "--threads", "9999"], "--threads is 9999, and this process may use"),
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


def write_draft_lm(folder: Path, *, vocab: int = SIZE) -> str:
    """A random draft LM in a folder of ours; returns its name."""
    module = DraftLM(DraftLMConfig(vocab, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=32))
    save_drafter(folder, "draft_lm", module, random_weights(module, 0.3, 5), {"tree": "chain:3"})
    return str(folder)


def ask_transformers(**settings: Any) -> dict:
    """Returns an answer of transformers on the target, with these settings of its worker."""
    models = load_models("target")
    tokens = models.tokenizer.encode_raw("how much is 2 and 3? how much is 2 and 3? how much is 2 and").tolist()
    worker = TransformersWorker(PeerSpec("t", "transformers", "target", settings, 1, 64, 12))
    return worker.answer(PeerPrompt(tokens, list(models.stop_ids)))


def test_transformers_tells_the_tokens_of_its_first_call(folder: Path):
    pytest.importorskip("transformers")
    plain, assisted = ask_transformers(), ask_transformers(assistant="target")
    assert plain["first"] == 1 and plain["calls"] == len(plain["tokens"])
    assert assisted["tokens"] == plain["tokens"] and assisted["first"] > 1  # the target drafts for itself
    assert assisted["calls"] < plain["calls"] and 0 < assisted["prefill_seconds"] <= assisted["seconds"]
    assert ask_transformers(lookup=3)["tokens"] == plain["tokens"]


def test_a_draft_lm_of_ours_is_an_assistant_of_transformers(folder: Path, tmp_path: Path):
    pytest.importorskip("transformers")
    assisted = ask_transformers(assistant=write_draft_lm(tmp_path / "draft"))
    assert assisted["tokens"] == ask_transformers()["tokens"] and assisted["first"] >= 1


def test_an_lm_that_is_no_assistant_of_the_target_is_refused_before_it_is_asked(folder: Path, tmp_path: Path):
    pytest.importorskip("transformers")
    other = write_draft_lm(tmp_path / "other", vocab=SIZE + 2)
    with pytest.raises(ValueError, match="other: scores 302 tokens, and the target 300: it is for another target"):
        ask_transformers(assistant=other)
    with pytest.raises(ValueError, match="cannot read it: hf is a whole LM's layout, and this is a head"):
        ask_transformers(assistant=str(write_drafter(tmp_path / "head")))
    strange = Path(shutil.copytree("target", tmp_path / "strange"))
    tokenizer = json.loads((strange / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    one, two = list(words)[-2:]
    words[one], words[two] = words[two], words[one]
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="strange: its tokenizer has another vocabulary than the target's"):
        ask_transformers(assistant=str(strange))


def test_transformers_reads_models_in_folders_of_ours(folder: Path, tmp_path: Path):
    with readable_folder("target") as found:
        assert found == Path("target")
    assert main(["export", "target", str(tmp_path / "ours"), "--to", "orbax"]) == 0
    with readable_folder(str(tmp_path / "ours")) as found:
        assert (found / "config.json").is_file() and (found / "tokenizer.json").is_file()
    assert not found.exists()
