"""Pieces of an answer between the thread that decodes and a reader that may be slow."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

ROOM = 64
"""Deltas that wait for a reader; when there are as many, further ones are merged."""


class DraftedTree(NamedTuple):
    """The tree of one round of one answer, on the host."""

    token_N: np.ndarray
    """Its nodes' tokens; node 0 is the newest token of the text."""
    parent_N: np.ndarray
    """Node of the parent; -1 for node 0."""
    path: tuple[int, ...]
    """Nodes that were accepted, node 0 first."""


class Delta(NamedTuple):
    """The part of an answer that one round added, or several that were merged."""

    text: str
    ids: tuple[int, ...]
    round: int
    """Number of its last round; 0 for the token that reading the prompt gives."""
    accepted: int = 0
    """Drafted tokens that became part of the answer."""
    nodes: int = 0
    """Nodes of the trees that the target verified, their roots included."""
    seconds: float = 0.0
    """Time of the rounds."""
    finish: str | None = None
    """`stop` or `length` where it is the last."""
    tree: DraftedTree | None = None
    """Of the last round, where it is asked for."""

    def then(self, later: Delta) -> Delta:
        """Returns both as one."""
        return later._replace(
            text=self.text + later.text,
            ids=self.ids + later.ids,
            accepted=self.accepted + later.accepted,
            nodes=self.nodes + later.nodes,
            seconds=self.seconds + later.seconds,
        )


class Outbox:
    """Deltas that wait for their reader. The writer never waits: in a full outbox the last delta grows.

    `notify` is called, in the writer's thread, whenever there is something to take.
    """

    def __init__(self, notify: Callable[[], None], room: int = ROOM) -> None:
        self._notify, self._room = notify, room
        self._lock, self._waiting = threading.Lock(), []
        self._failure: str | None = None

    def put(self, delta: Delta) -> None:
        """Adds a delta."""
        with self._lock:
            if len(self._waiting) >= self._room:
                self._waiting[-1] = self._waiting[-1].then(delta)
            else:
                self._waiting.append(delta)
        self._notify()

    def fail(self, reason: str) -> None:
        """Ends the answer without a finish; `reason` is one sentence."""
        with self._lock:
            self._failure = reason
        self._notify()

    def take(self) -> tuple[list[Delta], str | None]:
        """Returns the deltas since the last call, and the reason why no more will come, if there is one."""
        with self._lock:
            taken, self._waiting = self._waiting, []
            return taken, self._failure
