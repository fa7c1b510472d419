"""Reading conversations from JSONL."""

import json
from pathlib import Path

import pytest

from jaxspec.data.conversations import read_all, read_conversations

GOOD = {
    "id": "a",
    "source": "s",
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
}


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_messages_and_sharegpt_give_the_same_conversation(tmp_path: Path):
    share = {
        "id": "a",
        "source": "s",
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}],
    }
    first, second = read_conversations(write(tmp_path / "x.jsonl", GOOD, "", share))
    assert first == second and first.messages == tuple(GOOD["messages"])


def test_id_and_source_default_to_line_and_file(tmp_path: Path):
    path = write(tmp_path / "talks.jsonl", "", {"messages": GOOD["messages"]})
    assert read_conversations(path)[0][:2] == ("2", "talks")


def test_a_conversation_cut_at_its_budget_is_unfinished(tmp_path: Path):
    path = write(tmp_path / "x.jsonl", *(GOOD | more for more in ({}, {"finish": "stop"}, {"finish": "length"})))
    assert [c.unfinished for c in read_conversations(path)] == [False, False, True]


def test_limit_stops_before_lines_behind_it_are_read(tmp_path: Path):
    assert len(read_conversations(write(tmp_path / "x.jsonl", GOOD, "{broken"), limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{broken", "line 2: "),
        ([1], "line 2: expected a JSON object, found list"),
        ({"text": "x"}, "line 2: has neither `messages` nor `conversations`"),
        ({"messages": []}, "line 2: `messages` must be a non-empty list"),
        ({"messages": [{"role": "user"}]}, "line 2: message 0: `content` must be text"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "line 2: message 0: role 'wizard' is not one of"),
        ({"conversations": [{"from": "bard", "value": "x"}]}, "line 2: message 0: `from` is 'bard'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, match: str):
    with pytest.raises(ValueError, match=match):
        read_conversations(write(tmp_path / "x.jsonl", GOOD, line))


def test_a_missing_or_empty_file_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no conversation"):
        read_conversations(write(tmp_path / "x.jsonl", ""))


def test_several_files_are_read_one_after_another_each_up_to_the_limit(tmp_path: Path):
    first = write(tmp_path / "first.jsonl", *({**GOOD, "id": i} for i in "abc"))
    second = write(tmp_path / "second.jsonl", *({**GOOD, "id": i} for i in "xyz"))
    assert [c.id for c in read_all(f"{first}, {second}", limit=2)] == ["a", "b", "x", "y"]
    assert read_all(str(first)) == read_conversations(first)


def test_file_names_that_are_missing_are_refused(tmp_path: Path):
    first = write(tmp_path / "first.jsonl", GOOD)
    with pytest.raises(ValueError, match="names no file before or behind a comma"):
        read_all(f"{first},")
    with pytest.raises(ValueError, match=r"second\.jsonl: no such file"):
        read_all(f"{first},{tmp_path}/second.jsonl")
