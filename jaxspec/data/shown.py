"""The check that a chat template shows what a conversation holds: some pass over parts of it without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.messages import BadRecord, Message


class ShownContent:
    """Compares the texts with and without a part of a conversation, once for each kind of part.

    Parts are messages of system, developer and tools by role and place, tool calls, and descriptions of tools. Thoughts
    are none: templates drop those of earlier turns by design.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._render = tokenizer.render
        self._dropped: dict[tuple[str, bool], bool] = {}

    def check(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises BadRecord naming the first message with a part that the template drops.

        Raises ValueError where the template refuses the messages.
        """
        told: dict[str, Any] = {"tools": tools, "variables": variables}
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            place = "first" if i == 0 else "later"
            if role in ("system", "developer", "tool") and content.strip():
                without = [*messages[:i], *messages[i + 1 :]]
                self._judge((f"a message of role {role} in {place} place", False), i, messages, without, told)
            if "tool_calls" in message:
                bare = {name: value for name, value in message.items() if name != "tool_calls"}
                # Some templates show calls only where there is no text beside them.
                kind = ("tool calls", bool(content.strip()))
                self._judge(kind, i, messages[: i + 1], [*messages[:i], bare], told)
        if tools:
            self._judge(("descriptions of tools", False), 0, messages, messages, told, told | {"tools": ()})

    def _judge(
        self,
        kind: tuple[str, bool],
        i: int,
        shown: Sequence[Message],
        without: Sequence[Message],
        told: Mapping[str, Any],
        told_less: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises BadRecord where the texts of `shown` and of `without` are equal."""
        if kind not in self._dropped:
            less = told if told_less is None else told_less
            self._dropped[kind] = self._render(shown, **told) == self._try(without, less)
        if self._dropped[kind]:
            raise BadRecord(
                "dropped by the template",
                f"message {i}: the chat template drops {kind[0]} without a word, so the target is not shown it when it "
                "is served: take it out, or use the template that the server uses",
            )

    def _try(self, messages: Sequence[Message], told: Mapping[str, Any]) -> str | None:
        try:
            return self._render(messages, **told)
        except ValueError:  # the part is needed, so it is not passed over
            return None
