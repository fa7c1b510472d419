"""`jaxspec evaluate`: rows of all arms, two turns, resumption, checks, refusals."""

import importlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from random_models import write_target

from jaxspec.__main__ import main
from jaxspec.console.cli import EXIT_FAILED
from jaxspec.console.results import jsonable
from jaxspec.data.questions import read_questions
from jaxspec.decoding.seen_tree import SeenTree
from jaxspec.evaluation import machine, side_by_side
from jaxspec.evaluation.metrics import summarize_all
from jaxspec.evaluation.rejected_drafts import behind_path
from jaxspec.evaluation.rows import read_evaluation
from jaxspec.trees import AdaptiveTree, policy_fields, write_tree
from jaxspec.trees.lookup import LookupBranch

evaluate: Any = importlib.import_module("jaxspec.infer.evaluate")

QUESTIONS = [
    {"question_id": 1, "category": "math", "turns": ["how much is 2 and 3?", "and what is one more?"]},
    {"question_id": 2, "category": "math", "turns": ["what does everybody know"]},
    {"question_id": 3, "category": "rag", "turns": ["say it again and again and again"]},
    {"question_id": 4, "category": "rag", "turns": [""]},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("evaluate")
    write_target(home / "target")
    (home / "set.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return home


@pytest.fixture
def folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


WORDS = ["evaluate", "--target", "target", "--prompts", "set.jsonl", "--drafter", "lookup", "--max-new-tokens", "12"]


def test_every_answer_of_every_arm_is_a_sound_row(folder: Path, capsys: pytest.CaptureFixture[str]):
    more = ("--temperature", "0", "1", "--seeds", "0,1", "--batch", "2", "--repeats", "2")
    assert main([*WORDS, *more, "--out", "whole", "--json", "result.json"]) == 0
    said = capsys.readouterr().out
    assert "all invariants hold of" in said and "1 turns could not be read" not in said
    found = read_evaluation("whole")
    # 4 turns that can be read and one that cannot, 2 arms, greedy once and two seeds at temperature 1.
    assert len(found.rows) == (4 + 1) * 2 * 3 and list(found.arms) == ["plain", "lookup:7"]
    assert {(r.id, r.turn) for r in found.rows if not r.error} == {("1", 0), ("1", 1), ("2", 0), ("3", 0)}
    assert {r.error for r in found.rows if r.id == "4"} == {"has `turns` that are not texts"}
    assert all(r.identical for r in found.rows if not r.error) and all(
        len(r.decode_seconds) == 2 for r in found.rows if not r.error
    )
    first, second = (next(r for r in found.rows if (r.id, r.turn, r.arm) == ("1", t, "plain")) for t in (0, 1))
    assert second.prompt_tokens > first.prompt_tokens + first.length  # it holds the first turn and its answer
    result = json.loads(Path("result.json").read_text())
    assert result == json.loads(Path("whole/summary.json").read_text())
    assert result["summary"] == jsonable(summarize_all(found.rows, found.arms))
    assert {(s["task"], s["method"]) for s in result["summary"]} == {
        (task, arm) for task in ("all", "math", "rag") for arm in found.arms
    }
    assert main(["evaluate", "--check", "whole"]) == 0
    drafted = [d for row in found.rows if row.arm == "lookup:7" for d in zip(row.drafted, row.levels, strict=True)]
    assert {(0, 0), (7, 7)} == set(drafted)  # a round looks up seven tokens, or finds nothing
    assert found.asked["1"] == ("1", "math", 2) and found.passes == [(0.0, 0), (1.0, 0), (1.0, 1)]


def test_a_file_that_was_cut_is_partial_and_a_summary_of_other_rows_is_told(folder: Path, capsys):
    assert main([*WORDS, "--out", "cut"]) == 0
    path, summary = Path("cut/rows.jsonl"), Path("cut/summary.json")
    whole, figures = path.read_bytes(), summary.read_text()
    for kept in (1, 3, -2):
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]))
        assert main(["evaluate", "--check", "cut"]) == EXIT_FAILED
        said = capsys.readouterr().err
        assert "is partial" in said and "summary.json" in said
    path.write_bytes(whole)
    summary.write_text(figures.replace('"answers": 4', '"answers": 5'))
    assert main(["evaluate", "--check", "cut/rows.jsonl"]) == EXIT_FAILED
    assert "summary.json: task all, method plain, temperature 0.0: says answers 5 and not 4" in capsys.readouterr().err
    summary.unlink()
    assert main(["evaluate", "--check", "cut"]) == 0


def test_slots_give_the_same_rows_and_latencies(folder: Path):
    assert main([*WORDS, "--slots", "2", "--temperature", "1", "--repeats", "2", "--out", "slots"]) == 0
    assert main([*WORDS, "--temperature", "1", "--out", "batches"]) == 0
    slots, batches = ({r.key: r for r in read_evaluation(f).rows} for f in ("slots", "batches"))
    assert {k: r.tokens for k, r in slots.items()} == {k: r.tokens for k, r in batches.items()}
    for row in slots.values():
        if not row.error:
            assert len(row.own_latency) == 2 and max(row.own_latency) <= max(row.decode_seconds)
            assert row.own_seconds > 0 and row.group_rows == (3 if row.turn == 0 else 1)
    assert main(["evaluate", "--check", "slots"]) == 0


def test_slots_note_groups_and_go_on_behind_the_last_whole_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(side_by_side, "SLOT_TURNS", 1)
    assert main([*WORDS, "--slots", "1", "--out", "grouped"]) == 0
    path = Path("grouped/rows.jsonl")
    whole = read_evaluation("grouped").rows
    groups = list(dict.fromkeys(row.group for row in whole))
    assert len(groups) > 2
    assert main([*WORDS, "--slots", "1", "--out", "grouped"]) == 0  # nothing is left
    assert read_evaluation("grouped").rows == whole
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    assert main([*WORDS, "--slots", "1", "--out", "grouped"]) == 0
    again = read_evaluation("grouped").rows
    assert {row.key: row.tokens for row in again} == {row.key: row.tokens for row in whole}
    kept = [row for row in whole if row.group != whole[-1].group]
    assert again[: len(kept)] == kept


def test_trees_that_differ_under_one_name_are_refused_and_the_same_one_twice_is_one_arm(folder: Path, capsys):
    for name, seconds in (("a", 2.0), ("b", 3.0)):
        tree = AdaptiveTree(None, (1, 8), (1.0, seconds), 0.0, 0.0, rate=1.0, lookup=LookupBranch(7))
        write_tree(f"{name}.json", policy_fields(tree))
    assert main([*WORDS, "--tree", "a.json", "--tree", "b.json", "--out", "named"]) == EXIT_FAILED
    assert "two trees that differ are both called adaptive:lookup:7" in capsys.readouterr().err
    assert main([*WORDS, "--tree", "a.json", "--tree", "a.json", "--limit", "1", "--out", "named"]) == 0
    assert list(read_evaluation("named").arms) == ["plain", "adaptive:lookup:7"]


def test_drafts_behind_a_path_are_the_first_children_below_it():
    """Root 5 with children 6 and 7; 6 has 8 and 9, 9 has 10; the last node is padding."""
    parents, valid = [-1, 0, 0, 1, 1, 4, 2], [True] * 6 + [False]
    tree = SeenTree(*(jnp.array([x]) for x in ([5, 6, 7, 8, 9, 10, 0], parents, valid, [0, 1, 4, 4], [5, 3])))
    assert behind_path(tree, 0) == [6, 8] and behind_path(tree, 1) == [8] and behind_path(tree, 2) == [10]
    beside = tree._replace(path_BP=jnp.array([[0, 2, 2, 2]]))
    assert behind_path(beside, 1) == []  # node 7 has padding below it alone


def test_rejected_drafts_of_the_first_questions_are_kept(folder: Path):
    assert main([*WORDS, "--rejected", "1", "--temperature", "0", "1", "--out", "rejected"]) == 0
    assert main([*WORDS, "--temperature", "0", "1", "--out", "unkept"]) == 0
    kept, unkept = (read_evaluation(name).rows for name in ("rejected", "unkept"))
    assert {r.key: r.tokens for r in kept} == {r.key: r.tokens for r in unkept}
    mine = [r for r in kept if r.arm != "plain" and r.id in ("1", "3") and not r.error]
    assert mine and all(r.rejected == () for r in [*(r for r in kept if r not in mine), *unkept])
    for row in mine:
        assert len(row.rejected) == row.calls
        for number, (accepted, drafts) in enumerate(zip(row.accepted, row.rejected, strict=True)):
            behind = row.tokens[1 + sum(row.emitted[:number]) + accepted :]
            assert accepted + len(drafts) <= 7 and (not drafts or not behind or drafts[0] != behind[0])
    assert any(any(r.rejected) for r in mine) and main(["evaluate", "--check", "rejected"]) == 0


def test_programs_that_are_dropped_between_batches_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert main([*WORDS, "--out", "kept"]) == 0
    monkeypatch.setattr(machine, "CROWDED", 0.0)
    assert main([*WORDS, "--out", "dropped"]) == 0
    kept, dropped = ([(r.key, r.tokens) for r in read_evaluation(name).rows] for name in ("kept", "dropped"))
    assert kept == dropped


def test_a_stopped_run_goes_on_behind_its_last_whole_batch(folder: Path):
    assert main([*WORDS, "--out", "one"]) == 0
    path = folder / "one" / "rows.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept, torn in ((len(lines) - 3, b""), (len(lines) - 2, b'{"id": "1", "ta'), (1, b"")):
        path.write_bytes(b"".join(lines[:kept]) + torn)
        assert main([*WORDS, "--out", "one"]) == 0
        again = read_evaluation("one")
        wanted = [json.loads(line) for line in lines[1:]]
        assert sorted((r.id, r.arm, r.turn, r.tokens) for r in again.rows) == sorted(
            (w["id"], w.get("arm", "plain"), w.get("turn", 0), tuple(w.get("tokens", ()))) for w in wanted
        )


def test_other_flags_and_broken_rows_are_named(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*WORDS, "--out", "two", "--limit", "1"]) == 0
    assert main([*WORDS, "--out", "two", "--limit", "1", "--batch", "2"]) == 1
    assert "batch was 1, is 2" in capsys.readouterr().err
    assert main([*WORDS, "--out", "slotted", "--limit", "1", "--slots", "2"]) == 0
    assert main([*WORDS, "--out", "slotted", "--limit", "1"]) == 1
    assert "slots was 2, is None" in capsys.readouterr().err
    path = folder / "two" / "rows.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[-1])
    lines[-1] = json.dumps(row | {"tokens": [*row["tokens"], 5]})
    path.write_text("\n".join(lines) + "\n")
    assert main(["evaluate", "--check", str(path)]) == 1
    assert "and one by prefill, and has" in capsys.readouterr().err
    head = json.loads(lines[0])
    for broken, told in (
        ([{}], "is not a file of rows"),
        ([[1]], "is not a file of rows"),
        ([{"format": head["format"]}], "its first line has no 'arms'"),
        ([head, {"id": "1", "task": "a", "tokens": 5}], "rows.jsonl:2: 'tokens' is no list"),
    ):
        path.write_text("".join(json.dumps(line) + "\n" for line in broken))
        assert main(["evaluate", "--check", str(path)]) == 1
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("lines", [("2", "3", "4", None), (None, "1", "2", "3")], ids=["last", "first"])
def test_a_line_that_cannot_be_used_takes_no_question_its_id(tmp_path: Path, lines: tuple[str | None, ...]):
    """Such a line has its number for an id, which a question may have too."""
    text = [json.dumps({"question_id": int(n), "turns": ["what?"]}) if n else "{" for n in lines]
    (tmp_path / "q.jsonl").write_text("\n".join(text))
    found = evaluate.check_questions(read_questions(tmp_path / "q.jsonl"))
    assert len({q.prompt.id for q in found}) == 4
    assert [q.prompt.id for q in found if not q.prompt.problem] == [n for n in lines if n]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate"], "--prompts is missing"),
        ([*WORDS[:5], "--rejected", "1"], "--rejected needs a --drafter"),
        ([*WORDS[:5], "--tree", "chain:2"], "--tree needs a --drafter"),
        ([*WORDS, "--tree", "chainsaw"], "chainsaw"),
        ([*WORDS, "--drafter", "lookup"], "--drafter lookup is given twice"),
        ([*WORDS, "--batch", "0"], "batch"),
        ([*WORDS, "--seeds", "a"], "--seeds is 'a'"),
        ([*WORDS, "--slots", "2", "--batch", "2"], "--slots and --batch are two ways"),
        ([*WORDS, "--temperature", "0", "0"], "different temperatures"),
        ([*WORDS, "--timeout", "5"], "--timeout is of an --endpoint"),
        ([*WORDS, "--concurrency", "2"], "--concurrency is of an --endpoint"),
        ([*WORDS, "--model", "m"], "--model is of an --endpoint"),
        ([*WORDS[:5], "--endpoint", "http://localhost:1/v1", "--timeout", "0"], "--timeout is 0.0; it must be above 0"),
        (["evaluate", "--check", "absent"], "absent: no such file"),
        ([*WORDS[:4], "absent.jsonl"], "absent.jsonl: no such file"),
    ],
)
def test_wrong_flags_are_one_sentence(folder: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code in (1, 2) and told in said and said.strip().count("\n") == 0


def test_two_questions_of_one_id_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "twice.jsonl").write_text('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n')
    assert main([*WORDS[:4], "twice.jsonl", *WORDS[5:], "--out", "three"]) == 1
    assert "twice.jsonl:2: prompt 'a': has the id of" in capsys.readouterr().err
