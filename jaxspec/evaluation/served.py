"""Questions answered by a server, its acceptance read from its own figures: a served drafter held to its promise.

Turns that the server fails (it is away, overloaded, silent, or breaks off) get no row: the next run asks them again,
and only them. A prompt that it refuses is a row with an error.
"""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxspec.data.questions import Question
from jaxspec.decoding.requests import Settings
from jaxspec.evaluation.served_checks import check_sitting
from jaxspec.evaluation.served_metrics import summarize_served
from jaxspec.evaluation.served_rows import Pass, ServedBook, ServedRow, Sitting
from jaxspec.parallel.agreement import say
from jaxspec.serving.endpoint import Client, RequestFailed, ServerRefused, context_fields, in_flight, sampling_fields
from jaxspec.serving.served_acceptance import Counters
from jaxspec.serving.streaming_client import StreamedAnswer, read_page, stream

REASONS, LONGEST = 3, 120
"""Reasons for turns without an answer that are told, and the letters of each."""


class OpenQuestion(NamedTuple):
    """A question, and what is known of it in one pass."""

    place: int
    """In the file of questions: its own seed follows from it."""
    question: Question
    done: tuple[ServedRow, ...]
    """Rows of its first turns, which are not asked again."""

    @property
    def left(self) -> int:
        """Turns that are to be asked."""
        return 0 if self.done and self.done[-1].error else self.question.turns - len(self.done)


class QuestionOutcome(NamedTuple):
    """The rows of one question in a sitting, or why there are none."""

    asked: OpenQuestion
    rows: list[ServedRow]
    ended: float
    """When its last answer came."""
    failure: str = ""
    """Why the server gave no further answer; empty where it did."""

    @property
    def left(self) -> int:
        """Turns that are still to be asked."""
        return self.asked._replace(done=(*self.asked.done, *self.rows)).left


def by_task(questions: Sequence[Question]) -> dict[str, list[tuple[int, Question]]]:
    """Returns the questions with their places, by task."""
    found: dict[str, list[tuple[int, Question]]] = {}
    for place, question in enumerate(questions):
        found.setdefault(question.task, []).append((place, question))
    return found


class ServedRun:
    """All tasks at all temperatures and seeds, asked of one server."""

    def __init__(self, questions: Sequence[Question], passes: Sequence[Settings], book: ServedBook) -> None:
        self.tasks, self.passes, self.book = by_task(questions), passes, book
        self.failures: collections.Counter[str] = collections.Counter()
        """Why turns have no answer, of this run."""

    def __len__(self) -> int:
        return len(self.tasks) * len(self.passes)

    def ask(self, client: Client, variables: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
        """Asks for every answer that is left; `tell` is told the figures of each task.

        `variables` are those of the chat template; a question's own go before them. Raises ServerRefused where the
        server refuses every request, when what it has answered is noted.
        """
        for settings, task in itertools.product(self.passes, self.tasks):
            of = (task, settings.temperature, settings.seed)
            left = [asked for asked in self._asked(of) if asked.left]
            if left:
                self._sit(client, left, settings, variables, of)
            tell(self.figures(of))

    def _sit(
        self, client: Client, left: Sequence[OpenQuestion], settings: Settings, variables: Mapping[str, Any], of: Pass
    ) -> None:
        """Notes what the server answers of a task, as many requests in flight as the client allows."""
        before, began = read_page(client), time.perf_counter()
        answered: dict[int, QuestionOutcome] = {}
        refusal = None
        try:
            for one in in_flight(
                lambda asked: answer(client, asked, settings, variables), left, client.endpoint.concurrency
            ):
                answered[one.asked.place] = one
        except ServerRefused as error:
            refusal = error
        found = [answered[asked.place] for asked in left if asked.place in answered]
        after = read_page(client)
        # Of requests that were given up, the server may count more to come.
        gained = None if refusal else _gained(before.counters, after.counters)
        wall = max((one.ended for one in found if one.rows), default=began) - began
        settled = sum(one.asked.left - one.left for one in found)
        rows = [row for one in found for row in one.rows]
        sitting = Sitting(len(rows), sum(asked.left for asked in left) - settled, wall, gained, after.gauges)
        self.book.add(of, rows, sitting)
        if problems := check_sitting(rows, sitting, self.book.file.settings):
            say(f"note: task {of[0]}: {len(problems)} things that the server says cannot be; the first: {problems[0]}")
        self.failures.update(one.failure for one in found if one.failure)
        if refusal is not None:
            raise refusal

    def _asked(self, of: Pass) -> list[OpenQuestion]:
        """Returns the questions of a task with the rows of this pass."""
        mine: dict[str, list[ServedRow]] = {}
        for row in sorted(self.book.rows_of(of), key=lambda row: row.turn):
            mine.setdefault(row.id, []).append(row)
        return [OpenQuestion(place, q, tuple(mine.get(q.prompt.id, ()))) for place, q in self.tasks[of[0]]]

    def figures(self, of: Pass) -> dict[str, Any]:
        """Returns the figures of a task at one temperature and seed."""
        unanswered = sum(asked.left for asked in self._asked(of))
        return summarize_served(of, unanswered, self.book.rows_of(of), self.book.sittings_of(of))

    @property
    def summary(self) -> list[dict[str, Any]]:
        """The figures of all."""
        every = itertools.product(self.passes, self.tasks)
        return [self.figures((task, settings.temperature, settings.seed)) for settings, task in every]

    def sentence(self) -> str:
        """Returns how many turns have no answer, why, and what asks them again; empty where all have one."""
        file, said = self.book.file, []
        turns = len(self.passes) * sum(question.turns for mine in self.tasks.values() for _, question in mine)
        if unanswered := sum(row["unanswered"] for row in self.summary):
            reasons = "; ".join(reason for reason, _ in self.failures.most_common(REASONS))
            said.append(
                f"{unanswered:,} of {turns:,} turns have no answer ({reasons}): the same command asks them again"
            )
        if failed := sum(bool(row.error) for row in file.rows):
            said.append(f"{failed:,} of {turns:,} turns failed for good: {self.book.path} says why")
        return ", and ".join(said)


def _gained(before: Counters | None, after: Counters | None) -> Counters | None:
    """Returns what counters gained; None where they are not known, or the server was started again meanwhile."""
    if before is None or after is None:
        return None
    try:
        return after.since(before)
    except ValueError:
        return None


def answer(client: Client, asked: OpenQuestion, settings: Settings, variables: Mapping[str, Any]) -> QuestionOutcome:
    """Returns a row for each turn that is left; a second turn follows the server's own first answer.

    It ends at a turn without an answer: with a row that has an error where the server refuses the prompt, and without
    one where it may answer later.
    """
    place, question, done = asked
    texts, own = [row.text for row in done], settings.for_row(place)
    rows: list[ServedRow] = []
    ended = time.perf_counter()
    for turn in range(len(done), question.turns):
        about = (question.prompt.id, question.task, turn, settings.temperature, settings.seed)
        if question.prompt.problem:
            return QuestionOutcome(asked, [ServedRow(*about, error=question.prompt.problem)], ended)
        prompt = question.asked(texts)
        context = context_fields(prompt.messages, prompt.tools, {**variables, **prompt.variables})
        try:
            said = stream(client, "/chat/completions", context | sampling_fields(own))
        except RequestFailed as error:
            if error.passes:
                return QuestionOutcome(asked, rows, ended, " ".join(str(error).split())[:LONGEST])
            return QuestionOutcome(asked, [*rows, ServedRow(*about, error=str(error))], ended)
        ended = time.perf_counter()
        rows.append(_row(about, said))
        texts.append(said.text)
    return QuestionOutcome(asked, rows, ended)


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
        drafted=None if own is None else own.drafted,
        histogram=() if own is None else own.histogram,
    )
