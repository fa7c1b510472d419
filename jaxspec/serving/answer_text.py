"""The text of an answer as it grows: whole characters, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxspec.data.chat import ChatTokenizer, IncrementalDecoder


class TextPiece(NamedTuple):
    """The text that some tokens add."""

    text: str
    used: int
    """Tokens that belong to the answer: up to the one that completes a stop string."""
    stopped: bool
    """Whether a stop string is complete; nothing follows."""


class AnswerText:
    """Turns the tokens of one answer into text. The pieces together are the text, whatever tokens came together.

    The text ends before the first of the stop strings. Held back are unfinished UTF-8, and an end that may begin a stop
    string.
    """

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str] = ()) -> None:
        self._decoder, self._stops = IncrementalDecoder(tokenizer), tuple(stops)
        self._held = ""

    def push(self, ids: Sequence[int], *, last: bool = False) -> TextPiece:
        """Returns what more tokens add; `last` says that no others follow, so that nothing is held back."""
        if not self._stops:
            return TextPiece(self._decoder.push(ids) + (self._decoder.flush() if last else ""), len(ids), False)
        told = ""
        # Token by token: which stop string comes first, and at which token, does not depend on the rounds.
        for used, token in enumerate(ids, 1):
            text, stopped = self._take(self._decoder.push([token]))
            told += text
            if stopped:
                return TextPiece(told, used, True)
        if last:
            text, stopped = self._take(self._decoder.flush())
            return TextPiece(told + text + ("" if stopped else self._release()), len(ids), stopped)
        return TextPiece(told, len(ids), False)

    def _take(self, text: str) -> tuple[str, bool]:
        """Returns the text that can be told with some more behind it, and whether a stop string ended it."""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        kept = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def _release(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of a text that begins a stop string and is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
