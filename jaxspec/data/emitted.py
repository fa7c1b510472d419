"""Assistant messages from what a target emitted: its thought, its words and its tool calls told apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.messages import Arguments, Message

_CHANNEL = re.compile(r"<\|channel\|>(?P<name>\w+)(?P<about>.*?)<\|message\|>(?P<text>.*?)(?=<\||\Z)", re.DOTALL)
_RECIPIENT = re.compile(r"to=functions\.(?P<name>[\w.-]+)(?P<about>[^<]*)")
_THOUGHT_CHANNEL = re.compile(r"\A\s*<\|channel>thought\n?(?P<thought>.*?)(<channel\|>|\Z)", re.DOTALL)
_THOUGHT = re.compile(r"\A\s*<think>(?P<thought>.*?)(</think>|\Z)\s*", re.DOTALL)
_TAGGED = re.compile(r"<tool_call>(?P<call>.*?)</tool_call>", re.DOTALL)
_FUNCTION = re.compile(r"\A\s*<function=(?P<name>[^>\s]+)>(?P<rest>.*?)(</function>)?\s*\Z", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=(?P<name>[^>\s]+)>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL)
_KEYED = re.compile(r"<arg_key>(?P<name>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL)


def message_of(tokenizer: ChatTokenizer, ids: Sequence[int], *, opened: bool = False, tools: bool = False) -> Message:
    """Returns the message that a server would make of an answer's `ids`, without its stop id.

    `opened` says that the prompt had opened the thought. Calls are looked for where the conversation has `tools`; text
    that is no call in a known form stays text.
    """
    text = tokenizer.decode(ids, skip_special=False)
    plain = tokenizer.decode(ids)
    message: Message = {"role": "assistant"}
    if "<|channel|>" in text or (tools and _RECIPIENT.search(text)):
        thought, content, calls = _harmony(text)
    else:
        thought, content = _split_thought(text, opened)
        # Decoded as a whole where nothing is taken out of it, for decoders that treat a text's beginning by itself.
        content = plain if not thought and content == text else _without_special(tokenizer, content)
        calls = []
    if tools and not calls:
        content, calls = split_calls(content)
    message["content"] = content
    if thought.strip():
        message["reasoning_content"] = _without_special(tokenizer, thought).strip("\n")
    if calls:
        message["tool_calls"] = calls
    return message


def _split_thought(text: str, opened: bool) -> tuple[str, str]:
    """Returns the thought and the rest; a thought without an end is all there is."""
    found = _THOUGHT_CHANNEL.match(text) or _THOUGHT.match(text)
    if found is not None:
        return found["thought"], text[found.end() :]
    if opened:
        thought, _, rest = text.partition("</think>")
        return thought, rest.lstrip("\n")
    return "", text


def _without_special(tokenizer: ChatTokenizer, text: str) -> str:
    for token in tokenizer.tokenizer.get_added_tokens_decoder().values():
        if token.special:
            text = text.replace(token.content, "")
    return text


def _harmony(text: str) -> tuple[str, str, list[dict[str, Any]]]:
    """Returns thought, words and calls of an answer in channels (gpt-oss)."""
    thought, content, calls = [], [], []
    for part in text.split("<|start|>assistant"):
        recipient = _RECIPIENT.search(part)
        for found in _CHANNEL.finditer(part):
            if recipient is not None:
                calls.append(_call(recipient["name"], found["text"]))
            else:
                (thought if found["name"] == "analysis" else content).append(found["text"])
    return "\n".join(thought), "".join(content), [call for call in calls if call is not None]


def split_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Returns the words of an answer and its calls: in `<tool_call>` tags (JSON, Qwen3-Coder's or GLM's), or bare JSON.

    The answer stays as it is where one of its calls cannot be read.
    """
    tagged = [found["call"] for found in _TAGGED.finditer(text)]
    if tagged:
        read = [next((call for form in _FORMS if (call := form(inner)) is not None), None) for inner in tagged]
        return (text, []) if None in read else (_TAGGED.sub("", text).strip(), [c for c in read if c is not None])
    bare = _json_call(text)  # Llama 3.1: the whole answer
    return (text, []) if bare is None else ("", [bare])


def _json_call(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters"))
    return _call(found["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def _tag_call(text: str) -> dict[str, Any] | None:
    found = _FUNCTION.match(text)
    if found is None:
        return None
    return _of_values(found["name"], _PARAMETER.findall(found["rest"]))


def _keyed_call(text: str) -> dict[str, Any] | None:
    name = text.strip().partition("\n")[0].partition("<")[0].strip()
    return _of_values(name, _KEYED.findall(text)) if name.replace("_", "a").replace("-", "a").isalnum() else None


_FORMS: tuple[Callable[[str], dict[str, Any] | None], ...] = (_json_call, _tag_call, _keyed_call)


def _of_values(name: str, values: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """Returns the call of arguments that are written one by one, each as JSON or as bare text."""
    read = {}
    for key, value in values:
        try:
            read[key.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            read[key.strip()] = value
    return _call(name, json.dumps(read, ensure_ascii=False))


def _call(name: str, arguments: str) -> dict[str, Any] | None:
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    return {"type": "function", "function": {"name": name, "arguments": Arguments(values, arguments)}}
