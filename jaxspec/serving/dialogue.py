"""A conversation whose assistant turns are being written anew, whoever writes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxspec.data.messages import BadRecord, Conversation, Message, StoredAnswer, to_record

STOPPED, LENGTH, UNFIT, CALLS = "stop", "length", "unfit", "calls"
"""Ways that a conversation ends: by itself; cut at the budget; at a turn that the target cannot read; at a call that
has no recorded result."""


class Reply(NamedTuple):
    """An assistant turn as its writer gave it."""

    message: Message
    cut: bool
    """Whether it reached the budget before it ended."""
    tokens: int
    answer_ids: tuple[int, ...] | None = None
    """None where the writer does not tell them."""
    prompt_ids: tuple[int, ...] | None = None


class Rewritten(NamedTuple):
    """A conversation whose assistant turns are the target's."""

    conversation: Conversation
    finish: str
    """`stop`: every answer ended by itself; `length`: the last one was cut at the budget, and what follows is missing;
    `unfit`: the next turn has no room in the target's positions, or its template refuses it, and is missing; `calls`:
    the last one calls a function whose result is not recorded, and what follows is missing."""
    turns: int
    """Answers, a cut one included."""
    tokens: int
    """Tokens of the answers, stop ids included."""
    temperature: float
    """The answers were drawn at."""
    sampling: Mapping[str, Any] = types.MappingProxyType({})
    """Further settings of the draws, where they are not the usual ones."""
    asked: str = ""
    """`hash_asked` of the conversation that was to be rewritten."""
    reason: str = ""
    """Why it is `unfit`."""

    @property
    def complete(self) -> bool:
        """Returns whether it holds answers, all of them whole."""
        return self.turns > 0 and self.finish != LENGTH

    def record(self) -> dict[str, Any]:
        """Returns its line of JSON: a conversation as `read_conversations` reads it, and facts about its answers."""
        about = {"finish": self.finish, "tokens": self.tokens, "temperature": self.temperature}
        return to_record(self.conversation) | about | ({"sampling": dict(self.sampling)} if self.sampling else {})


NO_TURN = "has no user's turn"
"""Why a conversation is unfit that nothing is asked in."""


class Step(NamedTuple):
    """The messages of others before an answer, and the results recorded for the calls that follow."""

    others: tuple[Message, ...]
    """At least one user's turn among them."""
    results: tuple[tuple[str, Message], ...]
    """The name of the function and the message, in their order."""


def steps_of(messages: Sequence[Message]) -> list[Step]:
    """Returns the others' messages before each assistant turn and behind the last, with the tools' results."""
    steps: list[Step] = []
    run: list[Message] = []
    results: list[tuple[str, Message]] = []
    called: list[str] = []
    for message in [*messages, {"role": "assistant", "content": ""}]:
        if message["role"] == "assistant":
            if any(m["role"] == "user" for m in run):
                steps.append(Step(tuple(run), ()))
                run, results = [], []
            called += [call["function"]["name"] for call in message.get("tool_calls", ())]
        elif message["role"] == "tool":
            results.append((called.pop(0) if called else message.get("name", ""), message))
            if steps:
                steps[-1] = steps[-1]._replace(results=tuple(results))
        else:
            run.append(message)
    return steps


def check_results(messages: Sequence[Message]) -> None:
    """Raises BadRecord for a tool's result before the first user's turn: nothing is asked that it could follow."""
    roles = [message["role"] for message in messages]
    first = roles.index("user") if "user" in roles else 0
    if "tool" in roles[:first]:
        raise BadRecord(
            "a result without a call",
            f"message {roles.index('tool')}: a tool's result stands before the first user's turn, so nothing calls it",
        )


def hash_asked(conversation: Conversation) -> str:
    """Returns a short hash of all of a conversation that its answers depend on; its own answers are none of that."""
    steps = [
        [[_without_id(m) for m in step.others], [[name, _without_id(m)] for name, m in step.results]]
        for step in steps_of(conversation.messages)
    ]
    asked = [steps, [dict(tool) for tool in conversation.tools], sorted(conversation.variables.items())]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _without_id(message: Message) -> Message:
    return {name: value for name, value in message.items() if name != "tool_call_id"}


@dataclasses.dataclass
class Dialogue:
    """A conversation being rewritten: `ask` gives the messages to answer, `take` the answer."""

    original: Conversation
    temperature: float
    variables: Mapping[str, Any]
    """Of the template, the record's own before the run's."""
    made_with: Mapping[str, Any]
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.messages: list[Message] = []
        self.steps = steps_of(self.original.messages)
        self.stored: list[StoredAnswer] = []
        self.turns = self.tokens = 0
        self._results: list[tuple[str, Message]] = []
        self._next: list[Message] = []
        """Messages that the target has not read yet."""
        self._begin()

    def _begin(self) -> None:
        """Takes up the next step."""
        step = self.steps.pop(0) if self.steps else Step((), ())
        self._next, self._results = list(step.others), list(step.results)

    @property
    def ended(self) -> bool:
        """Returns whether there is nothing left to answer."""
        return not self._next

    def ask(self) -> list[Message]:
        """Returns the messages that the target is to answer next."""
        return [*self.messages, *self._next]

    def take(self, reply: Reply) -> str | None:
        """Adds an answer to `ask`; returns how the conversation ends by it, or None where it goes on."""
        self.messages = [*self.ask(), reply.message]
        self._next = []
        if reply.answer_ids is not None:
            self.stored.append(StoredAnswer(len(self.messages) - 1, reply.answer_ids, reply.prompt_ids))
        self.turns += 1
        self.tokens += reply.tokens
        if reply.cut:
            return LENGTH
        calls = reply.message.get("tool_calls", [])
        if calls:
            return self._answer_call(calls)
        self._begin()
        return STOPPED if self.ended else None

    def _answer_call(self, calls: Sequence[Mapping[str, Any]]) -> str | None:
        """Lets the recorded result of the one call follow: of the same function, the next that is left."""
        name = calls[0]["function"]["name"]
        if len(calls) > 1 or not self._results or self._results[0][0] != name:
            return CALLS
        result = dict(self._results.pop(0)[1])
        if "id" in calls[0]:
            result["tool_call_id"] = calls[0]["id"]
        else:
            result.pop("tool_call_id", None)
        self._next = [result]
        return None

    def finished(self, finish: str, reason: str = "") -> Rewritten:
        """Returns the conversation as it stands; `reason` says why it is unfit."""
        conversation = self.original._replace(
            messages=tuple(self.messages),
            unfinished=finish == LENGTH,
            variables=self.variables,
            learned=(),
            stored=tuple(self.stored),
            made_with=self.made_with if self.stored else {},
        )
        return Rewritten(
            conversation, finish, self.turns, self.tokens, self.temperature, self.sampling,
            hash_asked(self.original), reason,
        )  # fmt: skip
