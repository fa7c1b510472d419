"""Reading conversations from JSONL."""

import gzip
import json
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxspec.data.account import Account
from jaxspec.data.conversations import Named, read_all, read_conversations, split_names
from jaxspec.data.messages import Conversation, parse_conversation
from jaxspec.data.prompts import read_prompts
from jaxspec.data.questions import read_questions

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
    assert first._replace(place="") == second._replace(place="") and first.messages == tuple(GOOD["messages"])


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
        ({"txt": "x"}, "line 2: has neither `messages` nor `conversations` nor `text`"),
        ({"messages": []}, "line 2: `messages` must be a non-empty list"),
        ({"messages": [{"role": "user"}]}, "line 2: message 0: `content` must be text"),
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            "message 0: `role` is 'wizard', which is not one of",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "line 2: message 0: `content` must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "has a part of type 'image_url'"),
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


def test_openai_parts_and_its_newer_role_are_read(tmp_path: Path):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    turns = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    (found,) = read_conversations(write(tmp_path / "x.jsonl", {"messages": turns}))
    assert found.messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "h\ni"})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder `chats` of three shards, one a form: two conversations each."""
    folder = tmp_path / "chats"
    folder.mkdir()
    lines = [json.dumps({"id": str(i), "messages": GOOD["messages"]}) for i in range(6)]
    write(folder / "part-0.jsonl", *lines[:2])
    with gzip.open(folder / "part-1.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[2:4]))
    writer = ArrayRecordWriter(str(folder / "part-2.array_record-00000-of-00001"), "group_size:1")
    for line in lines[4:]:
        writer.write(line.encode())
    writer.close()
    (folder / "README.md").write_text("not a shard")
    return folder


def test_a_folder_of_shards_is_read_in_the_order_of_their_names(shards: Path):
    found = read_conversations(shards)
    assert [c.id for c in found] == list("012345") and {c.source for c in found} == {"chats"}
    assert [c.id for c in read_conversations(shards, limit=5)] == list("01234")
    assert [c.id for c in read_conversations(f"{shards}/*.jsonl*")] == list("0123")
    assert read_conversations(shards / "part-1.jsonl.gz")[0].source == "part-1"


def test_what_is_wrong_in_a_shard_is_named(shards: Path):
    writer = ArrayRecordWriter(str(shards / "bad.array_record"), "group_size:1")
    for record in (json.dumps(GOOD), "[1]"):
        writer.write(record.encode())
    writer.close()
    with pytest.raises(ValueError, match=r"bad\.array_record, record 2: expected a JSON object, found list"):
        read_conversations(shards)
    (shards / "bad.array_record").write_bytes(b"not one")
    with pytest.raises(ValueError, match=r"bad\.array_record: not a whole ArrayRecord file"):
        read_conversations(shards)
    packed = (shards / "part-1.jsonl.gz").read_bytes()
    (shards / "part-1.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"part-1\.jsonl\.gz: not a whole gzip file"):
        read_conversations(shards / "part-1.jsonl.gz")
    (shards / "x.jsonl").write_bytes(b'{"text": "a"}\r\n{"text": "\xff"}')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: is not UTF-8 text \(invalid start byte at byte 11\)"):
        read_conversations(shards / "x.jsonl")
    account = Account(skip_bad=True)
    assert [c.text for c in read_conversations(shards / "x.jsonl", account=account)] == ["a"]
    assert account.counts == {"records left out: not UTF-8": 1}
    (shards / "x.txt").write_bytes(b"one\fa\nb\n\xff")
    with pytest.raises(
        ValueError, match=r"x\.txt, text 2: is not UTF-8 text \(invalid start byte at line 3 of it, byte 1\)"
    ):
        read_conversations(shards / "x.txt")
    (shards / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder holds no file that ends in"):
        read_conversations(shards / "empty")


def test_what_a_folder_holds_besides_is_named(shards: Path):
    for name in ("notes.txt", "more.json", ".hidden", "out.jsonl.state"):
        (shards / name).write_text("{}")
    account = Account()
    assert len(read_conversations(shards, account=account)) == 6
    (line,) = account.sentences()
    assert line.startswith(f"3 entries of {shards} that are not read, as they do not end in .jsonl, ")
    assert line.endswith(": README.md, more.json, notes.txt")
    account = Account()
    read_conversations(shards / "part-0.jsonl", account=account)
    assert account.sentences() == []


def test_lines_without_ids_in_several_files_have_ids_of_their_own(tmp_path: Path):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, {"messages": GOOD["messages"]}, "", {"messages": GOOD["messages"]})
    assert [c.id for c in read_conversations(tmp_path)] == ["a.jsonl:1", "a.jsonl:3", "b.jsonl:1", "b.jsonl:3"]
    assert [c.id for c in read_conversations(f"{tmp_path}/a*")] == ["1", "3"]


def test_lines_may_end_as_on_other_systems(tmp_path: Path):
    lines = [json.dumps(GOOD | {"id": i}) for i in "abc"]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
        assert [c.id for c in read_conversations(tmp_path / "x.jsonl")] == ["a", "b", "c"]
        (tmp_path / "x.txt").write_bytes(end.join(("one", "two")).encode())
        assert read_conversations(tmp_path / "x.txt")[0].text == "one\ntwo"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused_whole(tmp_path: Path, encoding: str):
    path, mark = tmp_path / "a.jsonl", "\ufeff" if encoding.endswith("be") else ""
    path.write_bytes((mark + '{"prompt": "a"}\n{"prompt": "b"}\n').encode(encoding))
    for read in (read_conversations, read_prompts, read_questions):
        with pytest.raises(ValueError, match="UTF-16 or UTF-32: save it in UTF-8"):
            read(str(path))


def test_a_text_that_does_not_end_is_said_once(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a}\n')
    (prompt,) = read_prompts(path)
    assert prompt.problem == "is not JSON: Unterminated string starting at column 12"


def test_weights_stand_behind_names():
    assert split_names("a.jsonl, b:c/") == [Named("a.jsonl", None), Named("b:c/", None)]
    assert split_names("a.jsonl:0.7,b:c/:3") == [Named("a.jsonl", 0.7), Named("b:c/", 3.0)]


@pytest.mark.parametrize(
    ("names", "match"),
    [("a:1,b", "gives some a weight and others none"), ("a:1,b:0", "the weight of b is 0"), ("a:1,:2", "no file")],
)
def test_wrong_weights_are_named(names: str, match: str):
    with pytest.raises(ValueError, match=match):
        split_names(names)


@pytest.mark.parametrize("packed", [False, True])
def test_form_feeds_part_the_texts_of_a_file(tmp_path: Path, packed: bool):
    path = tmp_path / ("books.txt.gz" if packed else "books.txt")
    text = "\fOne.\nStill one. \fTwo\f \n\f\fThree"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = read_conversations(path)
    assert [c.text for c in found] == ["One.\nStill one. ", "Two", "Three"]
    assert [c.messages for c in found] == [()] * 3 and len({c.id for c in found}) == 3
    assert [c.text for c in read_conversations(path, limit=2)] == ["One.\nStill one. ", "Two"]


def test_plain_text_stands_in_a_record_too():
    found = parse_conversation({"text": "Words.", "source": "web"}, id="7", source="s")
    assert found == Conversation("7", "web", (), text="Words.")
    for record in ({"text": " "}, {"text": 3}):
        with pytest.raises(ValueError, match="text"):
            parse_conversation(record, id="7", source="s")
