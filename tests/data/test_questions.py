"""Question sets: every file form, turns, tasks, limits."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxspec.data.questions import MT_BENCH, SPEC_BENCH, read_questions


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(question: Any) -> list[str]:
    return [m["content"] for part in (question.prompt.messages, *question.further) for m in part]


def test_spec_benchs_file_has_six_tasks_and_two_turns_in_one(tmp_path: Path):
    categories = [*sorted(MT_BENCH), *sorted(SPEC_BENCH)]
    records = [
        {"question_id": 81 + i, "category": c, "turns": [f"{c}?"] + ["And then?"] * (c in MT_BENCH), "reference": ["r"]}
        for i, c in enumerate(categories * 2)
    ]
    found = read_questions(write(tmp_path / "question.jsonl", records))
    assert {q.task for q in found} == {"mt_bench", *SPEC_BENCH} and found[0].prompt.id == "81"
    assert all(q.turns == 1 + (q.task == "mt_bench") for q in found)
    assert [q.task for q in read_questions(tmp_path / "question.jsonl", limit=1)].count("mt_bench") == 1
    second = found[0].asked(["The answer."])
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    assert second.messages[1]["content"] == "The answer." and len(found[0].asked([]).messages) == 1


def test_categories_of_other_sets_are_their_own(tmp_path: Path):
    records = [{"question_id": "a", "category": c, "sub_category": "x", "turns": ["?"]} for c in ("writing", "rag")]
    assert [q.task for q in read_questions(write(tmp_path / "speed.jsonl", records))] == ["writing", "rag"]


def test_a_user_message_a_turn_is_a_turn_and_a_history_is_none(tmp_path: Path):
    user, assistant = ({"role": role, "content": role} for role in ("user", "assistant"))
    records = [
        {"messages": [user, user, user]},
        {"messages": [user, assistant, user]},
        {"messages": [{"role": "system", "content": "s"}, user, user]},
        {"prompt": "one"},
    ]
    found = read_questions(write(tmp_path / "set.jsonl", records))
    assert [q.turns for q in found] == [3, 1, 2, 1]
    assert len(found[1].prompt.messages) == 3 and len(found[2].prompt.messages) == 2
    assert {q.task for q in found} == {"set"} and texts(found[3]) == ["one"]


def test_lines_that_cannot_be_used_have_a_problem_and_a_place(tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"turns": []}\n{"turns": [1]}\n{"turns": ["ok"]}\nnot json\n{"other": 1}\n')
    found = read_questions(path)
    problems = [q.prompt.problem for q in found]
    assert problems[0] == problems[1] == "has `turns` that are not texts" and not problems[2]
    assert "is not JSON" in problems[3] and "has neither" in problems[4]
    assert found[3].prompt.place == f"{path}:4"


def test_plain_text_has_a_prompt_a_line(tmp_path: Path):
    (tmp_path / "p.txt").write_text("What is two?\n\nAnd three?\n")
    assert [texts(q) for q in read_questions(tmp_path / "p.txt")] == [["What is two?"], ["And three?"]]


def test_parquet_is_read_where_pyarrow_is(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"question_id": "7", "category": "math", "turns": ["one", "two"], "multiturn": True}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    (question,) = read_questions(tmp_path / "test.parquet")
    assert texts(question) == ["one", "two"] and question.task == "math" and question.prompt.id == "7"
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match="is not a parquet file that can be read"):
        read_questions(tmp_path / "bad.parquet")


def test_absent_files_are_named(tmp_path: Path):
    for name in ("absent.jsonl", "absent.parquet"):
        with pytest.raises(ValueError, match=rf"{name}: (no such file|parquet needs pyarrow)"):
            read_questions(tmp_path / name)
