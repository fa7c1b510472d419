"""Responses of OpenAI's API: whole ones, chunks, and lines of server-sent events."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxspec.serving.api_request import Asked
from jaxspec.serving.outbox import Delta, DraftedTree

DONE = b"data: [DONE]\n\n"


@dataclasses.dataclass(frozen=True)
class ApiReply:
    """The fields that all parts of one response share."""

    asked: Asked
    prompts: Sequence[Sequence[int]]
    """Token ids of the prompts; choice `c` answers prompt `c // asked.choices`."""
    model: str
    fingerprint: str
    show: Callable[[int], str]
    """Returns a token as text, for trees."""
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def answers(self) -> int:
        """Number of choices."""
        return len(self.prompts) * self.asked.choices

    def whole(self, deltas: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """Returns the response of choices that have ended."""
        kind = "chat.completion" if self.asked.chat else "text_completion"
        ended = [_together(found) for found in deltas]
        choices = [self._choice(index, answer) for index, answer in enumerate(ended)]
        return self._head(kind) | {"choices": choices, "usage": self.usage(ended)} | self._prompt_ids()

    def _choice(self, index: int, answer: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        said = {"message": message} if self.asked.chat else {"text": answer.text}
        return {"index": index, **said, "finish_reason": answer.finish, "logprobs": None} | self._extra(answer)

    def opening(self) -> list[dict[str, Any]]:
        """Returns the chunks before any text: of a chat, one a choice that names the role."""
        role = {"delta": {"role": "assistant", "content": ""}}
        chunks = [self._chunk(index, role, None) for index in range(self.answers)] if self.asked.chat else []
        if chunks:
            chunks[0] |= self._prompt_ids()
        return chunks

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Returns the chunks of a delta: its text, unless there is none to tell, and the finish."""
        found = []
        if delta.text or self.asked.report.wanted or self.asked.ids:
            said = {"delta": {"content": delta.text}} if self.asked.chat else {"text": delta.text}
            found.append(self._chunk(index, said, None, self._extra(delta)))
        if delta.finish is not None:
            found.append(self._chunk(index, {"delta": {}} if self.asked.chat else {"text": ""}, delta.finish))
        return found

    def closing(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """Returns the chunk behind the last choice, where the usage is asked for."""
        if not self.asked.usage:
            return []
        return [self._head(self._chunk_kind) | {"choices": [], "usage": self.usage(deltas)}]

    def usage(self, answers: Sequence[Delta]) -> dict[str, Any]:
        """Returns the tokens of prompts and answers; drafted ones that were accepted are told beside them."""
        read, written = sum(map(len, self.prompts)), sum(len(answer.ids) for answer in answers)
        accepted = sum(answer.accepted for answer in answers)
        # Every round's tree has a root, which is not drafted.
        drafted = sum(answer.nodes - answer.round for answer in answers)
        details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "completion_tokens_details": details,
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.asked.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.asked.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(
        self, index: int, said: Mapping[str, Any], finish: str | None, extra: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "finish_reason": finish, "logprobs": None, **(extra or {})}
        report = choice.pop("jaxspec", None)
        chunk = self._head(self._chunk_kind) | {"choices": [choice]}
        if self.asked.usage:
            chunk["usage"] = None
        return chunk if report is None else chunk | {"jaxspec": report}

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.prompts[0])} if self.asked.ids and len(self.prompts) == 1 else {}

    def _extra(self, delta: Delta) -> dict[str, Any]:
        """Returns the fields that are only there on request."""
        extra: dict[str, Any] = {"token_ids": list(delta.ids)} if self.asked.ids else {}
        if self.asked.report.wanted:
            extra["jaxspec"] = {"round": delta.round, "accepted": delta.accepted, "nodes": delta.nodes}
            if self.asked.report.tree:
                extra["jaxspec"] |= {"tokens": len(delta.ids), "seconds": delta.seconds}
                extra["jaxspec"] |= {"tree": None if delta.tree is None else self._tree(delta.tree)}
        return extra

    def _tree(self, tree: DraftedTree) -> dict[str, Any]:
        ids = tree.token_N.tolist()
        texts = [self.show(token) for token in ids]
        return {
            "tokens": texts,
            "ids": ids,
            "parents": tree.parent_N.tolist(),
            "path": list(tree.path),
        }


def _together(deltas: Sequence[Delta]) -> Delta:
    whole, *rest = deltas
    for delta in rest:
        whole = whole.then(delta)
    return whole


def event(value: Mapping[str, Any]) -> bytes:
    """Returns one server-sent event. Escaped to ASCII, so that no character of a text can end a line."""
    return b"data: " + json.dumps(value, allow_nan=False).encode("ascii") + b"\n\n"
