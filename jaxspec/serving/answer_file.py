"""The file of rewritten conversations that grows while they are made, and beside it what belongs to the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxspec.data import jsonl
from jaxspec.data.messages import Conversation
from jaxspec.serving.dialogue import Rewritten, hash_asked

NOTED = ("id", "source", "finish", "tokens", "turns")
"""Fields of a note of a conversation that is left out."""
KEPT = "kept"
"""Field that marks the note of a conversation whose line is in the file."""


class AnswerFile:
    """The file of conversations, and beside it `FILE.state`: the run's settings, then notes of conversations.

    A conversation that is left out has its counts in its note; that of one in the file says what was asked, and comes
    before its line. Lines are whole or absent: what a kill left half-written is cut off when the file is opened again.
    One process writes a file at a time. Raises ValueError where another one does, or where the file was begun
    otherwise; settings that the file was begun without are not compared.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.state_path = path, path.with_name(f"{path.name}.state")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: is not a file; give --out the name of one")
        if self.state_path.exists():
            jsonl.hold(self.state_path, of=path)
            jsonl.drop_torn_line(self.state_path)
        begun = jsonl.read_lines(self.state_path)[:1]
        if not begun and path.exists() and path.stat().st_size:
            raise ValueError(f"{path}: exists, and no run of this verb began it; give another --out")
        compared = settings if not begun else {name: v for name, v in settings.items() if name in begun[0]}
        for name in ("target", "template"):
            # Both are known by their contents, whatever the folder or file is called.
            if f"{name}_contents" in compared and begun:
                compared.pop(name, None)
        if begun:
            # A server's model is known by its name, and one that decodes here has none: neither follows the other.
            compared["endpoint_model"] = settings.get("endpoint_model")
        notes = jsonl.journal(self.state_path, compared or settings, of=path, fields=("id",))
        jsonl.drop_torn_line(path)
        alone = {"temperature": settings["temperature"]}  # of lines from before they said it
        records = jsonl.read_lines(path)
        for number, record in enumerate(records, 1):
            if missing := [name for name in ("id", "source", "messages", "finish", "tokens") if name not in record]:
                raise ValueError(f"{path}:{number}: has no {missing[0]!r}: it is not of this verb; remove the line")
        # The last note of a conversation counts: one that had changed was answered again.
        self._notes = {note["id"]: note for note in notes}
        self.kept = [summarize(alone | record) for record in records]
        there = {record["id"] for record in self.kept}
        dropped = [alone | n for n in self._notes.values() if not n.get(KEPT) and n["id"] not in there]
        for note in dropped:
            if missing := [name for name in NOTED if name not in note]:
                raise ValueError(
                    f"{self.state_path}: the note of {note['id']!r} has no {missing[0]!r}: it is not of this verb; "
                    "remove the line"
                )
        self.dropped = dropped
        self.changed = 0
        """Conversations that were left out, and are answered again as they have changed since."""

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        """Conversations that need no more work, by id."""
        return {record["id"]: record for record in [*self.kept, *self.dropped]}

    def reason(self, id: str) -> str:
        """Returns why a conversation is unfit; empty where that was not noted."""
        return self._notes.get(id, {}).get("reason", "")

    def left(
        self, numbered: Sequence[tuple[int, Conversation]], elsewhere: Container[str] = ()
    ) -> list[tuple[int, Conversation]]:
        """Returns the conversations that are to be answered, those among them that were left out and have changed.

        `elsewhere` holds the ids of other shards. Raises ValueError where a conversation in the file has changed, has
        another id than before, or is another shard's: it would be answered twice.
        """
        done = self.done
        self._refuse_moved(done, numbered, elsewhere)
        left, again, kept = [], set(), {record["id"] for record in self.kept}
        for index, conversation in numbered:
            record = done.get(conversation.id)
            if record is None:
                left.append((index, conversation))
            elif not self._is_same(record, conversation):
                if conversation.id in kept:
                    raise ValueError(
                        f"{self.path}: holds an answer to another conversation {conversation.id!r} than the prompts do "
                        "now: give each its own `id`, or another --out"
                    )
                left.append((index, conversation))
                again.add(conversation.id)
        self.dropped = [record for record in self.dropped if record["id"] not in again]
        self.changed = len(again)
        return left

    def _refuse_moved(
        self,
        done: Mapping[str, Mapping[str, Any]],
        numbered: Iterable[tuple[int, Conversation]],
        elsewhere: Container[str],
    ) -> None:
        """Raises ValueError for a conversation that is done, and now another's under its id or in its shard."""
        here = {conversation.id: conversation for _, conversation in numbered}
        gone = {id: record for id, record in done.items() if id not in here}
        if strayed := next((id for id in gone if id in elsewhere), None):
            raise ValueError(
                f"{self.path}: holds conversation {strayed!r}, which is now another shard's: prompts were put in or "
                "taken out before it; give the prompts as they were, or begin all shards anew with other --out"
            )
        # By their contents: an id that is a line's number follows its line.
        known = {self._hash_of(record): id for id, record in gone.items() if record["turns"]}
        for conversation in here.values():
            record = done.get(conversation.id)
            settled = record is not None and self._is_same(record, conversation)
            if not known or settled or not conversation.is_numbered:
                continue
            moved = known.get(hash_asked(conversation)) or known.get(asked_of(conversation.messages)[0])
            if moved is not None:
                raise ValueError(
                    f"{self.path}: holds {conversation.name} under the id {moved!r}: lines were put in or taken out "
                    "before it, and it would be answered twice; give each its own `id`, or another --out"
                )

    def _hash_of(self, record: Mapping[str, Any]) -> str | None:
        return self._notes.get(record["id"], {}).get("hash") or record.get("asked")

    def _is_same(self, record: Mapping[str, Any], conversation: Conversation) -> bool:
        """Returns whether a conversation that is done is the one of the same id that the prompts hold now."""
        noted = self._notes.get(record["id"], {}).get("hash")
        if noted is not None:
            return noted == hash_asked(conversation)
        # Of versions that noted only what had been asked before the conversation ended.
        asked, count = record.get("asked"), record.get("others", 0)
        return asked is None or asked == asked_of(conversation.messages, count)[0]

    def add(self, finished: Iterable[Rewritten], *, keep_unfinished: bool) -> None:
        """Appends finished conversations; they are on disk when this returns."""
        keep, drop, notes = [], [], []
        for item in finished:
            record, more = item.record(), {"hash": item.asked} | ({"reason": item.reason} if item.reason else {})
            if item.complete or (keep_unfinished and item.turns > 0):
                keep.append(record)
                notes.append({"id": record["id"], KEPT: True} | more)
            else:
                drop.append(summarize(record))
                notes.append(drop[-1] | more)
        # Notes first: one without its line says nothing, and a line without its note could not be compared.
        if notes:
            jsonl.append(self.state_path, notes)
        if keep:
            jsonl.append(self.path, keep)
        self._notes |= {note["id"]: note for note in notes}
        self.kept += map(summarize, keep)
        self.dropped += drop

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
