"""From prompts to answers: a queue decoded in batches of like length, or in slots that are refilled."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec.decoding.generation import NO_LIMIT, collect, run_rounds, start, tau
from jaxspec.decoding.requests import Requests, bucket, make_requests
from jaxspec.decoding.slots import Slots
from jaxspec.serving.loading import Models
from jaxspec.targets.decoder import LlamaConfig

SEEDS = 2**32
"""Seeds are below this."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are drawn. ValueError names a field out of range."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 decodes greedily."""
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0
    draft_temperature: float | None = None
    """Of the distribution that drawn children come from; None for `temperature`."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer, besides the model's own."""

    def __post_init__(self) -> None:
        for name, holds, range_ in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            ("draft_temperature", 0 <= (self.draft_temperature or 0) < float("inf"), "0 (likeliest) or above"),
            ("top_k", self.top_k >= 0, "0 (keep all) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not holds:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be {range_}")


def row_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` of a run: the same in whatever batch, shard or order it is decoded."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def check_length(tokens: np.ndarray, config: LlamaConfig) -> None:
    """ValueError, a sentence without its subject, if the target has no position left for a single new token."""
    if not len(tokens):
        raise ValueError("is empty")
    if len(tokens) >= config.max_positions:
        raise ValueError(
            f"has {len(tokens):,} tokens, and the target has {config.max_positions:,} positions: shorten it"
        )


class Job(NamedTuple):
    """One prompt in the queue."""

    key: Any
    """The caller's own name for it."""
    tokens: np.ndarray
    seed: int = 0
    settings: Settings | None = None
    """Its own; None for those of the queue."""


class Answer(NamedTuple):
    """What the target wrote."""

    tokens: np.ndarray
    """New tokens, the stop id included."""
    finish: str
    """`stop`, or `length` at the budget or the target's last position."""
    calls: int
    accepted: np.ndarray
    """Rounds that accepted 0, 1, .. T drafted tokens."""

    @property
    def tau(self) -> float:
        """Tokens per target call, bonus tokens included; the prefill call and the token it gives are not counted."""
        return tau(len(self.tokens) - 1, self.calls)


class Batch(NamedTuple):
    """Jobs that were decoded together."""

    jobs: list[Job]
    answers: list[Answer]
    seconds: float
    """From the prompts to the last token, on the host's clock."""

    @property
    def tokens(self) -> int:
        """New tokens of all answers."""
        return sum(len(a.tokens) for a in self.answers)


class Queue:
    """Prompts that wait, by padded length: a batch holds one length only, so what a prompt gets does not depend on
    which others stand beside it, and few programs are compiled."""

    def __init__(self, jobs: Iterable[Job], *, batch: int) -> None:
        self.batch = batch
        self._waiting: dict[int, list[Job]] = {}
        for job in jobs:
            self.add(job)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, job: Job) -> None:
        """Let `job` wait; jobs may be added while the queue is being decoded."""
        self._waiting.setdefault(bucket(len(job.tokens)), []).append(job)

    def take(self) -> list[Job]:
        """The next batch: a full one of the longest prompts, else what waits of the shortest.

        So conversations that have begun are finished before others are begun, and batches fill up.
        """
        full = [width for width, jobs in self._waiting.items() if len(jobs) >= self.batch]
        width = max(full) if full else min(self._waiting)
        taken, left = self._waiting[width][: self.batch], self._waiting[width][self.batch :]
        self._waiting[width] = left
        if not left:
            del self._waiting[width]
        return taken


def answer(models: Models, queue: Queue, settings: Settings, *, warm: bool = False) -> Iterator[Batch]:
    """Decode the queue until it is empty, a batch at a time; yields each batch when it is done.

    The last batch of a length is padded with rows that end at once. With `warm`, a batch of a new length is prepared
    before its clock starts, so that `seconds` hold no compilation.
    """
    warmed: set[int] = set()
    while queue:
        jobs = queue.take()
        requests = batch_requests(models, jobs, settings, batch=queue.batch)
        if warm and requests.tokens_BL.shape[1] not in warmed:
            warm_up(models, requests, settings)
            warmed.add(requests.tokens_BL.shape[1])
        started = time.perf_counter()
        state = start(models.engine, models.weights, requests, max_new_tokens=settings.max_new_tokens)
        done = collect(run_rounds(models.engine, models.weights, state, NO_LIMIT))
        seconds = time.perf_counter() - started
        rows = zip(done.tokens, done.finish, done.calls.tolist(), done.accepted, strict=True)
        yield Batch(jobs, [Answer(*row) for row in rows][: len(jobs)], seconds)


class Served(NamedTuple):
    """A prompt that was answered in a slot."""

    job: Job
    answer: Answer
    seconds: float
    """Of the queue so far, compilation left out."""


def serve(models: Models, jobs: Sequence[Job], settings: Settings, *, slots: int) -> Iterator[Served]:
    """Answer the jobs in `slots` rows of one running batch, each row taking the next job when it has finished.

    Yields as they finish. Everything is compiled before the first. What a prompt gets does not depend on which others
    run beside it.
    """
    jobs = sorted(jobs, key=lambda job: -len(job.tokens))
    if not jobs:
        return
    budgets = [budget(models, job, settings) for job in jobs]
    room = functools.partial(
        Slots,
        models.engine,
        models.weights,
        min(slots, len(jobs)),
        longest=len(jobs[0].tokens),
        max_new_tokens=max(budgets),
        stops=max(1, *(len(stop_ids(models, job, settings)) for job in jobs)),
    )
    _warm(models, room(), jobs, settings)
    running, waiting, held = room(), list(reversed(jobs)), {}
    started = time.perf_counter()
    while waiting or held:
        while waiting and running.free:
            job, row = waiting.pop(), running.free[0]
            running.admit(slot_request(models, job, settings, running), row)
            held[row] = job
        done = running.run()
        seconds = time.perf_counter() - started
        for row, g in done.items():
            yield Served(held.pop(row), Answer(g.tokens[0], g.finish[0], int(g.calls[0]), g.accepted[0]), seconds)


def _warm(models: Models, running: Slots, jobs: Sequence[Job], settings: Settings) -> None:
    """Run every program that serving `jobs` will, once."""
    for job in {running.width(len(job.tokens)): job for job in jobs}.values():
        running.admit(slot_request(models, job, settings, running), running.free[0])
        running.run(limit=1)
        if not running.free:
            running.run()


def slot_request(models: Models, job: Job, settings: Settings, running: Slots) -> Requests:
    """`job` as the one row that a slot takes."""
    width = running.width(len(job.tokens))
    return batch_requests(models, [job], settings, batch=1, width=width, stop_width=running.stops)


def budget(models: Models, job: Job, settings: Settings) -> int:
    """New tokens the job may have; answers end at the target's last position."""
    return min((job.settings or settings).max_new_tokens, models.config.max_positions - len(job.tokens))


def stop_ids(models: Models, job: Job, settings: Settings) -> tuple[int, ...]:
    """Ids that end the job's answer."""
    return (*models.stop_ids, *(job.settings or settings).stop_ids)


def batch_requests(
    models: Models, jobs: list[Job], settings: Settings, *, batch: int, width: int = 0, stop_width: int = 1
) -> Requests:
    """`jobs` as `batch` rows; answers end at the target's last position, rows that pad with their first token."""
    rows = jobs + jobs[-1:] * (batch - len(jobs))
    own = [job.settings or settings for job in rows]
    drafts_at = [s.temperature if s.draft_temperature is None else s.draft_temperature for s in own]
    return make_requests(
        [job.tokens for job in rows],
        max_new_tokens=[budget(models, job, settings) for job in jobs] + [1] * (batch - len(jobs)),
        temperature=[s.temperature for s in own],
        top_k=[s.top_k for s in own],
        top_p=[s.top_p for s in own],
        seed=[job.seed for job in rows],
        stop_ids=[stop_ids(models, job, settings) for job in rows],
        draft_temperature=drafts_at,
        vocab=models.config.vocab,
        width=width,
        stop_width=stop_width,
    )


def warm_up(models: Models, requests: Requests, settings: Settings) -> None:
    """Compile what decoding `requests` runs, and run a round of it: some kernels are built when they first run."""
    state = start(models.engine, models.weights, requests, max_new_tokens=settings.max_new_tokens)
    jax.block_until_ready(run_rounds(models.engine, models.weights, state, np.int32(1)))
