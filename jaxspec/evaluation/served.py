"""Questions answered by a server, its acceptance read from its own metrics: a served drafter held to its promise.

A server shows no rounds, so rows hold texts and times, and acceptance comes from the difference of its counters before
and after each task, and from its answers where these say something of their own rounds.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.data.questions import Question
from jaxspec.decoding.requests import Settings
from jaxspec.serving.endpoint import Client, RequestFailed, wire_messages
from jaxspec.serving.served_acceptance import Counters
from jaxspec.serving.streaming_client import StreamedAnswer, read_counters, stream

FORMAT = "jaxspec-served/1"
FORMULAS = {
    "acceptance_length": "1 + accepted / drafts of the server's counters, as vLLM prints it",
    "survival": "accepted at each position of the draft / drafts",
    "acceptance_rate": "accepted / drafted tokens",
    "tau_micro": "1 + sum accepted / sum rounds, of answers that say so themselves",
    "tokens_per_second": "new tokens of the task / its wall time, all requests in flight",
    "user_tokens_per_second": "median over answers of (new tokens - 1) / (seconds - time to first token)",
    "ttft_ms": "median milliseconds from a request to the first chunk with text",
}
"""Name of a figure -> how it is computed."""


@dataclasses.dataclass(frozen=True)
class ServedRow:
    """A server's answer to one turn. A row with an `error` has no figures."""

    id: str
    task: str
    turn: int
    temperature: float
    seed: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    """Ids, where the server gives them."""
    count: int = 0
    prompt_tokens: int = 0
    finish: str = ""
    ttft_seconds: float = 0.0
    seconds: float = 0.0
    chunk_seconds: tuple[float, ...] = ()
    rounds: int | None = None
    """Rounds and accepted drafts, where the answer says so."""
    accepted: int | None = None
    error: str = ""


class ServedTask(NamedTuple):
    """All answers of a task."""

    rows: list[ServedRow]
    counters: Counters | None
    """The gain of its counters; None where the server shows none."""
    wall_seconds: float


def answer_tasks(client: Client, questions: Sequence[Question], settings: Settings) -> Iterator[ServedTask]:
    """Yields the answers task by task, as many requests in flight as the client allows.

    Raises ServerRefused where the server refuses every request, and ValueError where it was started again meanwhile.
    """
    for task in dict.fromkeys(question.task for question in questions):
        mine = [(i, q) for i, q in enumerate(questions) if q.task == task]
        before, began = read_counters(client), time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(client.endpoint.concurrency) as pool:
            answered = pool.map(lambda one: answer(client, one[1], settings.for_row(one[0]), settings), mine)
            rows = [row for turns in answered for row in turns]
        wall, after = time.perf_counter() - began, read_counters(client)
        gained = None if before is None or after is None else after.since(before)
        yield ServedTask(rows, gained, wall)


def answer(client: Client, question: Question, own: Settings, run: Settings) -> list[ServedRow]:
    """Returns a row for each turn of a question; a second turn follows the server's own first answer."""
    texts: list[str] = []
    rows = []
    for turn in range(question.turns):
        about = (question.prompt.id, question.task, turn, run.temperature, run.seed)
        if question.prompt.problem:
            return [ServedRow(*about, error=question.prompt.problem)]
        body = {
            "messages": wire_messages(question.asked(texts).messages),
            "max_tokens": own.max_new_tokens,
            "temperature": own.temperature,
            "top_p": own.top_p,
            "seed": own.seed,
        }
        try:
            said = stream(client, "/chat/completions", body)
        except RequestFailed as error:
            return [*rows, ServedRow(*about, error=str(error))]
        rows.append(_row(about, said))
        texts.append(said.text)
    return rows


def _row(about: tuple[Any, ...], said: StreamedAnswer) -> ServedRow:
    own = said.acceptance
    return ServedRow(
        *about,
        text=said.text,
        tokens=said.tokens,
        count=said.count,
        prompt_tokens=said.prompt_tokens,
        finish=said.finish,
        ttft_seconds=said.ttft_seconds,
        seconds=said.seconds,
        chunk_seconds=said.chunk_seconds,
        rounds=None if own is None else own.rounds,
        accepted=None if own is None else own.accepted,
    )


def summarize_served(done: ServedTask) -> dict[str, Any]:
    """Returns the figures of a task; those that the server does not tell are None."""
    rows = [row for row in done.rows if not row.error]
    counted = [row for row in rows if row.rounds]
    steady = [(r.count - 1) / (r.seconds - r.ttft_seconds) for r in rows if r.count > 1 and r.seconds > r.ttft_seconds]
    tokens, rounds = sum(row.count for row in rows), sum(row.rounds or 0 for row in counted)
    figures = Counters(0, 0, 0, ()).figures() if done.counters is None else done.counters.figures()
    return {
        "task": done.rows[0].task,
        "method": "served",
        "temperature": done.rows[0].temperature,
        "answers": len(rows),
        "failed": len(done.rows) - len(rows),
        "tokens": tokens,
        **figures,
        "tau_micro": 1 + sum(row.accepted or 0 for row in counted) / rounds if rounds else None,
        "tokens_per_second": tokens / done.wall_seconds,
        "user_tokens_per_second": float(np.median(steady)) if steady else None,
        "ttft_ms": 1e3 * float(np.median([row.ttft_seconds for row in rows])) if rows else None,
    }
