"""From requests to answers: a queue decoded in batches of like length, or in slots that are refilled."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxspec.decoding.answers import Answer, total_tau, total_tokens
from jaxspec.decoding.generation import NO_LIMIT, collect, run_rounds, start
from jaxspec.decoding.requests import Request, Requests, bucket, fill_up, make_requests
from jaxspec.decoding.rounds import CHUNK
from jaxspec.decoding.slots import Slots
from jaxspec.serving.loading import Models


class Answered(NamedTuple):
    """A request of the queue with its answer."""

    request: Request
    answer: Answer
    seconds: float
    """Spent on the queue so far, on the host's clock; without the compilation that was done ahead."""
    began: float = 0.0
    """Of these seconds, those before its prompt was read; known of requests in slots."""


class Queue:
    """Requests that wait, by padded length.

    A batch holds one length only, so an answer does not depend on which requests stand beside it, and few programs are
    compiled.
    """

    def __init__(self, requests: Iterable[Request], *, batch: int) -> None:
        self.batch = batch
        self._waiting: dict[int, list[Request]] = {}
        for request in requests:
            self.add(request)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, request: Request) -> None:
        """Lets a request wait; requests may be added while the queue is being decoded."""
        self._waiting.setdefault(bucket(len(request.tokens)), []).append(request)

    def take(self) -> list[Request]:
        """Removes and returns the next batch: a full one of the longest prompts, else what waits of the shortest."""
        # So conversations that have begun are finished before others are begun, and batches fill up.
        full = [width for width, waiting in self._waiting.items() if len(waiting) >= self.batch]
        width = max(full) if full else min(self._waiting)
        taken, left = self._waiting[width][: self.batch], self._waiting[width][self.batch :]
        self._waiting[width] = left
        if not left:
            del self._waiting[width]
        return taken


def answer_batches(
    models: Models, queue: Queue, *, max_new_tokens: int, warm: bool = False
) -> Iterator[list[Answered]]:
    """Decodes the queue until it is empty, a batch at a time; yields each batch when it is done.

    `max_new_tokens` is the largest budget of any request; all batches share the programs made for it. The last batch of
    a length is padded with rows that end at once. With `warm`, the programs of a new length are compiled ahead.
    """
    warmed: set[int] = set()
    seconds = 0.0
    while queue:
        taken = queue.take()
        requests = make_requests(fill_up(taken, queue.batch))
        width = requests.tokens_BL.shape[1]
        if warm and width not in warmed:
            warm_up(models, requests, max_new_tokens)
            warmed.add(width)
        started = time.perf_counter()
        state = start(models.engine, models.weights, requests, max_new_tokens=max_new_tokens)
        answers = collect(run_rounds(models.engine, models.weights, state, NO_LIMIT))
        seconds += time.perf_counter() - started
        yield [Answered(*pair, seconds) for pair in zip(taken, answers, strict=False)]  # without the padding's


class TimedAnswers(NamedTuple):
    """Answers to some requests, in order, and the seconds they took: prefill included, compilation not."""

    answers: list[Answer]
    seconds: float

    @property
    def tau(self) -> float:
        """Tokens per target call."""
        return total_tau(self.answers)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the seconds."""
        return total_tokens(self.answers) / self.seconds


def answer_one_by_one(models: Models, requests: Sequence[Request]) -> TimedAnswers:
    """Answers the requests one at a time; programs are compiled before the clock runs."""
    numbered = [request._replace(key=number) for number, request in enumerate(requests)]
    budget = max(request.settings.max_new_tokens for request in requests)
    answered = [
        one
        for batch in answer_batches(models, Queue(numbered, batch=1), max_new_tokens=budget, warm=True)
        for one in batch
    ]
    answers = {one.request.key: one.answer for one in answered}
    return TimedAnswers([answers[number] for number in range(len(requests))], answered[-1].seconds)


def serve(models: Models, requests: Sequence[Request], *, slots: int, longest: int | None = None) -> Iterator[Answered]:
    """Answers the requests in `slots` rows of one running batch, each row taking the next when it has finished.

    Yields them as they finish. Everything is compiled before the first. An answer does not depend on which others run
    beside it. Calls with one `longest` prompt (None: that of these requests) share their programs.
    """
    if not requests:
        return
    waiting = sorted(requests, key=lambda request: -len(request.tokens))
    room = functools.partial(
        Slots,
        models.engine,
        models.weights,
        min(slots, len(waiting)),
        longest=longest or len(waiting[0].tokens),
        max_new_tokens=max(request.settings.max_new_tokens for request in waiting),
        stops=max(1, *(len(request.settings.stop_ids) for request in waiting)),
    )
    _warm_slots(room(), waiting)
    yield from _refill(room(), waiting[::-1])


def serve_growing(models: Models, waiting: RequestsByLength, *, slots: int, max_new_tokens: int) -> Iterator[Answered]:
    """Answers the requests as `serve`, and those that the caller adds to `waiting` between two answers.

    Requests of one length class share slots, whose number is always `slots`, and classes follow each other from the
    shortest on, so an answer depends neither on the other requests nor on their order. Nothing is compiled ahead.
    """
    while waiting:
        longest = waiting.shortest
        rows = waiting.of(longest)
        stops = max(1, *(len(request.settings.stop_ids) for request in rows))
        room = Slots(models.engine, models.weights, slots, longest=longest, max_new_tokens=max_new_tokens, stops=stops)
        yield from _refill(room, rows)


class RequestsByLength:
    """Requests that wait in classes of like length, each for slots of its own: one long prompt widens no other's."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Request]] = {}

    def __bool__(self) -> bool:
        return any(self._waiting.values())

    def add(self, request: Request) -> None:
        """Lets a request wait, before all others of its class: conversations that have begun are finished first."""
        # Few classes: powers of two from a chunk on.
        self.of(max(CHUNK, 2 ** (len(request.tokens) - 1).bit_length())).append(request)

    def of(self, longest: int) -> list[Request]:
        """Returns the list itself of the requests whose class has prompts of up to `longest` tokens, the next last."""
        return self._waiting.setdefault(longest, [])

    def reverse(self) -> None:
        """Lets those that were added first come first; later ones come before them."""
        for requests in self._waiting.values():
            requests.reverse()

    @property
    def shortest(self) -> int:
        """The longest prompt of the first class in which requests wait."""
        return min(longest for longest, requests in self._waiting.items() if requests)


def _refill(running: Slots, waiting: list[Request]) -> Iterator[Answered]:
    """Answers what waits, the last first, in the slots; the caller may append to `waiting` between two answers."""
    held: dict[int, tuple[Request, float]] = {}
    started = time.perf_counter()
    while waiting or held:
        while waiting and running.free:
            row, request = running.free[0], waiting.pop()
            held[row] = request, time.perf_counter() - started
            running.admit(request, row)
        done = running.run()
        seconds = time.perf_counter() - started
        for row, answer in done.items():
            request, began = held.pop(row)
            yield Answered(request, answer, seconds, began)


def _warm_slots(running: Slots, requests: Sequence[Request]) -> None:
    """Runs every program that serving the requests will, once."""
    for request in {running.width(len(request.tokens)): request for request in requests}.values():
        running.admit(request, running.free[0])
        running.run(limit=1)
        if not running.free:
            running.run()


def warm_up(models: Models, requests: Requests, max_new_tokens: int) -> None:
    """Compiles what decoding `requests` runs, and runs a round of it: some kernels are built when they first run."""
    state = start(models.engine, models.weights, requests, max_new_tokens=max_new_tokens)
    jax.block_until_ready(run_rounds(models.engine, models.weights, state, np.int32(1)))
