"""The file of rewritten conversations that grows while they are made, and beside it what belongs to the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxspec.data import jsonl
from jaxspec.data.messages import Conversation
from jaxspec.serving.dialogue import Rewritten

NOTED = ("id", "source", "finish", "tokens", "turns")


class AnswerFile:
    """The file of conversations, and beside it `FILE.state`: the run's settings, then the conversations left out.

    Lines are whole or absent: what a kill left half-written is cut off when the file is opened again. One process
    writes a file at a time. Raises ValueError where another one does, or where the file was begun otherwise; settings
    that the file was begun without are not compared.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.state_path = path, path.with_name(f"{path.name}.state")
        if self.state_path.exists():
            jsonl.hold(self.state_path, of=path)
            jsonl.drop_torn_line(self.state_path)
        begun = jsonl.read_lines(self.state_path)[:1]
        if not begun and path.exists() and path.stat().st_size:
            raise ValueError(f"{path}: exists, and no run of this verb began it; give another --out")
        compared = settings if not begun else {name: v for name, v in settings.items() if name in begun[0]}
        if begun and begun[0].get("target_contents") and compared.get("target_contents"):
            compared.pop("target", None)  # a target is known by its contents, whatever its folder is called
        self.dropped = jsonl.journal(self.state_path, compared or settings, of=path, fields=NOTED)
        jsonl.drop_torn_line(path)
        alone = {"temperature": settings["temperature"]}  # of lines from before they said it
        self.kept = [summarize(alone | record) for record in jsonl.read_lines(path)]
        self.dropped = [alone | record for record in self.dropped]

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        """Conversations that need no more work, by id."""
        return {record["id"]: record for record in [*self.kept, *self.dropped]}

    def left(self, numbered: Iterable[tuple[int, Conversation]]) -> list[tuple[int, Conversation]]:
        """Returns the conversations that are to be answered. Raises ValueError where one has changed since."""
        done, left = self.done, []
        for index, conversation in numbered:
            record = done.get(conversation.id)
            if record is None:
                left.append((index, conversation))
                continue
            asked, count = record.get("asked"), record.get("others", 0)
            if asked is not None and asked != asked_of(conversation.messages, count)[0]:
                raise ValueError(
                    f"{self.path}: holds an answer to another conversation {conversation.id!r} than the prompts do "
                    "now: give each its own `id`, or another --out"
                )
        return left

    def add(self, finished: Iterable[Rewritten], *, keep_unfinished: bool) -> None:
        """Appends finished conversations; they are on disk when this returns."""
        keep, drop = [], []
        for item in finished:
            kept = item.complete or (keep_unfinished and item.turns > 0)
            (keep if kept else drop).append(item.record())
        if keep:
            jsonl.append(self.path, keep)
        if drop:
            jsonl.append(self.state_path, [summarize(record) for record in drop])
        self.kept += map(summarize, keep)
        self.dropped += map(summarize, drop)

    def count(self, key: str, *, finishes: Mapping[str, str]) -> list[dict[str, Any]]:
        """Returns a row a value of `key` over the whole file: counts of kept conversations, and of all by finish.

        `finishes` names each count of a finish."""
        rows = []
        for value in sorted({r[key] for r in [*self.kept, *self.dropped]}):
            kept = [r for r in self.kept if r[key] == value]
            both = kept + [r for r in self.dropped if r[key] == value]
            row = {key: value, "conversations": len(kept)}
            row |= {name: sum(r[name] for r in kept) for name in ("turns", "tokens")}
            rows.append(row | {name: sum(r["finish"] == finish for r in both) for name, finish in finishes.items()})
        return rows


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a line that the counts and a resumed run read."""
    turns = sum(message["role"] == "assistant" for message in record["messages"])
    asked, others = asked_of(record["messages"])
    found = {k: record[k] for k in ("id", "source", "finish", "tokens", "temperature")}
    return found | {"turns": turns, "asked": asked, "others": others}


def asked_of(messages: Sequence[dict[str, Any]], count: int | None = None) -> tuple[str, int]:
    """Returns a hash of the first `count` messages of users and systems (None: all), and their number."""
    # Results of tools are left out: which of them follow depends on the target's own calls.
    others = [[m["role"], m["content"]] for m in messages if m["role"] not in ("assistant", "tool")][:count]
    return hashlib.sha256(json.dumps(others).encode()).hexdigest()[:16], len(others)
