"""Tests of the file of answers: what a later run takes for done, whatever has happened to the prompts between."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from jaxspec.data.account import Account
from jaxspec.data.conversations import read_conversations
from jaxspec.data.messages import Conversation
from jaxspec.serving.answer_file import AnswerFile
from jaxspec.serving.dialogue import LENGTH, UNFIT, Dialogue, Reply, hash_asked

SETTINGS = {"temperature": 0.0}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def prompts(folder: Path, *records: object, name: str = "p.jsonl") -> list[tuple[int, Conversation]]:
    """The conversations of a file of these lines, numbered."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines))
    return list(enumerate(read_conversations(folder / name, account=Account(skip_bad=True))))


def asking(*texts: str) -> list[dict[str, list[dict[str, str]]]]:
    return [{"messages": [user(text)]} for text in texts]


def opened(folder: Path) -> AnswerFile:
    return AnswerFile(folder / "out.jsonl", SETTINGS)


def answer(output: AnswerFile, conversations: Sequence[tuple[int, Conversation]], finish: str = "stop") -> None:
    """Adds conversations as they end by `finish`; unfit ones have no answer."""
    for _, conversation in conversations:
        dialogue = Dialogue(conversation, 0.0, {}, {})
        if finish != UNFIT:
            dialogue.take(Reply({"role": "assistant", "content": "a"}, finish == LENGTH, 1))
        output.add([dialogue.finished(finish, "too long" if finish == UNFIT else "")], keep_unfinished=False)


def left(folder: Path, *records: object, **told: object) -> list[str]:
    """The ids that a later run still has to answer."""
    return [c.id for _, c in opened(folder).left(prompts(folder, *records), **told)]  # type: ignore[arg-type]


def test_an_unfit_prompt_that_was_shortened_is_asked_again_and_what_it_was_is_forgotten(tmp_path: Path):
    first = prompts(tmp_path, *asking("long " * 9, "b"))
    answer(output := opened(tmp_path), first[:1], UNFIT)
    assert output.reason("1") == "too long"
    answer(output, first[1:])
    assert left(tmp_path, *asking("long " * 9, "b")) == []
    again = opened(tmp_path)
    todo = again.left(prompts(tmp_path, *asking("long", "b")))
    assert [c.id for _, c in todo] == ["1"] and again.changed == 1
    answer(again, todo)
    assert left(tmp_path, *asking("long", "b")) == []
    assert len(opened(tmp_path).kept) == 2 and not opened(tmp_path).dropped and opened(tmp_path).reason("1") == ""


@pytest.mark.parametrize("finish", ["stop", "calls"])
def test_a_prompt_with_an_answer_that_has_changed_in_any_part_is_refused(tmp_path: Path, finish: str):
    record = {"id": "a", "messages": [user("q"), {"role": "assistant", "content": "x"}, user("r")]}
    answer(opened(tmp_path), prompts(tmp_path, record), finish)
    other_answer = {"id": "a", "messages": [user("q"), {"role": "assistant", "content": "y"}, user("r")]}
    assert left(tmp_path, record) == left(tmp_path, other_answer) == []
    for changed in (
        {"messages": [user("q")]},
        {"messages": [*record["messages"], {"role": "assistant", "content": "x"}, user("s")]},
        {"messages": [{"role": "system", "content": "s"}, *record["messages"]]},
        {"messages": [user("q"), user("r")]},
        {"tools": [{"name": "f"}]},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        with pytest.raises(ValueError, match="holds an answer to another conversation 'a'"):
            left(tmp_path, record | changed)


MOVED = {
    "a blank line at the start": ["", *asking("a", "b", "c")],
    "a bad line at the start": ["{", *asking("a", "b", "c")],
    "a line at the start": asking("n", "a", "b", "c"),
    "a line in the middle": asking("a", "n", "b", "c"),
    "a line taken out": asking("b", "c"),
    "reversed": asking("c", "b", "a"),
}


@pytest.mark.parametrize("moved", MOVED)
@pytest.mark.parametrize("done", [(0, 1, 2), (2,), (1, 2)])
def test_lines_without_ids_that_have_moved_are_not_answered_twice(tmp_path: Path, moved: str, done: tuple[int, ...]):
    first = prompts(tmp_path, *asking("a", "b", "c"))
    answer(opened(tmp_path), [first[i] for i in done])
    with pytest.raises(ValueError, match="give each its own `id`, or another --out"):
        left(tmp_path, *MOVED[moved])


def test_lines_that_are_added_behind_the_others_are_answered(tmp_path: Path):
    answer(opened(tmp_path), prompts(tmp_path, *asking("a", "b")))
    assert left(tmp_path, *asking("a", "b", "", "a")) == ["3", "4"]
    named = [{"id": i, "messages": [user(i)]} for i in "xay"]
    answer(opened(tmp_path), prompts(tmp_path, *named[1:]))
    assert left(tmp_path, *named) == ["x"]


def test_a_shard_whose_conversations_are_now_anothers_is_refused(tmp_path: Path):
    named = [{"id": i, "messages": [user(i)]} for i in "abcd"]
    answer(opened(tmp_path), prompts(tmp_path, *named)[::2])
    now = prompts(tmp_path, {"id": "n", "messages": [user("n")]}, *named)
    others = {c.id for _, c in now[1::2]}
    with pytest.raises(ValueError, match="holds conversation 'a', which is now another shard's"):
        opened(tmp_path).left(now[::2], others)


def test_a_note_without_its_line_and_a_torn_note_say_nothing(tmp_path: Path):
    first = prompts(tmp_path, *asking("a", "b"))
    answer(opened(tmp_path), first)
    (tmp_path / "out.jsonl").write_text((tmp_path / "out.jsonl").read_text()[:-3])
    assert left(tmp_path, *asking("a", "other")) == ["2"]
    answer(opened(tmp_path), first[1:])
    state = tmp_path / "out.jsonl.state"
    state.write_text(state.read_text()[:-3])
    assert left(tmp_path, *asking("a", "b")) == []


def test_files_of_versions_that_noted_less_go_on(tmp_path: Path):
    first = prompts(tmp_path, *asking("a", "b", "c"))
    answer(opened(tmp_path), first[:1])
    answer(opened(tmp_path), first[1:2], LENGTH)
    state = tmp_path / "out.jsonl.state"
    lines = [json.loads(line) for line in state.read_text().splitlines()]
    old = [{n: v for n, v in line.items() if n != "hash"} for line in lines if "kept" not in line]
    state.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert left(tmp_path, *asking("a", "b", "c")) == ["3"]
    with pytest.raises(ValueError, match="under the id '1'"):
        left(tmp_path, "", *asking("a"))
    with pytest.raises(ValueError, match="another conversation '1'"):
        left(tmp_path, *asking("n", "a", "b", "c"))
    state.write_text(state.read_text() + '{"id": "x"}\n')
    with pytest.raises(ValueError, match="the note of 'x' has no 'source'"):
        opened(tmp_path)


def test_ids_of_calls_are_no_part_of_what_is_asked():
    def asked(id: str) -> str:
        calls = [{"id": id, "function": {"name": "f", "arguments": {}}}]
        turns = (user("q"), {"role": "assistant", "content": "", "tool_calls": calls})
        result = {"role": "tool", "content": "2", "tool_call_id": id}
        return hash_asked(Conversation("a", "s", (*turns, result)))

    assert asked("1") == asked("2") != hash_asked(Conversation("a", "s", (user("q"),)))


@pytest.mark.parametrize("first", [0, 1], ids=["here", "served"])
def test_a_servers_answers_and_those_decoded_here_do_not_mix(tmp_path: Path, first: int):
    ways = ({"target_contents": "t"}, {"endpoint_model": "m"})
    output = AnswerFile(tmp_path / "out.jsonl", SETTINGS | ways[first])
    answer(output, prompts(tmp_path, *asking("a")))
    AnswerFile(tmp_path / "out.jsonl", SETTINGS | ways[first])
    with pytest.raises(ValueError, match="endpoint_model was"):
        AnswerFile(tmp_path / "out.jsonl", SETTINGS | ways[1 - first])


def test_a_line_of_something_else_is_named(tmp_path: Path):
    answer(opened(tmp_path), prompts(tmp_path, *asking("a")))
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"id": "9"}\n')
    with pytest.raises(ValueError, match=r"out.jsonl:2: has no 'source'"):
        opened(tmp_path)
