"""The normal form of conversations: every spelling that people have, and a sentence for what has no place in it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizer_toys import CHATML_TOKENS, write_byte_folder

from jaxspec.data.account import SKIPPED, Account
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import read_conversations
from jaxspec.data.corpus import tokenize_conversations
from jaxspec.data.messages import BadRecord, parse_conversation, to_record
from jaxspec.data.turns import AGAINST, CUT, EMPTY, NO_ROOM, NO_USER, NOT_ASKED, OFF

LEFT_OUT = (EMPTY, NO_USER, OFF, AGAINST, NO_ROOM, NOT_ASKED)
"""What is counted about answers that are not trained on."""
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def parse(*messages: Any, **fields: Any) -> Any:
    return parse_conversation({"messages": list(messages), **fields}, id="1", source="s")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"from": "human", "value": "q"}, U),
        ({"from": "gpt", "value": "a"}, A),
        ({"role": "assistant", "content": None}, A | {"content": ""}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            U | {"content": "a\nb"},
        ),
        ({"from": "observation", "value": "r"}, {"role": "tool", "content": "r"}),
        ({"role": "ipython", "content": "r", "name": "f"}, {"role": "tool", "content": "r", "name": "f"}),
        ({"role": "developer", "content": "d"}, {"role": "system", "content": "d"}),
        ({"role": "assistant", "content": "a", "tool_calls": None, "refusal": None}, A),
    ],
)
def test_roles_and_contents_in_all_spellings(given: dict[str, Any], read: dict[str, Any]):
    assert parse(given).messages == (read,)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_has_one_name_whatever_it_is_called(name: str):
    expected = A | {"reasoning_content": "why"}
    assert parse(U, A | {name: "why"}).messages[1] == expected
    assert parse(U, A | {"content": "<think>why</think>\n\na"}).messages[1] == expected
    assert parse(U, A | {"content": "why</think>a"}).messages[1] == expected  # the prompt had opened it
    assert parse(U, A | {"content": [{"type": "thinking", "thinking": "why"}, "a"]}).messages[1] == expected
    assert parse(U, A | {name: "why", "content": "<think>why</think>a"}).messages[1] == expected
    with pytest.raises(BadRecord, match="hold different thoughts"):
        parse(U, A | {name: "why", "content": "<think>because</think>a"})


@pytest.mark.parametrize(
    "given",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ],
)
def test_calls_have_one_form(given: dict[str, Any]):
    message = parse(U, given).messages[1]
    (call,) = message["tool_calls"]
    assert (message["content"], call["type"], call["function"]) == (
        "",
        "function",
        {"name": "f", "arguments": {"x": 1}},
    )
    assert json.loads(call["function"]["arguments"].text) == {"x": 1}


def test_tools_system_texts_variables_and_loss_flags_are_kept():
    c = parse(
        U, A | {"weight": 0}, U, A | {"train": True}, tools='[{"name": "f"}]', system="s", chat_template_kwargs={"v": 1}
    )
    assert c.tools == ({"type": "function", "function": {"name": "f"}},) and c.variables == {"v": 1}
    assert parse(U, A, functions=[{"name": "f"}], tools=[]).tools == c.tools
    assert c.messages[0] == {"role": "system", "content": "s"} and c.learned == (True, True, False, True, True)
    again = parse_conversation(json.loads(json.dumps(to_record(c))), id="1", source="s")
    assert (again.messages, again.tools, again.learned) == (c.messages, c.tools, c.learned)


@pytest.mark.parametrize(
    ("messages", "fields", "sentence"),
    [
        ([{"role": "wizard", "content": "x"}], {}, "message 0: `role` is 'wizard', which is not one of"),
        ([U, A | {"answer": "x"}], {}, "message 1: has a field `answer`, which is not known: take it out"),
        ([{"role": "user", "content": None}], {}, "message 0: `content` must be text"),
        ([U | {"content": [{"type": "image_url"}]}], {}, "a part of type 'image_url'; only text can be learned from"),
        ([U | {"tool_calls": [CALL]}], {}, "message 0: `tool_calls` stands on a turn of role user"),
        (
            [U, A | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            {},
            "arguments of f are no JSON object",
        ),
        ([U, A | {"weight": 0.5}], {}, "message 1: `weight` is 0.5; it must be true or false"),
        ([U, A | {"weight": 0, "train": True}], {}, "weight and train contradict each other"),
        ([U | {"content": "bad \ud83d"}], {}, r"half of a surrogate pair (\ud83d)"),
        ([U, A], {"tools": "{"}, "`tools` is text that is not JSON"),
        ([U, A], {"tools": [{"name": "f"}], "functions": [{"name": "f"}]}, "has both `tools` and `functions`"),
        ([U, A], {"chat_template_kwargs": 3}, "must be an object of names and values"),
        ([{"role": "system", "content": "a"}, U], {"system": "b"}, "another system message: keep one"),
        ([U, A], {"answers": [{"message": 0, "answer_ids": [1]}]}, "is of no assistant turn"),
        ([U, A], {"answers": [{"message": 1, "answer_ids": [-1]}]}, "`answer_ids` must be a list of token ids"),
        ([U, A], {"answers": [{"message": 1, "answer_ids": [2**70]}]}, "`answer_ids` must be a list of token ids"),
        ([{"role": "user", "from": "gpt", "content": "x"}], {}, "message 0: has both `role` and `from`: keep one"),
    ],
)
def test_what_has_no_place_is_refused_by_name(messages: list[Any], fields: dict[str, Any], sentence: str):
    with pytest.raises(BadRecord) as refused:
        parse(*messages, **fields)
    assert sentence in str(refused.value) and refused.value.kind


def test_records_of_tokens_are_taken_as_they_are():
    c = parse_conversation({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, id="1", source="s")
    assert c.ready == ((5, 6, 7), (False, True, True))
    for record in ({"input_ids": [1, 2]}, {"input_ids": [1], "loss_mask": [2]}, {"text": "x", "is_preformatted": True}):
        with pytest.raises(BadRecord):
            parse_conversation(record, id="1", source="s")


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_bad_records_are_named_with_the_flag_that_skips_them_and_then_counted_by_kind(tmp_path: Path):
    lines = (
        {"messages": [U, A], "score": 3},
        {"messages": [{"role": "wizard", "content": "x"}]},
        "{",
        {"messages": []},
    )
    path = write(tmp_path / "x.jsonl", *lines)
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: .*'wizard'.* \(--skip-bad leaves such records out\)"):
        read_conversations(path)
    account = Account(skip_bad=True)
    assert len(read_conversations(path, account=account)) == 1
    kinds = {kind.removeprefix(SKIPPED): n for kind, n in account.counts.items() if kind.startswith(SKIPPED)}
    assert kinds == {"unknown role": 1, "not JSON": 1, "no messages": 1} and account.skipped == 3
    assert "1 records with the field score, which is not read" in account.sentences()
    assert any("line 2: message 0" in line for line in account.sentences())


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"messages": [U, A]}).encode() + b"\n")
    assert read_conversations(path)[0].messages == (U, A)


def odd_record(draw: random.Random) -> Any:
    """A record of the kinds above, whole or broken in one of many ways, perhaps none of a record at all."""
    texts = [
        "hi",
        "",
        " ",
        "日本語 🙂",
        "<think>t</think>x",
        "t</think>x",
        "<|im_end|>",
        "\ud83d",
        None,
        7,
        ["a"],
        [{"type": "text"}],
    ]
    roles = ["user", "assistant", "system", "tool", "developer", "human", "gpt", "wizard", None, 3, "function_call"]
    extra = {
        "tool_calls": [[CALL], [], None, "x", [{}], [{"function": {"name": "f", "arguments": "["}}]],
        "reasoning_content": ["r", "", 5],
        "weight": [0, 1, 2, "no"],
        "name": ["n", 4],
        "colour": ["red"],
    }

    def message() -> Any:
        if draw.random() < 0.05:
            return draw.choice([None, "text", 3, []])
        made = {
            draw.choice(["role", "from"]): draw.choice(roles),
            draw.choice(["content", "value"]): draw.choice(texts),
        }
        for name, values in extra.items():
            if draw.random() < 0.15:
                made[name] = draw.choice(values)
        return made

    if draw.random() < 0.08:
        return draw.choice(
            ["{", "[1]", "null", '"x"', "[" * 3000, json.dumps({"text": 3}), json.dumps({"prompt": "p"})]
        )
    alternating = [dict(U), dict(A)] * draw.randint(1, 3)
    messages = alternating if draw.random() < 0.4 else [message() for _ in range(draw.randint(0, 5))]
    if draw.random() < 0.3 and messages:
        messages[draw.randrange(len(messages))] = message()
    record: dict[str, Any] = {draw.choice(["messages", "conversations"]): messages}
    for name, values in {
        "tools": [[], "[]", "{", [3], None],
        "system": ["s", "", 4],
        "finish": ["length", "stop"],
        "chat_template_kwargs": [{}, {"enable_thinking": True}, 3],
        "answers": [[{"message": 1, "answer_ids": [1, 2]}], [{}], 3],
        "score": [1],
    }.items():
        if draw.random() < 0.12:
            record[name] = draw.choice(values)
    return record


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(write_byte_folder(tmp_path_factory.mktemp("chatml"), CHATML_TOKENS), "chatml")


@pytest.mark.parametrize("seed", range(6))
def test_of_odd_records_every_one_is_learned_or_accounted_for(chat: ChatTokenizer, tmp_path: Path, seed: int):
    """Fifty records a seed: none ends in another error than a sentence, and every answer is trained on or counted."""
    draw = random.Random(seed)
    path = write(tmp_path / "odd.jsonl", *(odd_record(draw) for _ in range(50)))
    account = Account(skip_bad=True)
    read = read_conversations(path, account=account)
    parsed = len(read)
    assert parsed + account.skipped == 50
    corpus = tokenize_conversations(read, chat, length=64, account=account)
    skipped_later = account.skipped - (50 - parsed)
    answers = sum(m["role"] == "assistant" for c in read for m in c.messages)
    kept = [c for c in read if c.id in set(corpus.ids)]
    dropped = answers - sum(m["role"] == "assistant" for c in kept for m in c.messages)
    left_out = sum(account.counts.get(kind, 0) for kind in LEFT_OUT)
    runs = 0
    for document in corpus.read(range(len(corpus.ids))):
        runs += int((document.assistant_mask[1:] & ~document.assistant_mask[:-1]).sum() + document.assistant_mask[0])
    # A conversation that a template refuses goes with all its answers; it is counted as a record.
    assert skipped_later == len(read) - len({c.id for c in kept}) or account.counts[CUT]
    assert runs == answers - left_out - dropped
    for c in read:
        assert parse_conversation(json.loads(json.dumps(to_record(c))), id=c.id, source=c.source).messages == c.messages


def test_without_skipping_the_first_odd_record_is_one_sentence(chat: ChatTokenizer, tmp_path: Path):
    draw = random.Random(99)
    for number in range(100):
        path = write(tmp_path / f"{number}.jsonl", odd_record(draw))
        try:
            tokenize_conversations(read_conversations(path), chat, length=64)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, error


@pytest.mark.parametrize(
    ("record", "sentence"),
    [({"text": 5}, "`text` must be text"), ({"prompt": 5}, "`prompt` must be text, or a list of messages")],
)
def test_a_field_of_another_type_is_named(record: dict[str, Any], sentence: str):
    with pytest.raises(BadRecord, match=sentence):
        parse_conversation(record, id="1", source="s")


def test_ids_that_the_tokenizer_does_not_have_are_refused(chat: ChatTokenizer, tmp_path: Path):
    stored = {"messages": [U, A], "answers": [{"message": 1, "answer_ids": [10**6]}], "made_with": chat.fingerprint}
    for record in ({"input_ids": [1, 10**6], "loss_mask": [0, 1]}, stored):
        path = write(tmp_path / "ids.jsonl", record)
        with pytest.raises(ValueError, match=r"ids\.jsonl, line 1: .*holds the token id 1,000,000, and the"):
            tokenize_conversations(read_conversations(path), chat, length=64)


def test_ids_of_an_unknown_tokenizer_are_used_where_they_are_the_text(chat: ChatTokenizer):
    """A server tells no tokenizer."""
    right = [*chat.encode("a").tolist(), chat.tokenizer.token_to_id("<|im_end|>")]
    for ids, expected in ((right, right), ([9, 9], right)):
        c = parse(U, A, answers=[{"message": 1, "answer_ids": ids}], made_with={"model": "m"})
        corpus = tokenize_conversations([c], chat, length=64)
        assert corpus.tokens[corpus.assistant_mask].tolist() == expected


def test_tools_that_a_template_does_not_show_are_named(chat: ChatTokenizer):
    with pytest.raises(ValueError, match="the chat template drops descriptions of tools without a word"):
        tokenize_conversations([parse(U, A, tools=[{"name": "f"}])], chat, length=64)


def test_a_message_that_is_a_call_has_the_fields_that_others_have():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    asked = {"from": "human", "value": "go"}
    found = parse_conversation({"conversations": [asked, call | {"train": False}]}, id="1", source="s")
    assert found.learned == (True, False)
    by_content = {"role": "tool_call", "content": call["value"]}
    found = parse_conversation({"messages": [{"role": "user", "content": "go"}, by_content]}, id="1", source="s")
    assert found.messages[1]["tool_calls"][0]["function"]["name"] == "f"
    with pytest.raises(BadRecord, match="message 1: has a field `mood`, which is not known"):
        parse_conversation({"conversations": [asked, call | {"mood": "glad"}]}, id="1", source="s")


@pytest.mark.parametrize("names", [("system", "system_prompt"), ("system_prompt", "system")])
def test_of_two_system_fields_the_one_with_text_counts_and_two_texts_are_refused(names: tuple[str, str]):
    turns = {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "gone"}]}
    found = parse_conversation({**turns, names[0]: " ", names[1]: "Be nice"}, id="1", source="s")
    assert found.messages[0] == {"role": "system", "content": "Be nice"}
    parse_conversation({**turns, names[0]: "Be nice", names[1]: "Be nice"}, id="1", source="s")
    with pytest.raises(BadRecord, match="keep one of them"):
        parse_conversation({**turns, names[0]: "Be quick", names[1]: "Be nice"}, id="1", source="s")
