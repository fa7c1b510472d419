"""Stock chat templates of model families: prompts are the server's, loss lies on what is emitted, rows join and split.

The templates are those that the package trl carries (`pip install --no-deps trl`).
"""

import importlib.util
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_toys import write_byte_folder

from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.messages import Arguments, BadRecord, Conversation, StoredAnswer, parse_conversation
from jaxspec.data.turns import AGAINST, EMPTY, FORGOTTEN, Encoded, TurnEncoder, TurnOptions

FOUND = importlib.util.find_spec("trl")
if FOUND is None or FOUND.origin is None:
    pytest.skip("the package trl is not installed", allow_module_level=True)
TEMPLATES = Path(FOUND.origin).parent / "chat_templates"
STOPS = {
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|> <|eom_id|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_6": "<|im_end|>",
    "qwen3_8": "<|im_end|>",
    "glm4moe": "<|endoftext|> <|user|> <|observation|>",
    "gptoss": "<|return|> <|call|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "nemotron_3_nano": "<|im_end|>",
    "gemma3": "<end_of_turn>",
    "gemma4_v5": "<turn|>",
    "phi3": "<|end|>",
}
"""The stop tokens of each family; the first is its `eos_token`."""
THINKING = ("qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8", "glm4moe", "nemotron_3_nano", "gemma4_v5")
"""Families that think unless they are told not to."""
UNSHOWN = ("deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "llama3", "phi3", "gemma3")
"""Families that refuse or drop some of the cases."""
MODES = [*((family, "on") for family in STOPS), *((family, "off") for family in THINKING)]
CONTROL = re.compile(
    r"<[|｜][^<>{}\s]*?[|｜]>|</?think>|<(?:start|end)_of_turn>|<\|(?:turn|channel)>|<(?:turn|channel)\|>"
)
TOOLS = ({"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},)
OFF = {"enable_thinking": False}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, thought: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"reasoning_content": thought} if thought else {})


def call(thought: str = "") -> dict[str, Any]:
    function = {"name": "f", "arguments": Arguments({"x": 1}, '{"x": 1}')}
    return answer("", thought) | {"tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}]}


RESULT = {"role": "tool", "content": "T1", "tool_call_id": "abcdefghi", "name": "f"}
CASES = {
    "one": [user("U1"), answer("A1")],
    "one thought": [user("U1"), answer("A1", "R1")],
    "two": [user("U1"), answer("A1"), user("U2"), answer("A2")],
    "two thoughts": [user("U1"), answer("A1", "R1"), user("U2"), answer("A2", "R2")],
    "call": [user("U1"), call(), RESULT, answer("A1")],
    "call thoughts": [user("U1"), call("R1"), RESULT, answer("A1", "R2")],
    "two answers": [user("U1"), answer("A1"), answer("A2")],
    "empty": [user("U1"), answer(""), user("U2"), answer("A2")],
}
XML = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
JSON_CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
THOUGHT = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>{}<|return|>"
HARMONY_CALL = ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>'
EMITTED = {
    ("llama3", "two", "on"): [["A1<|eot_id|>", "A2<|eot_id|>"]],
    ("llama3_1", "call", "on"): [['{"name": "f", "parameters": {"x": 1}}<|eot_id|>', "A1<|eot_id|>"]],
    ("qwen2_5", "two", "on"): [["A1<|im_end|>", "A2<|im_end|>"]],
    ("qwen2_5", "call", "on"): [[f"{JSON_CALL}<|im_end|>", "A1<|im_end|>"]],
    ("qwen3_instruct_2507", "two", "on"): [["A1<|im_end|>", "A2<|im_end|>"]],
    ("qwen3", "two thoughts", "on"): [
        ["<think>\nR1\n</think>\n\nA1<|im_end|>"],
        ["<think>\nR2\n</think>\n\nA2<|im_end|>"],
    ],
    ("qwen3", "two", "off"): [["A1<|im_end|>"], ["A2<|im_end|>"]],
    ("qwen3", "call thoughts", "on"): [
        [f"<think>\nR1\n</think>\n\n{JSON_CALL}<|im_end|>", "<think>\nR2\n</think>\n\nA1<|im_end|>"]
    ],
    ("qwen3_5_think", "two thoughts", "on"): [["R1\n</think>\n\nA1<|im_end|>"], ["R2\n</think>\n\nA2<|im_end|>"]],
    ("qwen3_5_think", "two", "off"): [["A1<|im_end|>"], ["A2<|im_end|>"]],
    ("qwen3_6", "call thoughts", "on"): [[f"R1\n</think>\n\n{XML}<|im_end|>", "R2\n</think>\n\nA1<|im_end|>"]],
    ("qwen3_8", "two thoughts", "on"): [["R1\n</think>\n\nA1<|im_end|>", "R2\n</think>\n\nA2<|im_end|>"]],
    ("glm4moe", "two thoughts", "on"): [
        ["\n<think>R1</think>\nA1<|user|>"],
        ["\n<think>R2</think>\nA2<|user|>"],
    ],
    ("glm4moe", "two", "off"): [["\nA1<|user|>", "\nA2<|user|>"]],
    ("glm4moe", "call thoughts", "on"): [
        [
            "\n<think>R1</think>\n<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
            "<|observation|>",
            "\n<think>R2</think>\nA1<|user|>",
        ]
    ],
    ("gptoss", "one", "on"): [[FINAL.format("A1")]],
    ("gptoss", "two thoughts", "on"): [
        [THOUGHT.format("R1") + FINAL.format("A1")],
        [THOUGHT.format("R2") + FINAL.format("A2")],
    ],
    ("gptoss", "call thoughts", "on"): [
        [THOUGHT.format("R1") + HARMONY_CALL, THOUGHT.format("R2") + FINAL.format("A1")]
    ],
    ("nemotron_3_nano", "two thoughts", "on"): [["R1\n</think>\nA1<|im_end|>"], ["R2\n</think>\nA2<|im_end|>"]],
    ("nemotron_3_nano", "two", "off"): [["A1<|im_end|>", "A2<|im_end|>"]],
    ("gemma3", "two", "on"): [["A1<end_of_turn>", "A2<end_of_turn>"]],
    ("gemma4_v5", "one thought", "on"): [["<|channel>thought\nR1\n<channel|>A1<turn|>"]],
    ("phi3", "two", "on"): [["A1<|end|>", "A2<|end|>"]],
    ("qwen2_5", "empty", "on"): [["A2<|im_end|>"]],
    ("llama3", "two answers", "on"): [["A1<|eot_id|>", "A2<|eot_id|>"]],
}
"""Texts under loss, a list a row, by family, case and whether thinking is on; from the families' own documents."""


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    found = {}
    for family, named in STOPS.items():
        text, stops = (TEMPLATES / f"{family}.jinja").read_text(), named.split()
        folder = write_byte_folder(tmp_path_factory.mktemp(family), sorted({*CONTROL.findall(text), *stops}))
        (folder / "chat_template.jinja").write_text(text)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": stops[0]}))
        ids = [ChatTokenizer.load(folder).tokenizer.token_to_id(stop) for stop in stops]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        found[family] = ChatTokenizer.load(folder)
    return found


def encoded(chat: ChatTokenizer, messages: list[dict[str, Any]], *, off: bool = False, **options: Any) -> Encoded:
    """A conversation's rows, with tools where it has calls."""
    tools = TOOLS if any("tool_calls" in m for m in messages) else ()
    c = Conversation("c", "s", tuple(messages), tools=tools, variables=OFF if off else {})
    encoder = TurnEncoder(chat, TurnOptions(**options))
    return encoder.tokenize([encoder.render(c)], 1 << 30)[0]


def under_loss(chat: ChatTokenizer, made: Encoded) -> list[list[str]]:
    """The texts under loss, a list a row."""
    texts = []
    for row in made.rows:
        runs = itertools.groupby(
            zip(row.tokens.tolist(), row.assistant_mask.tolist(), strict=True), lambda pair: pair[1]
        )
        texts.append([chat.decode((t for t, _ in run), skip_special=False) for mine, run in runs if mine])
    return texts


@pytest.mark.parametrize(("family", "case", "thinking"), EMITTED, ids=" ".join)
def test_loss_lies_on_what_the_family_emits(chats: dict[str, ChatTokenizer], family: str, case: str, thinking: str):
    made = encoded(chats[family], CASES[case], off=thinking == "off")
    assert under_loss(chats[family], made) == EMITTED[family, case, thinking]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("family", "thinking"), MODES)
def test_prompts_are_those_that_transformers_renders(
    chats: dict[str, ChatTokenizer], family: str, case: str, thinking: str
):
    """Every answer under loss stands behind exactly the tokens of a server's prompt for the messages before it."""
    render: Any = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    chat, messages, variables = chats[family], CASES[case], {} if thinking == "on" else OFF
    try:
        made = encoded(chat, messages, off=thinking == "off")
    except BadRecord as error:
        assert family in UNSHOWN, error
        return
    prompts = []
    for i in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
        (text,), _ = render(
            conversations=[messages[:i]],
            tools=list(TOOLS) if "call" in case else None,
            chat_template=chat.template.text,
            add_generation_prompt=True,
            **dict(chat.special_tokens),
            **variables,
        )
        prompts.append(chat.encode(text).tolist())
    for row in made.rows:
        begins = np.flatnonzero(np.diff(row.assistant_mask.astype(int), prepend=0) == 1)
        assert len(begins) and all(row.tokens[:at].tolist() in prompts for at in begins)


def test_thoughts_that_contradict_the_variables_are_left_out_or_decide_them(chats: dict[str, ChatTokenizer]):
    for family in ("qwen3", "qwen3_5_think", "qwen3_6", "glm4moe"):
        chat = chats[family]
        for case, off in (("two", False), ("two thoughts", True)):
            made = encoded(chat, CASES[case], off=off)
            assert not made.rows and made.counts[AGAINST] == 2
        # By the record: a thought thinks, and none does not.
        assert under_loss(chat, encoded(chat, CASES["two"], thinking="record")) == under_loss(
            chat, encoded(chat, CASES["two"], off=True)
        )
        assert under_loss(chat, encoded(chat, CASES["two thoughts"], thinking="record")) == under_loss(
            chat, encoded(chat, CASES["two thoughts"])
        )


def test_thoughts_that_a_template_does_not_know_are_counted(chats: dict[str, ChatTokenizer]):
    made = encoded(chats["qwen2_5"], CASES["two thoughts"])
    assert made.counts[FORGOTTEN] == 2 and under_loss(chats["qwen2_5"], made) == [["A1<|im_end|>", "A2<|im_end|>"]]
    assert encoded(chats["qwen2_5"], CASES["empty"]).counts[EMPTY] == 1


@pytest.mark.parametrize(
    ("family", "messages", "part"),
    [
        ("llama3", CASES["call"], "tool calls"),
        ("phi3", CASES["call"], "tool calls"),
        ("qwen3", [user("U"), {"role": "developer", "content": "D"}, answer("A")], "role developer in later place"),
        ("gptoss", [user("U"), answer("A"), {"role": "system", "content": "S"}, user("V"), answer("B")], "role system"),
    ],
)
def test_parts_that_a_template_drops_without_a_word_are_named(
    chats: dict[str, ChatTokenizer], family: str, messages: list[dict[str, Any]], part: str
):
    with pytest.raises(BadRecord, match=f"the chat template drops .*{part}.* without a word"):
        encoded(chats[family], messages)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_6", "gptoss", "glm4moe", "deepseek_r1_distill"])
def test_stored_ids_give_the_rows_of_their_texts(chats: dict[str, ChatTokenizer], family: str):
    """And they serve templates that never show a thought."""
    chat, messages = chats[family], CASES["two thoughts"]
    first = chat.encode_prompt(messages[:1]).tolist()
    if family == "deepseek_r1_distill":
        ids = [chat.encode(f"R{n}\n</think>\n\nA{n}<｜end▁of▁sentence｜>").tolist() for n in (1, 2)]
    else:
        texts = [text for row in under_loss(chat, encoded(chat, messages)) for text in row]
        ids = [chat.encode(text).tolist() for text in texts]
    stored = (StoredAnswer(1, tuple(ids[0]), tuple(first)), StoredAnswer(3, tuple(ids[1])))
    encoder = TurnEncoder(chat)
    c = Conversation("c", "s", tuple(messages), stored=stored, made_with=chat.fingerprint)
    made = encoder.tokenize([encoder.render(c)], 1 << 30)[0]
    assert [row.tokens[row.assistant_mask].tolist() for row in made.rows] == ids
    assert made.rows[0].tokens.tolist() == first + ids[0]
    if family != "deepseek_r1_distill":
        expected = encoded(chat, messages).rows
        assert [row.tokens.tolist() for row in made.rows] == [row.tokens.tolist() for row in expected]


words = st.text(max_size=12).map(str.strip).filter(lambda text: text and "<" not in text and "｜" not in text)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talk=st.lists(st.tuples(words, words, words), min_size=1, max_size=3), thoughts=st.booleans())
@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "qwen3", "qwen3_8", "glm4moe", "gptoss"])
def test_joined_rows_carry_the_loss_of_the_separate_ones(
    chats: dict[str, ChatTokenizer], family: str, talk: list[tuple[str, str, str]], thoughts: bool
):
    """Of random Unicode: each prefix of the conversation, learned by its last turn alone, gives one of the answers."""
    messages, off = [], not thoughts and family in ("qwen3", "qwen3_8", "glm4moe")
    for asked, said, thought in talk:
        messages += [user(asked), answer(said, thought if thoughts else "")]
    whole = under_loss(chats[family], encoded(chats[family], messages, off=off))
    alone = [
        under_loss(chats[family], encoded(chats[family], messages[:end], off=off, last_turn_only=True))[0][0]
        for end in range(2, len(messages) + 1, 2)
    ]
    assert [text for row in whole for text in row] == alone


def test_arguments_are_mappings_or_text_as_the_template_wants_them(chats: dict[str, ChatTokenizer]):
    """One template iterates over them, the other concatenates them as text; both get what they can show."""
    record = {"messages": [user("U"), {"role": "assistant", "content": None, "tool_calls": CALLS}]}
    messages = parse_conversation(record, id="1", source="s").messages
    assert "<parameter=x>\n1\n</parameter>" in chats["qwen3_6"].render(messages)
    assert '{"x":1}' in chats["deepseekv3"].render(messages)


CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}]
