"""`jaxspec evaluate --endpoint`: streams, what each server says of its rounds, outages, and what is asked again."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_toys import ACCEPTED, DRAFTED, ROUNDS, TOKENS, Server, answers, served_words, summary

from jaxspec.__main__ import main
from jaxspec.serving.endpoint import RequestFailed
from jaxspec.serving.streaming_client import _Heard


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def words(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return served_words(server)


def test_a_servers_acceptance_is_what_its_counters_gain_over_each_task(server: Server, words: list[str]):
    server.drafts, server.accepted = 100, 100  # of others, before
    assert main(words) == 0
    result = json.loads(Path("r.json").read_text())
    assert result["server_version"] == "0.99" and result["model"] == "m"
    a, b = result["summary"]
    assert (a["task"], a["drafts"], a["answers"], b["drafts"], b["answers"], b["failed"]) == ("a", 6, 2, 3, 1, 0)
    for row in (a, b):
        assert row["acceptance_length"] == pytest.approx(1 + ACCEPTED / ROUNDS) and row["acceptance_from"] == "counters"
        assert row["survival"] == pytest.approx([2 / 3, 0]) and row["acceptance_rate"] == pytest.approx(1 / 3)
        assert row["tau_micro"] == row["tau_macro"] == pytest.approx((TOKENS - 1) / ROUNDS)
        assert row["tau_raw"] == pytest.approx(1 + ACCEPTED / ROUNDS)
    rows = answers()
    assert [r["text"] for r in rows if r["id"] == "1"] == ["1 1 1 ", "3 3 3 "]  # the second turn holds the first answer
    assert rows[0]["tokens"] == [5, 6] * 3 and rows[0]["count"] == 6 and len(rows[0]["chunk_seconds"]) == 3
    assert server.asked[0]["temperature"] == 0 and server.asked[0]["stream_options"] == {"include_usage": True}


def test_the_summary_has_the_keys_that_scripts_read_and_null_where_nothing_is_known(words: list[str]):
    assert main([*words, "--temperature", "0", "0.7", "--seeds", "0,1"]) == 0
    found = summary()
    assert [(row["task"], row["temperature"], row["seed"]) for row in found] == [
        (task, temperature, seed) for temperature, seed in ((0, 0), (0.7, 0), (0.7, 1)) for task in "ab"
    ]
    for row in found:
        assert row["method"] == "served" and row["tokens_per_second"] > 0 and row["tau_macro"] is not None
        assert [row[name] for name in ("speedup", "efficiency", "identical_fraction")] == [None] * 3


def test_tau_is_that_of_the_counters_where_answers_tell_nothing_and_all_were_answered(
    server: Server, words: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server, "kind", "vllm of old")
    assert main(words) == 0
    for row in summary():
        assert row["tau_micro"] == pytest.approx((TOKENS - 1) / ROUNDS) and row["tau_macro"] is row["tau_raw"] is None
    server.fault, server.faulty = "error", ("three",)
    assert main([*words, "--out", "other"]) == 1  # drafts of an answer that broke off are among the counters
    assert [row["tau_micro"] is None for row in summary()] == [False, True]


def test_a_stopped_run_asks_for_the_sittings_that_are_left(server: Server, words: list[str], capsys):
    assert main(words) == 0
    path, whole = Path("out/served.jsonl"), summary()
    asked, lines = len(server.asked), path.read_bytes().splitlines(keepends=True)
    assert main(words) == 0
    assert len(server.asked) == asked and summary() == whole
    path.write_bytes(b"".join(lines[:-1]))  # what its counters gained is not there, so its answers do not count
    assert main(["evaluate", "--check", "out"]) == 1
    assert "of a sitting that was stopped" in capsys.readouterr().err
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


@pytest.mark.parametrize("kind", ["sglang", "llama.cpp"])
def test_acceptance_is_read_from_answers_where_a_server_shows_no_counters(server: Server, words: list[str], kind: str):
    server.kind, server.shows_counters = kind, False
    assert main(words) == 0
    for row in summary():
        assert row["acceptance_from"] == "answers" and row["drafts"] == ROUNDS * row["answers"]
        assert row["acceptance_length"] == pytest.approx(1 + ACCEPTED / ROUNDS)
        assert row["acceptance_rate"] == pytest.approx(ACCEPTED / DRAFTED)
        assert row["tau_micro"] == pytest.approx((TOKENS - 1) / ROUNDS)
        assert row["survival"] == (pytest.approx([2 / 3]) if kind == "sglang" else None)
        assert row["gauge_acceptance_length"] == (3.0 if kind == "sglang" else None)  # the mean of its two ranks
        assert row["gauge_acceptance_rate"] == (0.5 if kind == "sglang" else None)
    assert main(["evaluate", "--check", "out/served.jsonl"]) == 0


def test_a_server_that_shows_nothing_has_times_alone(
    server: Server, words: list[str], capsys: pytest.CaptureFixture[str]
):
    server.kind, server.shows_counters = "other", False
    assert main(words) == 0
    assert "shows no counters" in capsys.readouterr().out
    first = summary()[0]
    assert first["acceptance_length"] is first["tau_micro"] is first["acceptance_from"] is None
    assert first["tokens_per_second"] > 0 and first["ttft_ms"] > 0


@pytest.mark.parametrize(("strict", "refused"), [("by name", 1), ("silent", 2)])
def test_a_server_that_refuses_fields_beyond_openais_is_asked_without_them_once(
    server: Server, words: list[str], strict: str, refused: int
):
    server.kind, server.strict = "other", strict
    assert main(words) == 0
    fields = [("return_token_ids" in body, "return_spec_tokens_details" in body) for body in server.asked]
    assert fields == [(True, True), (True, False)][:refused] + [(False, False)] * 3
    assert summary()[0]["answers"] == 2


def test_a_prompts_own_fault_costs_no_field(server: Server, words: list[str]):
    server.kind, server.fault, server.faulty = "sglang", "status 400", ("one",)
    assert main(words) == 1
    assert [row["answers"] for row in summary()] == [0, 1] and summary()[1]["tau_micro"] is not None
    assert server.asked[-1]["return_spec_tokens_details"]


OUTAGES = {
    "status 503": "status 503",
    "status 500": "status 500",
    "status 429": "status 429",
    "status 408": "status 408",
    "hangs up": "disconnected",
    "error": "out of memory",
    "cut": "finish_reason ''",
    "finish abort": "finish_reason 'abort'",
    "garbage": "a chunk is not JSON",
}


@pytest.mark.parametrize("fault", OUTAGES)
def test_what_a_server_fails_is_asked_again_by_the_same_command(
    server: Server, words: list[str], fault: str, capsys: pytest.CaptureFixture[str]
):
    server.fault = fault
    assert main(words) == 1
    said = capsys.readouterr().err
    assert (
        "3 of 3 turns have no answer" in said and "the same command asks them again" in said and OUTAGES[fault] in said
    )
    assert [(row["answers"], row["failed"], row["unanswered"]) for row in summary()] == [(0, 0, 2), (0, 0, 1)]
    assert not answers()
    server.fault, asked = "", len(server.asked)
    assert main(words) == 0
    assert len(server.asked) == asked + 3
    assert [(row["answers"], row["failed"], row["unanswered"]) for row in summary()] == [(2, 0, 0), (1, 0, 0)]
    assert main(words) == 0 and len(server.asked) == asked + 3


def test_an_outage_costs_no_answer_and_a_second_turn_follows_the_noted_first(
    server: Server, words: list[str], capsys: pytest.CaptureFixture[str]
):
    server.fault, server.faulty = "status 503", ("two",)
    assert main(words) == 1
    assert [(r["id"], r["turn"]) for r in answers()] == [("1", 0), ("2", 0)]
    before = answers()
    server.fault, asked = "", len(server.asked)
    capsys.readouterr()
    assert main(words) == 0
    assert "note:" not in capsys.readouterr().err
    assert answers()[:2] == before and [(r["id"], r["turn"]) for r in answers()[2:]] == [("1", 1)]
    (body,) = server.asked[asked:]
    assert [m["content"] for m in body["messages"]] == ["one", "1 1 1 ", "two"]
    a = summary()[0]
    assert (a["drafts"], a["answers"], a["uncounted"], a["unanswered"]) == (2 * ROUNDS, 2, 0, 0)
    assert main(["evaluate", "--check", "out"]) == 0


def test_a_server_that_is_not_there_leaves_the_file_as_it_was(
    server: Server, words: list[str], capsys: pytest.CaptureFixture[str]
):
    server.fault, server.faulty = "status 503", ("three",)
    assert main(words) == 1
    noted = Path("out/served.jsonl").read_bytes()
    server.shutdown()
    server.server_close()
    assert main([*words, "--model", "m"]) == 1
    assert Path("out/served.jsonl").read_bytes() == noted
    said = capsys.readouterr().err
    assert "1 of 3 turns have no answer" in said and "does not answer: is the server up?" in said


def test_a_server_that_was_started_again_loses_its_counters_and_no_answer(server: Server, words: list[str]):
    server.drafts = server.accepted = 100
    server.fault, server.faulty = "restart", ("two",)
    assert main(words) == 0
    a, b = summary()
    assert (a["answers"], a["uncounted"], a["acceptance_from"]) == (2, 0, "answers")  # no sitting of it was counted
    assert (b["answers"], b["uncounted"], b["acceptance_from"]) == (1, 0, "counters")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("status 400", "status 400"),
        ("status 422", "status 422"),
        ("too long", "too long"),
        ("finish content_filter", "content_filter"),
    ],
)
def test_a_prompt_that_is_refused_is_a_row_with_its_reason_and_exit_1(
    server: Server, words: list[str], fault: str, told: str, capsys: pytest.CaptureFixture[str]
):
    server.fault = fault
    assert main(words) == 1
    rows = answers()
    assert len(rows) == 2 and told in rows[0]["error"] and not rows[0]["text"]  # no second turn without a first
    said = capsys.readouterr().err
    assert "2 of 3 turns failed for good: out/served.jsonl says why" in said and "no answer" not in said
    asked = len(server.asked)
    assert main(words) == 1 and len(server.asked) == asked


def test_counts_that_cannot_be_are_told_as_they_are_written_and_fail_the_run(
    server: Server, words: list[str], capsys: pytest.CaptureFixture[str]
):
    server.fault, server.faulty = "miscounts", ("three",)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "note: task b: 1 things that the server says cannot be" in said and "turn 0: accepts 2 of 1" in said
    assert len(answers()) == 3 and main(["evaluate", "--check", "out"]) == 1


def test_a_line_that_is_no_question_is_a_failed_row_and_is_not_asked(server: Server, words: list[str]):
    with Path("set.jsonl").open("a") as file:
        file.write(json.dumps({"id": "3", "category": "b", "turns": [7]}) + "\n")
    assert main(words) == 1
    assert [(row["answers"], row["failed"]) for row in summary()] == [(2, 0), (1, 1)] and len(server.asked) == 3


def test_a_refusal_of_all_requests_ends_the_run_and_keeps_what_was_answered(
    server: Server, words: list[str], capsys: pytest.CaptureFixture[str]
):
    lines = [{"id": str(i), "category": "a", "turns": [f"q{i}"]} for i in range(3)]
    Path("set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    server.fault, server.faulty = "status 401", ("q1",)
    assert main(words) == 1
    assert "check the key" in capsys.readouterr().err and [r["id"] for r in answers()] == ["0"]
    server.fault = ""
    assert main(words) == 0
    a = summary()[0]
    assert [r["id"] for r in answers()] == ["0", "1", "2"] and (a["drafts"], a["uncounted"]) == (2 * ROUNDS, 1)


@pytest.mark.parametrize(
    ("kind", "passes"),
    [("status 400", False), ("status 451", False), ("unfit", False), ("finish tool_calls", False)]
    + [(kind, True) for kind in ("status 429", "status 500", "status 529", "status 307", "connection", "timeout")],
)
def test_failures_that_may_pass_are_those_of_the_server_and_not_of_the_prompt(kind: str, passes: bool):
    assert RequestFailed(kind, "").passes == passes


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
