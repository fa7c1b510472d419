"""Conversations on disk: one JSON object a line, as messages or in ShareGPT's form."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class Conversation(NamedTuple):
    """One conversation: `messages` are dicts with `role` and `content`."""

    id: str
    source: str
    messages: tuple[dict[str, str], ...]
    unfinished: bool = False
    """Its last answer was cut, so nothing says that it ends there."""


def read_conversations(path: str | Path, *, limit: int | None = None) -> list[Conversation]:
    """The conversations of a JSONL file in file order, at most `limit` of them.

    A line is `{"id", "source", "messages": [{"role", "content"}]}` or ShareGPT's
    `{"conversations": [{"from", "value"}]}`; `id` defaults to the line number, `source` to the file's name. With
    `"finish": "length"`, as `jaxspec regenerate` writes it, the conversation is unfinished.
    Raises ValueError naming the file and line of the first bad line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a JSONL file of conversations")
    conversations: list[Conversation] = []
    for number, line in _numbered_lines(path):
        if limit is not None and len(conversations) >= limit:
            break
        try:
            conversations.append(parse_conversation(json.loads(line), id=str(number), source=path.stem))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not conversations:
        raise ValueError(f"{path}: holds no conversation")
    return conversations


def read_all(names: str, *, limit: int | None = None) -> list[Conversation]:
    """The conversations of several files, their names joined by commas, one file after another; `limit` is of each."""
    paths = [name.strip() for name in names.split(",")]
    if not all(paths):
        raise ValueError(f"{names!r}: names no file before or behind a comma; give files joined by commas")
    return [conversation for path in paths for conversation in read_conversations(path, limit=limit)]


def parse_conversation(record: object, *, id: str, source: str) -> Conversation:
    """`record` in one form; `id` and `source` stand in where it names none. ValueError if it is malformed."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if "messages" in record:
        messages = _list_of(record, "messages")
        pairs = [(_text(m, "role", i), _text(m, "content", i)) for i, m in enumerate(messages)]
    elif "conversations" in record:
        messages = _list_of(record, "conversations")
        pairs = [(_sharegpt_role(_text(m, "from", i), i), _text(m, "value", i)) for i, m in enumerate(messages)]
    else:
        raise ValueError("has neither `messages` nor `conversations`")
    for i, (role, _) in enumerate(pairs):
        if role not in ROLES:
            raise ValueError(f"message {i}: role {role!r} is not one of {', '.join(ROLES)}")
    return Conversation(
        str(record.get("id", id)),
        str(record.get("source", source)),
        tuple({"role": role, "content": content} for role, content in pairs),
        unfinished=record.get("finish") == "length",
    )


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _list_of(record: dict, field: str) -> list:
    value = record[field]
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{field}` must be a non-empty list")
    return value


def _text(message: object, field: str, index: int) -> str:
    value = message.get(field) if isinstance(message, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"message {index}: `{field}` must be text")
    return value


def _sharegpt_role(role: str, index: int) -> str:
    if role not in _SHAREGPT_ROLES:
        raise ValueError(f"message {index}: `from` is {role!r}, not one of {', '.join(_SHAREGPT_ROLES)}")
    return _SHAREGPT_ROLES[role]
