"""Rounds of a served answer, as `jaxspec serve` tells them on request in the field `jaxspec` of its chunks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxspec.serving.endpoint import Client, RequestFailed
from jaxspec.serving.streaming_client import read_events

ASKED = ("jaxspec", "return_token_ids")
"""Fields that a server may refuse by name."""


class ServedRound(NamedTuple):
    """The tree that a round verified."""

    at: int
    """Tokens of the answer before it; the last of them is the tree's root."""
    ids: list[int]
    """Of the nodes, the root first."""
    parents: list[int]
    path: list[int]
    """Nodes that were accepted, the root first."""

    def children(self, node: int) -> list[int]:
        """Returns the nodes below one, likeliest first."""
        return [child for child, parent in enumerate(self.parents) if child and parent == node]


class ToldAnswer(NamedTuple):
    """An answer whose server tells its rounds."""

    tokens: list[int]
    rounds: list[ServedRound]
    """Those with a tree; none where it was asked to decode plainly."""


def ask_rounds(client: Client, body: Mapping[str, Any], *, plain: bool = False) -> ToldAnswer | None:
    """Returns the answer to a completion with its rounds, `plain` without drafts; None where the server tells none.

    Raises RequestFailed, and ServerRefused.
    """
    fields = {"plain": True} if plain else {"tree": True}
    asked = {**body, "model": client.model, "stream": True, "return_token_ids": True, "jaxspec": fields}
    try:
        with client.open_stream("/completions", asked) as lines:
            return _read(read_events(lines))
    except RequestFailed as error:
        if error.kind.startswith("status 4") and any(name in str(error) for name in ASKED):
            return None
        raise


def _read(chunks: Iterable[Mapping[str, Any]]) -> ToldAnswer | None:
    tokens: list[int] = []
    rounds: list[ServedRound] = []
    finish, last = None, -1
    for chunk in chunks:
        if chunk.get("error"):
            raise RequestFailed("stream", f"the stream broke off: {json.dumps(chunk['error'])[:200]}")
        try:
            for choice in chunk["choices"]:
                finish = choice["finish_reason"] or finish
                if choice["finish_reason"] and "jaxspec" not in chunk:
                    continue  # the chunk that ends a stream tells no round
                told = chunk.get("jaxspec")
                if told is None or choice.get("token_ids") is None:
                    return None
                # Chunks of several rounds are merged where a reader is slow: the tree's place is then not known.
                if told.get("tree") and told["round"] == last + 1:
                    tree = told["tree"]
                    if "ids" not in tree and "tokens" in tree:
                        return None  # of an earlier version
                    rounds.append(_round(len(tokens), tree))
                tokens += choice["token_ids"]
                last = told["round"]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise RequestFailed("unreadable", f"a chunk cannot be read: {json.dumps(chunk)[:200]}") from error
    if finish not in ("stop", "length"):
        raise RequestFailed("stream", f"the stream ended with finish_reason {finish!r}")
    return ToldAnswer(tokens, rounds)


def _round(at: int, tree: Mapping[str, Any]) -> ServedRound:
    """Returns a round. Raises TypeError where its tree is none."""
    found = ServedRound(at, *(list(map(int, tree[name])) for name in ("ids", "parents", "path")))
    nodes = range(len(found.ids))
    if len(found.parents) != len(nodes) or not all(node in nodes for node in found.path):
        raise TypeError("nodes of a tree are missing")
    return found
