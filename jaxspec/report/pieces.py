"""An answer in pieces of text, each with the round that gave it and how: by prefill, drafted and accepted, or bonus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.data.chat import NO_TEMPLATE, ChatTokenizer, IncrementalDecoder
from jaxspec.evaluation.rows import Row
from jaxspec.interchange.target_folders import target_folder

PREFILL, DRAFTED, BONUS = "prefill", "drafted", "bonus"


class TokenOrigin(NamedTuple):
    """The origin of one token of an answer."""

    round: int
    """0: prefill; the first target call behind it is round 1."""
    kind: str
    depth: int
    """Of a drafted token, from 1; 0 of others."""


class ColouredPiece(NamedTuple):
    """A run of tokens that make whole characters, and their text."""

    text: str
    tokens: tuple[TokenOrigin, ...]

    @property
    def last(self) -> TokenOrigin:
        """The token that completes the text: a reader cannot see it before."""
        return self.tokens[-1]

    @property
    def told(self) -> str:
        """Returns the origin in words, such as `round 12, drafted depth 3`."""
        told = [_told(token) for token in self.tokens]
        return told[-1] if len(told) == 1 else f"{len(told)} tokens of one character or more: {'; '.join(told)}"


def _told(token: TokenOrigin) -> str:
    if token.kind == PREFILL:
        return "prefill token"
    return f"round {token.round}, " + (f"drafted depth {token.depth}" if token.kind == DRAFTED else "bonus token")


def origins(row: Row) -> list[TokenOrigin]:
    """Returns the origin of every token of an answer.

    A round emits its accepted tokens in the order of depth, and behind them the bonus token, unless the answer is cut
    before it.
    """
    found = [TokenOrigin(0, PREFILL, 0)] if row.tokens else []
    for number, (emitted, accepted) in enumerate(zip(row.emitted, row.accepted, strict=True), 1):
        found += [TokenOrigin(number, DRAFTED, depth) for depth in range(1, min(emitted, accepted) + 1)]
        found += [TokenOrigin(number, BONUS, 0)] * (emitted - min(emitted, accepted))
    return found


def pieces_of(row: Row, tokenizer: ChatTokenizer) -> list[ColouredPiece]:
    """Returns an answer's text in pieces, which together are the whole text; special tokens are shown.

    Tokens that hold a part of a character are one piece with those that complete it. Raises ValueError for an id that
    the tokenizer does not have, or for rounds that do not add up to the tokens.
    """
    given = origins(row)
    if len(given) != row.length:
        raise ValueError(f"{row.id}: its rounds give {len(given)} tokens, and it has {row.length}")
    if (most := max(row.tokens, default=0)) >= tokenizer.vocab_size:
        raise ValueError(f"{row.id}: token {most} is none of the tokenizer's {tokenizer.vocab_size:,}")
    decoder, found, waiting = IncrementalDecoder(tokenizer, skip_special=False), [], []
    for token, origin in zip(row.tokens, given, strict=True):
        waiting.append(origin)
        if text := decoder.push([token]):
            found.append(ColouredPiece(text, tuple(waiting)))
            waiting = []
    rest = decoder.flush()
    if waiting and (rest or not found):
        found.append(ColouredPiece(rest, tuple(waiting)))
    elif waiting:  # tokens without a text of their own
        found[-1] = ColouredPiece(found[-1].text, (*found[-1].tokens, *waiting))
    return found


def rejected_texts(row: Row, tokenizer: ChatTokenizer) -> dict[int, str]:
    """Returns the text of the drafts that each round rejected, by the round's number; none where none were kept."""
    found = {}
    for number, drafts in enumerate(row.rejected, 1):
        if drafts:
            decoder = IncrementalDecoder(tokenizer, skip_special=False)
            found[number] = decoder.push(list(drafts)) + decoder.flush()
    return found


def load_tokenizer(settings: Any, target: str | None) -> ChatTokenizer:
    """Returns the tokenizer of the target that a run's settings name, or of `target`.

    Raises ValueError or OSError where there is none, or where it is not the one that the run decoded with.
    """
    folder = target_folder(target or str(settings.get("target", "")))
    found = _load(folder)
    if found.fingerprint["tokenizer"] != settings.get("tokenizer"):
        raise ValueError(f"{folder}: its tokenizer is not the one of the run's target")
    return found


def _load(folder: Path) -> ChatTokenizer:
    try:
        return ChatTokenizer.load(folder)
    except ValueError:  # the folder's template cannot be read, and none is needed
        return ChatTokenizer.load(folder, NO_TEMPLATE)


def choose_answers(rows: Sequence[Row], wanted: Sequence[str], most: int = 4) -> list[Row]:
    """Returns the first answers to the wanted questions; by default those of the first question of `most` tasks.

    Answers whose rejected drafts were kept come first. A question is named by its id or by `task/id`. Raises ValueError
    naming one that is not there.
    """
    found: list[Row] = []
    for name in wanted:
        mine = [row for row in rows if name in (row.id, row.unit)]
        if not mine:
            raise ValueError(f"--text {name}: no answer of this question; name its id, or TASK/ID")
        found.append(min(mine, key=lambda row: (row.turn, row.seed)))
    if wanted:
        return found
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: not row.rejected):
        if row.turn == 0 and row.calls:
            first.setdefault(row.task, row)
    return list(first.values())[:most]
