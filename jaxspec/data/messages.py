"""Conversations in one normal form, from the records that people have: OpenAI's and ShareGPT's, in all their spellings.

A message of the normal form is a dict with `role` and the text `content`, and where it has them `reasoning_content`,
`tool_calls` (each with its arguments as `Arguments`), `tool_call_id` and `name`. Whatever a record says besides is
either refused, or listed in `Conversation.unread`.
"""

from __future__ import annotations

import codecs
import json
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT whose text is a call of the assistant's."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
_LOSS = ("weight", "train", "training", "loss", "loss_mask")
_PASSED = ("tool_call_id", "name")
_UNREAD = ("id", "timestamp", "created_at", "model", "metadata", "refusal", "audio", "annotations", "index")
"""Fields of a message that say nothing about the text; they are listed as unread."""
_THOUGHT = re.compile(r"\A\s*<think>(?P<thought>.*?)</think>\s*", re.DOTALL)
_LONE_END = re.compile(r"\A(?P<thought>(?:(?!<think>).)*?)</think>\s*", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRecord(ValueError):
    """A record that cannot be used; `kind` is the sort of fault, by which such records are counted."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


def text_bytes(data: bytes, path: object) -> bytes:
    """Returns the beginning of a file, or all of it, without a mark of UTF-8. Raises ValueError for UTF-16 and -32."""
    # The mark of little-endian UTF-32 begins with that of UTF-16.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise ValueError(f"{path}: is text in UTF-16 or UTF-32: save it in UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def json_fault(error: json.JSONDecodeError) -> str:
    """Returns why a line is no JSON, and where."""
    return f"is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"


def decode_line(line: bytes) -> str:
    """Returns the text of a line, or of a record of several. Raises BadRecord where it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        before = line[: error.start].split(b"\n")
        within = f"line {len(before)} of it, " if len(before) > 1 else ""
        place = f"{within}byte {len(before[-1]) + 1}"
        raise BadRecord("not UTF-8", f"is not UTF-8 text ({error.reason} at {place})") from error


class Arguments(dict):
    """The arguments of a tool call, with the JSON text that they were given as."""

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self.text = text


class StoredAnswer(NamedTuple):
    """An assistant turn as tokens, as its target emitted them."""

    message: int
    """Index of the turn among the messages."""
    answer_ids: tuple[int, ...]
    """The stop id included, where it ended on one."""
    prompt_ids: tuple[int, ...] | None = None
    """The tokens that it answered; None where they were not kept."""


class ReadyTokens(NamedTuple):
    """A conversation that comes as tokens."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    """Which tokens are the assistant's."""


class Conversation(NamedTuple):
    """One conversation of messages in the normal form; or one plain `text`, or `ready` tokens, without messages."""

    id: str
    source: str
    messages: tuple[Message, ...]
    unfinished: bool = False
    """Whether its last answer was cut off, so that it does not end there."""
    text: str | None = None
    """Plain text, for pretraining and for mixing into training; None for a conversation."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of the functions that the assistant may call."""
    variables: Mapping[str, Any] = types.MappingProxyType({})
    """Variables of the chat template, such as `enable_thinking`."""
    learned: tuple[bool, ...] = ()
    """Which messages may be trained on, by the record's own flags; empty: all."""
    stored: tuple[StoredAnswer, ...] = ()
    """Answers as tokens."""
    made_with: Mapping[str, Any] = types.MappingProxyType({})
    """Hashes of the `tokenizer` and others that the stored answers were made with."""
    ready: ReadyTokens | None = None
    unread: tuple[str, ...] = ()
    """Names of fields that are not used."""
    place: str = ""
    """File and line that it was read from."""

    @property
    def is_numbered(self) -> bool:
        """Returns whether its id is the number of its line."""
        return bool(self.place) and self.id.rpartition(":")[2] == self.place.rpartition(" ")[2]

    @property
    def name(self) -> str:
        """The subject of a sentence about it."""
        named = f"conversation {self.id!r} of {self.source}"
        return f"{self.place}: {named}" if self.place else named


def parse_conversation(record: object, *, id: str, source: str) -> Conversation:
    """Returns the conversation of a JSON value; `id` and `source` are used if it names none.

    Raises BadRecord, naming message and field, where it is malformed or holds what has no place in the normal form.
    """
    if not isinstance(record, dict):
        raise BadRecord("not an object", f"expected a JSON object, found {type(record).__name__}")
    _check_text(record)
    fields = {name: value for name, value in record.items() if value is not None}
    named = (str(fields.pop("id", id)), str(fields.pop("source", source)))
    if "input_ids" in fields:
        ready = _ready(fields.pop("input_ids"), fields.pop("loss_mask", None))
        return Conversation(*named, (), ready=ready, unread=tuple(fields))
    if fields.get("is_preformatted"):
        raise BadRecord(
            "preformatted text",
            "`text` is preformatted (`is_preformatted`), so its turns cannot be told apart: give `messages`",
        )
    if "text" in fields and not {"messages", "conversations", "prompt"} & fields.keys():
        text = fields.pop("text")
        if not isinstance(text, str) or not text.strip():
            raise BadRecord("empty", "`text` is empty" if isinstance(text, str) else "`text` must be text")
        return Conversation(*named, (), text=text, unread=tuple(fields))
    messages, learned, unread = _messages(fields)
    stored = _stored(fields.pop("answers", []), messages)
    if fields.get("tools") and fields.get("functions"):
        raise BadRecord("tools", "has both `tools` and `functions`, its older name: keep one")
    described = [fields.pop(name) for name in ("tools", "functions") if name in fields]
    tools, variables = _tools(next(filter(None, described), [])), _mapping(fields.pop("chat_template_kwargs", {}))
    unfinished = fields.pop("finish", None) == "length"
    made_with = _mapping(fields.pop("made_with", {}))
    for name in ("tokens", "temperature", "sampling"):  # figures of `jaxspec regenerate` about its answers
        fields.pop(name, None)
    return Conversation(
        *named, messages, unfinished, None, tools, variables, learned, stored, made_with, None, (*fields, *unread)
    )


def to_record(conversation: Conversation) -> dict[str, Any]:
    """Returns a conversation of messages as the JSON value that `parse_conversation` reads it from."""
    c = conversation
    record: dict[str, Any] = {"id": c.id, "source": c.source, "messages": [dict(m) for m in c.messages]}
    for message, learned in zip(record["messages"], c.learned, strict=False):
        if not learned:
            message["train"] = False
    if c.tools:
        record["tools"] = [dict(tool) for tool in c.tools]
    if c.variables:
        record["chat_template_kwargs"] = dict(c.variables)
    if c.stored:
        record["answers"] = [
            {"message": a.message, "answer_ids": list(a.answer_ids)}
            | ({} if a.prompt_ids is None else {"prompt_ids": list(a.prompt_ids)})
            for a in c.stored
        ]
    if c.made_with:
        record["made_with"] = dict(c.made_with)
    return record


def _messages(fields: dict[str, Any]) -> tuple[tuple[Message, ...], tuple[bool, ...], list[str]]:
    """Takes the messages out of a record; returns them, which may be learned, and the fields that are not read."""
    name = next((n for n in ("messages", "conversations", "prompt") if n in fields), None)
    if name is None:
        raise BadRecord("no messages", "has neither `messages` nor `conversations` nor `text`")
    given = fields.pop(name)
    if name == "prompt" and not isinstance(given, list):
        if not isinstance(given, str):
            raise BadRecord("content", "`prompt` must be text, or a list of messages")
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise BadRecord("no messages", f"`{name}` must be a non-empty list")
    unread: list[str] = []
    read = [_message(message, i, unread) for i, message in enumerate(given)]
    texts = [fields.pop(n) for n in ("system", "system_prompt") if isinstance(fields.get(n), str)]
    system = [text for text in dict.fromkeys(texts) if text.strip()]
    if len(system) > 1:
        raise BadRecord("two system prompts", "has a `system` and another `system_prompt`: keep one of them")
    if system:
        if read[0][0]["role"] == "system" and read[0][0]["content"] != system[0]:
            raise BadRecord("two system prompts", "has a `system` text and another system message: keep one of them")
        if read[0][0]["role"] != "system":
            read.insert(0, ({"role": "system", "content": system[0]}, True))
    messages = [message for message, _ in read]
    # Templates know `developer` under its older name, and as the first message alone.
    if messages[0]["role"] == "developer":
        messages[0] = messages[0] | {"role": "system"}
    learned = [flag for _, flag in read]
    return tuple(messages), () if all(learned) else tuple(learned), unread


def _message(given: object, index: int, unread: list[str]) -> tuple[Message, bool]:
    """Returns a message in the normal form, and whether it may be learned; adds the fields it does not read."""
    if not isinstance(given, dict):
        raise BadRecord("malformed message", f"message {index}: expected a JSON object, found {type(given).__name__}")
    left = {name: value for name, value in given.items() if value is not None}
    for one, other in (("role", "from"), ("content", "value")):
        if one in left and other in left:
            raise BadRecord("malformed message", f"message {index}: has both `{one}` and `{other}`: keep one")
    role = left.pop("role", left.pop("from", None))
    if role in _CALLS:
        value = left.pop("content", left.pop("value", ""))
        message: Message = {"role": "assistant", "content": "", "tool_calls": _calls(value, index)}
        return message, _rest_of(left, index, unread)
    if not isinstance(role, str) or role not in _ROLES:
        field, known = ("from" if "from" in given else "role"), ", ".join((*_ROLES, *_CALLS))
        raise BadRecord("unknown role", f"message {index}: `{field}` is {role!r}, which is not one of {known}")
    message = {"role": _ROLES[role]}
    calls = left.pop("tool_calls", None) or [left.pop(n) for n in ("function_call",) if left.get(n)]
    thoughts = {n: _text(left.pop(n), n, index) for n in _REASONING if n in left}
    value = left.pop("content", left.pop("value", None))
    content, parts = _content(value, index, calls or thoughts or message["role"] == "assistant")
    thoughts |= parts
    if message["role"] == "assistant":
        content, thoughts = _inline_thought(content, thoughts)
    message["content"] = content
    _add_thought(message, thoughts, index)
    if calls:
        if message["role"] != "assistant":
            raise BadRecord("tool calls", f"message {index}: `tool_calls` stands on a turn of role {message['role']}")
        message["tool_calls"] = _calls(calls, index)
    message |= {n: _text(left.pop(n), n, index) for n in _PASSED if n in left}
    return message, _rest_of(left, index, unread)


def _rest_of(left: dict[str, Any], index: int, unread: list[str]) -> bool:
    """Returns whether a message may be learned, by the fields that are left of it; adds those it does not read."""
    learned = _loss_flag({n: left.pop(n) for n in _LOSS if n in left}, index)
    for name in list(left):
        # A field may be part of the turn, as a thought under another name is; so an unknown one is not passed over.
        if name not in _UNREAD and left[name] not in ("", [], {}):
            raise BadRecord("unknown field", f"message {index}: has a field `{name}`, which is not known: take it out")
        unread.append(f"messages.{name}")
    return learned


def _content(value: object, index: int, may_lack: object) -> tuple[str, dict[str, str]]:
    """Returns the text of a message and the thoughts among its parts; parts are joined as servers join them."""
    if value is None and may_lack:
        return "", {}
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, list):
        raise BadRecord("content", f"message {index}: `content` must be text, or a list of parts")
    texts, thoughts = [], []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning") and isinstance(part.get(kind, part.get("text")), str):
            thoughts.append(part.get(kind, part.get("text")))
        else:
            shown = part if kind is None else kind
            raise BadRecord(
                "content", f"message {index}: `content` has a part of type {shown!r}; only text can be learned from"
            )
    return "\n".join(texts), {"content": "\n".join(thoughts)} if thoughts else {}


def _inline_thought(content: str, thoughts: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Takes a thought in tags out of the beginning of an answer."""
    # A lone end tag is left where the prompt had opened the block.
    found = _THOUGHT.match(content) or _LONE_END.match(content)
    if found is None:
        return content, thoughts
    return content[found.end() :], thoughts | {"<think>": found["thought"]}


def _add_thought(message: Message, thoughts: dict[str, str], index: int) -> None:
    """Sets `reasoning_content`. Raises BadRecord where two spellings disagree, or a turn of others has a thought."""
    said = {name: text for name, text in thoughts.items() if text.strip()}
    if len({text.strip() for text in said.values()}) > 1:
        raise BadRecord("reasoning", f"message {index}: {' and '.join(said)} hold different thoughts: keep one")
    if said and message["role"] != "assistant":
        raise BadRecord("reasoning", f"message {index}: a turn of role {message['role']} has {next(iter(said))}")
    if said:
        message["reasoning_content"] = next(iter(said.values()))


def _calls(given: object, index: int) -> list[dict[str, Any]]:
    """Returns tool calls in OpenAI's form, their arguments as `Arguments`."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise BadRecord("tool calls", f"message {index}: its call is not JSON: {given[:40]!r}") from None
    calls = given if isinstance(given, list) else [given]
    return [_call(call, index) for call in calls]


def _call(given: object, index: int) -> dict[str, Any]:
    function = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord("tool calls", f"message {index}: a tool call names no function: {str(given)[:60]}")
    arguments = function.get("arguments", function.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    try:
        values = json.loads(text) if text.strip() else {}
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise BadRecord(
            "tool calls", f"message {index}: the arguments of {function['name']} are no JSON object: {text[:60]!r}"
        )
    kept = {"id": given["id"]} if isinstance(given.get("id"), str) else {}
    return kept | {"type": "function", "function": {"name": function["name"], "arguments": Arguments(values, text)}}


def _loss_flag(flags: dict[str, object], index: int) -> bool:
    """Returns whether a message may be learned. Raises BadRecord for flags that are no truth value, or disagree."""
    for name, value in flags.items():
        if value not in (0, 1):  # True and False are equal to these
            raise BadRecord("loss flag", f"message {index}: `{name}` is {repr(value)[:40]}; it must be true or false")
    if len({bool(value) for value in flags.values()}) > 1:
        raise BadRecord("loss flag", f"message {index}: {' and '.join(flags)} contradict each other: keep one")
    return all(map(bool, flags.values()))


def _stored(given: object, messages: Sequence[Message]) -> tuple[StoredAnswer, ...]:
    """Returns the answers that a record holds as tokens. Raises BadRecord where one is not of an assistant turn."""
    found = []
    answers: list[Any] = given if isinstance(given, list) else [given]
    for answer in answers:
        at = answer.get("message") if isinstance(answer, dict) else None
        if not isinstance(at, int) or not (0 <= at < len(messages) and messages[at]["role"] == "assistant"):
            raise BadRecord(
                "stored answers", f"`answers` has an entry that is of no assistant turn: {str(answer)[:60]}"
            )
        ids, prompt = _ids(answer.get("answer_ids"), "answer_ids"), answer.get("prompt_ids")
        found.append(StoredAnswer(at, ids, None if prompt is None else _ids(prompt, "prompt_ids")))
    return tuple(found)


def _ready(ids: object, mask: object) -> ReadyTokens:
    tokens = _ids(ids, "input_ids")
    flags = mask if isinstance(mask, list) else []
    if len(flags) != len(tokens) or not tokens or any(flag not in (0, 1) for flag in flags):
        raise BadRecord("ready tokens", "`loss_mask` must have a 0 or 1 for each of `input_ids`")
    return ReadyTokens(tokens, tuple(map(bool, flags)))


def _ids(value: object, name: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [None]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise BadRecord("token ids", f"`{name}` must be a list of token ids")
    return tuple(ids)  # type: ignore[arg-type]


def _tools(given: object) -> tuple[Mapping[str, Any], ...]:
    """Returns the tools of a record, which may be JSON text."""
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else []
        except ValueError:
            raise BadRecord("tools", "`tools` is text that is not JSON") from None
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise BadRecord("tools", "`tools` must be a list of descriptions of functions")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in given)


def _mapping(given: object) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise BadRecord("template variables", "`chat_template_kwargs` must be an object of names and values")
    return given


def _text(value: object, field: str, index: int) -> str:
    if not isinstance(value, str):
        raise BadRecord("content", f"message {index}: `{field}` must be text")
    return value


def _check_text(value: object) -> None:
    """Raises BadRecord for text that cannot be encoded: half of a surrogate pair, as cut JSON escapes leave it."""
    if isinstance(value, str):
        found = _SURROGATE.search(value)
        if found:
            half = f"\\u{ord(found[0]):04x}"
            raise BadRecord("broken text", f"holds half of a surrogate pair ({half}), which is no character: mend it")
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_text(name)
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)
