"""Questions answered by a server, its acceptance read from its own metrics: a served drafter held to its promise.

A server shows no rounds, so rows hold texts and times, and acceptance comes from the difference of its counters before
and after each task, and from its answers where these say something of their own rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.data import jsonl
from jaxspec.data.questions import Question
from jaxspec.decoding.requests import Settings
from jaxspec.serving.endpoint import Client, RequestFailed, context_fields, in_flight, sampling_fields
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
    "ttft_ms": "median milliseconds from a request to the first chunk with text or thoughts",
}
"""Name of a figure -> how it is computed."""
SUMMARY = "summary"
"""Key of the figures behind the rows of a task."""


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


class ServedBook:
    """The file of a server's answers: the rows of a task, then its figures.

    A stopped run goes on behind its last whole task. Raises ValueError where the file was begun with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        noted = jsonl.journal(path, settings, of=path.parent, fields=("task", "temperature", "seed"))
        whole = max((number for number, record in enumerate(noted, 1) if SUMMARY in record), default=0)
        if whole < len(noted):
            jsonl.keep_lines(path, 1 + whole)
        self.rows = [ServedRow(**record) for record in noted[:whole] if SUMMARY not in record]
        self._figures = {_key(record): record[SUMMARY] for record in noted[:whole] if SUMMARY in record}

    @property
    def summary(self) -> list[dict[str, Any]]:
        """The figures of every task, temperature and seed."""
        return list(self._figures.values())

    def figures(self, task: str, settings: Settings) -> dict[str, Any] | None:
        """Returns the figures of a task; None where it is not noted."""
        return self._figures.get((task, settings.temperature, settings.seed))

    def add(self, done: ServedTask, settings: Settings) -> None:
        """Notes the answers and figures of a task; they are on disk when this returns."""
        figures = summarize_served(done)
        about = {"task": figures["task"], "temperature": settings.temperature, "seed": settings.seed}
        jsonl.append(self.path, [*map(dataclasses.asdict, done.rows), about | {SUMMARY: figures}])
        self.rows += done.rows
        self._figures[_key(about)] = figures


def _key(record: Mapping[str, Any]) -> tuple[str, float, int]:
    return record["task"], record["temperature"], record["seed"]


def by_task(questions: Sequence[Question]) -> dict[str, list[tuple[int, Question]]]:
    """Returns the questions with their places, by task."""
    found: dict[str, list[tuple[int, Question]]] = {}
    for place, question in enumerate(questions):
        found.setdefault(question.task, []).append((place, question))
    return found


def answer_task(
    client: Client, mine: Sequence[tuple[int, Question]], settings: Settings, variables: Mapping[str, Any]
) -> ServedTask:
    """Returns the answers to a task, as many requests in flight as the client allows.

    `variables` are those of the chat template; a question's own go before them. Raises ServerRefused where the server
    refuses every request, and ValueError where it was started again meanwhile.
    """
    before, began = read_counters(client), time.perf_counter()
    asked = functools.partial(_answer_one, client, settings, variables)
    answered = dict(in_flight(asked, mine, client.endpoint.concurrency))
    rows = [row for place, _ in mine for row in answered[place]]
    wall, after = time.perf_counter() - began, read_counters(client)
    gained = None if before is None or after is None else after.since(before)
    return ServedTask(rows, gained, wall)


def _answer_one(
    client: Client, run: Settings, variables: Mapping[str, Any], one: tuple[int, Question]
) -> tuple[int, list[ServedRow]]:
    """Returns a question's place, and its answers."""
    place, question = one
    return place, answer(client, question, (run, run.for_row(place)), variables)


def answer(
    client: Client, question: Question, settings: tuple[Settings, Settings], variables: Mapping[str, Any]
) -> list[ServedRow]:
    """Returns a row for each turn of a question; a second turn follows the server's own first answer.

    `settings` are the run's, and with a seed of the question's own.
    """
    run, own = settings
    texts: list[str] = []
    rows = []
    for turn in range(question.turns):
        about = (question.prompt.id, question.task, turn, run.temperature, run.seed)
        if question.prompt.problem:
            return [ServedRow(*about, error=question.prompt.problem)]
        prompt = question.asked(texts)
        context = context_fields(prompt.messages, prompt.tools, {**variables, **prompt.variables})
        try:
            said = stream(client, "/chat/completions", context | sampling_fields(own))
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
