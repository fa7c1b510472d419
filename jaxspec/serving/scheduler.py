"""The thread that decodes for a server: it owns the slots, and answers enter and leave them between rounds."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxspec.base import ROOT
from jaxspec.decoding.generation import FINISH_REASONS
from jaxspec.decoding.requests import Request, Settings
from jaxspec.decoding.rounds import LENGTH, RUNNING, STOPPED
from jaxspec.decoding.slots import RoundRecord, Slots
from jaxspec.serving.answer_text import AnswerText
from jaxspec.serving.outbox import Delta, DraftedTree, Outbox

CLOSING, BROKEN = "the server is shutting down", "the server failed while it was decoding"
"""Reasons why an answer ends before its end."""
log = logging.getLogger("jaxspec.serve")


class QueueFull(Exception):
    """As many requests wait as may."""


class Stopping(Exception):
    """No further requests are taken."""


class AnswerJob:
    """A request on its way to an answer. Any thread may set `cancelled`; its row is then free within one round."""

    def __init__(self, request: Request, text: AnswerText, outbox: Outbox, *, watched: bool = False) -> None:
        self.request, self.text, self.outbox, self.watched = request, text, outbox, watched
        self.cancelled = False
        self.rounds = 0

    def take(self, ids: Sequence[int], finish: int, delta: Delta) -> Delta:
        """Puts a round's tokens into the outbox; returns what it put. `delta` holds the figures of the round."""
        piece = self.text.push(ids, last=finish != RUNNING)
        # A stop string may be complete in the middle of a round: what the round has behind it does not count.
        ended = FINISH_REASONS[STOPPED] if piece.stopped else None if finish == RUNNING else FINISH_REASONS[finish]
        used, accepted = tuple(ids[: piece.used]), min(delta.accepted, piece.used)
        told = delta._replace(text=piece.text, ids=used, round=self.rounds, accepted=accepted, finish=ended)
        self.outbox.put(told)
        return told


@dataclasses.dataclass
class Tally:
    """Answers and their tokens since the start."""

    answered: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens: int = 0
    rounds: int = 0
    drafts: int = 0
    """Rounds of a row that drafted."""
    draft_tokens: int = 0
    accepted_by_depth: list[int] = dataclasses.field(default_factory=list)
    """Of these rounds, how many accepted a token at depth 1, 2 .., those behind a stop id included."""

    def count_draft(self, drafted: int, accepted: int) -> None:
        """Counts a round that drafted."""
        self.drafts, self.draft_tokens = self.drafts + 1, self.draft_tokens + drafted
        self.accepted_by_depth += [0] * (accepted - len(self.accepted_by_depth))
        for depth in range(accepted):
            self.accepted_by_depth[depth] += 1


class Lane:
    """Slots, the jobs that hold their rows, and those that wait for one."""

    def __init__(self, make: Callable[[], Slots], tally: Tally, lock: threading.Condition) -> None:
        self._make, self._tally, self._lock = make, tally, lock
        self.slots = make()
        self.held: dict[int, AnswerJob] = {}
        self.waiting: collections.deque[AnswerJob] = collections.deque()
        """Changed with the lock held; all else is the decode thread's."""
        self.spent = 0.0
        """Seconds of all its turns."""

    @property
    def busy(self) -> bool:
        """Returns whether there is a job."""
        return bool(self.held or self.waiting)

    def turn(self) -> None:
        """Lets jobs leave and enter, and runs one round."""
        begun = time.perf_counter()
        for row in [row for row, job in self.held.items() if job.cancelled]:
            self._leave(row)
            self._tally.cancelled += 1
        self._enter()
        if self.held:
            self._round()
        self.spent += time.perf_counter() - begun

    def warm(self) -> None:
        """Runs every program that answers will, once."""
        for width in {*self.slots.widths, self.slots.widest}:
            prompt = np.ones(min(width, self.slots.longest), np.int32)
            row = self.slots.free[0]
            self.slots.admit(Request(prompt, Settings(max_new_tokens=min(2, self.slots.max_new_tokens))), row)
            self.slots.step()
            self.slots.release(row)

    def fail(self, reason: str) -> None:
        """Ends all jobs, and makes new slots where there were rows."""
        with self._lock:
            failed, remake = [*self.held.values(), *self.waiting], bool(self.held)
            self.held.clear()
            self.waiting.clear()
        for job in failed:
            job.outbox.fail(reason)
        self._tally.failed += len(failed)
        if remake and reason == BROKEN:
            self.slots = self._make()

    def _enter(self) -> None:
        found = self._next_for_rows()
        self.held.update(found)  # all at once, so that a failure loses none
        for row, job in found.items():
            first = int(np.asarray(self.slots.admit(job.request, row))[0])
            settings = job.request.settings
            full = LENGTH if settings.max_new_tokens == 1 else RUNNING
            self._give(row, [first], STOPPED if first in settings.stop_ids else full, Delta("", (), 0))

    def _next_for_rows(self) -> dict[int, AnswerJob]:
        """Takes jobs for the free rows out of those that wait, and those that were cancelled."""
        with self._lock:
            left = [job for job in self.waiting if not job.cancelled]
            self._tally.cancelled += len(self.waiting) - len(left)
            found = dict(zip(self.slots.free, left, strict=False))
            self.waiting = collections.deque(left[len(found) :])
        return found

    def _round(self) -> None:
        begun = time.perf_counter()
        record = self.slots.step()
        seconds = time.perf_counter() - begun
        for row, job in list(self.held.items()):
            job.rounds += 1
            tree = record.tree
            delta = Delta("", (), 0, int(record.accepted_B[row]), int(tree.valid_BN[row].sum()), seconds)
            if job.watched:
                delta = delta._replace(tree=_tree_of(record, row))
            ids = record.token_BP[row][: record.added_B[row]].tolist()
            self._tally.rounds += 1
            if delta.nodes > 1:
                self._tally.count_draft(delta.nodes - 1, delta.accepted)
            self._give(row, ids, int(record.finish_B[row]), delta)

    def _give(self, row: int, ids: Sequence[int], finish: int, delta: Delta) -> None:
        told = self.held[row].take(ids, finish, delta)
        self._tally.tokens += len(told.ids)
        if told.finish is not None:
            self._leave(row)
            self._tally.answered += 1

    def _leave(self, row: int) -> None:
        self.slots.release(row)
        del self.held[row]


def _tree_of(record: RoundRecord, row: int) -> DraftedTree:
    """Returns the nodes of a row that were verified, numbered anew without the padding between them."""
    tree = record.tree
    kept = np.flatnonzero(tree.valid_BN[row])
    number = np.cumsum(tree.valid_BN[row]) - 1
    path = number[tree.path_BP[row][: int(record.accepted_B[row]) + 1]]
    parent = np.where(kept > 0, number[tree.parent_BN[row][kept]], ROOT)
    return DraftedTree(np.asarray(tree.token_BN[row])[kept], parent, tuple(path.tolist()))


class Scheduler:
    """Decodes jobs in the lanes of a server, in a thread of its own.

    Lanes that are busy together get equal shares of the time, a round at a time. At most `most_waiting` jobs wait.
    """

    def __init__(self, lanes: Mapping[str, Callable[[], Slots]], *, most_waiting: int = 64) -> None:
        self.tally, self.most_waiting = Tally(), most_waiting
        self._changed = threading.Condition()
        self.lanes = {name: Lane(make, self.tally, self._changed) for name, make in lanes.items()}
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)

    def start(self) -> None:
        """Compiles what will run, then starts the thread."""
        for lane in self.lanes.values():
            lane.warm()
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait for a row."""
        with self._changed:
            return sum(not job.cancelled for lane in self.lanes.values() for job in lane.waiting)

    @property
    def held(self) -> int:
        """Rows that are taken."""
        return sum(len(lane.held) for lane in self.lanes.values())

    def submit(self, lane: str, jobs: Sequence[AnswerJob]) -> None:
        """Lets jobs wait for rows of a lane, all or none. Raises QueueFull, and Stopping."""
        chosen = self.lanes[lane]
        with self._changed:
            if self._deadline is not None:
                raise Stopping(CLOSING)
            waiting = sum(not job.cancelled for job in chosen.waiting)
            # Those for whom there is a free row do not wait.
            if waiting + len(jobs) > self.most_waiting + len(chosen.slots.free):
                raise QueueFull(f"the queue of {self.most_waiting} is full")
            if not chosen.busy:
                # A lane that was idle does not make up for the time in which it had nothing to do, nor does one that
                # was busy alone owe the others that time.
                others = [lane for lane in self.lanes.values() if lane.busy] or self.lanes.values()
                chosen.spent = max(chosen.spent, *(lane.spent for lane in others))
            chosen.waiting.extend(jobs)
            self._changed.notify()

    def close(self, grace: float) -> None:
        """Takes no more jobs, ends those that wait, and lets the others go on for `grace` seconds; does not wait."""
        with self._changed:
            self._deadline = time.monotonic() + grace
            self._changed.notify()

    def join(self, timeout: float) -> bool:
        """Waits for the thread to end; returns whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (lane := self._next()) is not None:
                try:
                    lane.turn()
                except Exception:  # whatever a program or the machine does, other answers go on
                    log.exception("a round failed; the answers in it are ended")
                    lane.fail(BROKEN)
        finally:
            self.close(0)
            for lane in self.lanes.values():
                lane.fail(CLOSING)

    def _next(self) -> Lane | None:
        """Returns the lane whose turn it is, once there is one; None at the end."""
        with self._changed:
            while True:
                busy = [lane for lane in self.lanes.values() if lane.busy]
                if self._deadline is not None:
                    busy = [lane for lane in busy if lane.held]
                    if not busy or time.monotonic() >= self._deadline:
                        return None
                    for lane in self.lanes.values():
                        while lane.waiting:
                            lane.waiting.popleft().outbox.fail(CLOSING)
                if busy:
                    return min(busy, key=lambda lane: lane.spent)
                self._changed.wait()
