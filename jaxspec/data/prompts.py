"""Prompts in files: JSON Lines of texts or conversations, or plain text with one prompt a line."""

import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.messages import Message, decode_line, json_fault, parse_conversation, text_bytes
from jaxspec.data.shown import ShownContent


class Prompt(NamedTuple):
    """A prompt that a target is to answer."""

    id: str
    messages: tuple[Message, ...]
    """The conversation before the turn to be written."""
    problem: str = ""
    """Why it cannot be answered; empty if it can."""
    settings: Mapping[str, Any] = types.MappingProxyType({})
    """Settings of its own, some of `SETTINGS`."""
    source: str = ""
    """The source that its line names."""
    place: str = ""
    """`FILE:LINE` of a prompt from a file."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of the functions that the assistant may call."""
    variables: Mapping[str, Any] = types.MappingProxyType({})
    """Variables of the chat template."""
    unread: tuple[str, ...] = ()
    """Names of fields of its line that are not used."""

    @property
    def name(self) -> str:
        """The subject of a sentence about it: its place, if it has one, and its id."""
        return f"{self.place}: prompt {self.id!r}" if self.place else f"prompt {self.id!r}"


SETTINGS = {
    "max_new_tokens": int,
    "temperature": (int, float),
    "top_k": int,
    "top_p": (int, float),
    "draft_temperature": (int, float),
    "seed": int,
    "stop_ids": list,
}
"""Settings that a line may hold -> the types of their values."""


def text_prompt(id: str, text: str) -> Prompt:
    """Returns a prompt of one user turn."""
    problem = "" if text.strip() else "is empty"
    return Prompt(id, ({"role": "user", "content": text},), problem)


def read_prompts(path: str | Path, *, limit: int | None = None) -> list[Prompt]:
    """Returns the prompts of a file in file order, at most `limit` of them.

    Lines of JSON are `{"id"?, "prompt"}` or `{"id"?, "messages"}` (or ShareGPT's `conversations`), and may hold
    `SETTINGS` too. Assistant turns at the end are dropped, so that the target never sees a data set's answers. Any
    other file holds one prompt a line. `id` defaults to the line number; blank lines are skipped. A line that cannot be
    used becomes a prompt with a `problem`. Raises ValueError if there is no such file, or nothing in it.
    """
    path = Path(path)
    if not path.is_file():
        lacking = "is a folder; name one of its files" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {lacking}; give JSON Lines, or plain text with one prompt a line")
    text = text_bytes(path.read_bytes(), path)
    lines = [(str(n), line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: holds no prompt")
    is_json = path.suffix in (".jsonl", ".json") or lines[0][1].lstrip().startswith(b"{")
    return [_prompt_of(line, n, is_json)._replace(place=f"{path}:{n}") for n, line in lines[:limit]]


def _prompt_of(line: bytes, id: str, is_json: bool) -> Prompt:
    try:
        text = decode_line(line)
    except ValueError as error:
        return Prompt(id, (), str(error))
    return parse_prompt(text, id) if is_json else text_prompt(id, text.strip())


def refuse_same_ids(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the prompts, with a `problem` where an earlier one has the id: answers are told apart by it."""
    places: dict[str, str] = {}
    found = []
    for prompt in prompts:
        # A line that cannot be used has its number for an id, by which nobody asks for it.
        first = prompt.place if prompt.problem else places.setdefault(prompt.id, prompt.place)
        taken = f"has the id of {first}: give each its own"
        found.append(prompt if first == prompt.place else prompt._replace(problem=taken))
    return found


def parse_prompt(line: str, id: str) -> Prompt:
    """Returns the prompt of one line of JSON; `id` is used if the line names none."""
    try:
        record = json.loads(line)
        fields = record if isinstance(record, dict) else {}
        id = id if fields.get("id") is None else str(fields["id"])
        settings = own_settings(fields)
        c = parse_conversation(record, id=id, source="")
    except json.JSONDecodeError as error:
        return Prompt(id, (), json_fault(error))
    except RecursionError:
        return Prompt(id, (), "is not JSON that can be read: it is nested too deeply")
    except ValueError as error:
        return Prompt(id, (), f"is malformed: {error}")
    messages = drop_answers(c.messages)
    empty = "is empty" if isinstance(fields.get("prompt"), str) else "has no user turn"
    if not fields.keys() & {"prompt", "messages", "conversations"}:
        empty = "has no user turn: a line has `prompt`, a text, or `messages`"
    problem = "" if any(m["role"] == "user" and m["content"].strip() for m in messages) else empty
    unread = tuple(name for name in c.unread if name not in SETTINGS)
    return Prompt(c.id, messages, problem, settings, c.source, "", c.tools, c.variables, unread)


def own_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a line; raises ValueError for a value of the wrong type."""
    found = {name: record[name] for name in SETTINGS if name in record}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, SETTINGS[name]):
            raise ValueError(f"{name} is {value!r}")
    stops = found.get("stop_ids", [])
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in stops):
        raise ValueError(f"stop_ids is {stops!r}, not a list of token ids")
    return found


def drop_answers(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Returns `messages` without the assistant turns at their end."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return tuple(messages[:end])


def encode_prompt(prompt: Prompt, tokenizer: ChatTokenizer, *, raw: bool = False) -> np.ndarray:
    """Returns int32 [L]: the prompt in the chat template or, if `raw`, its text as the tokenizer begins raw text.

    Raises ValueError, a sentence without its subject, if the prompt has a problem, or the template drops a part of it.
    """
    if prompt.problem:
        raise ValueError(prompt.problem)
    if not raw:
        try:
            ShownContent(tokenizer).check(prompt.messages, prompt.tools, prompt.variables)
            return tokenizer.encode_prompt(prompt.messages, tools=prompt.tools, variables=prompt.variables)
        except ValueError as error:
            raise ValueError(f"cannot be shown to the target: {error}") from error
    if len(prompt.messages) != 1:
        raise ValueError("is a conversation, which has no raw text: leave out --raw")
    if prompt.tools:
        raise ValueError("has tools, which raw text does not show: leave out --raw, or the tools")
    return tokenizer.encode_raw(prompt.messages[0]["content"])
