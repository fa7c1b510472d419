"""Arms measured on the same questions in one run: batch by batch, taking turns, so that all meet the same machine.

Every arm answers the same prompts: in a conversation's second turn all of them continue plain decoding's first answer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec.data.prompts import encode_prompt
from jaxspec.data.questions import Question
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.generation import NO_LIMIT, collect, run_prefill, run_rounds, sizes
from jaxspec.decoding.requests import Request, Requests, Settings, fill_up, make_requests
from jaxspec.evaluation.arms import DecodingArm
from jaxspec.evaluation.equivalence import divergences
from jaxspec.evaluation.rejected_drafts import rejected_drafts
from jaxspec.evaluation.rows import PLAIN, Row, rounds_of
from jaxspec.parallel.agreement import say
from jaxspec.serving import queue
from jaxspec.serving.loading import Models
from jaxspec.verify import RULES

LEAST_WIDTH = 256
"""Prompts are padded for caches of this width, or of a power of two above: one program a width and arm."""
SLOT_TURNS = 16
"""Answers of a slot in one group: what is done is noted between groups, and rows idle at the end of each."""
WARM_ROUNDS = 2
"""Rounds of the first, uncounted call of a program."""


class AskedTurn(NamedTuple):
    """A turn of a question as the target reads it, or why it cannot."""

    index: int
    question: Question
    turn: int
    request: Request | None
    problem: str = ""


class AnswerBatch(NamedTuple):
    """Answers that are decoded in one batch."""

    name: str
    asked: list[AskedTurn]
    requests: Requests
    """Of a batch the arrays it is decoded as, padded to its size; in slots those of all answers."""
    capacity_for: int
    """Width of the prompts that its caches are made for; in slots the longest prompt of the turn."""


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """The arms, and how they are measured."""

    arms: Mapping[str, DecodingArm]
    batch: int
    repeats: int
    max_new_tokens: int
    slots: int = 0
    """Slots that answers enter and leave one by one, in the place of batches; 0: batches."""
    rejected_of: frozenset[str] = frozenset()
    """Ids of the questions whose rejected drafts are kept."""

    @property
    def plain(self) -> Models:
        """The target alone."""
        return self.arms[PLAIN].models

    def comparable(self, name: str, temperature: float) -> bool:
        """Returns whether an arm's text must be that of plain decoding, token for token."""
        engine = self.arms[name].models.engine
        return engine.tree is None or temperature == 0 or engine.rule is RULES["target-draw"]


def ask(
    models: Models, questions: Sequence[Question], done: Mapping[str, Sequence[str]], at: Settings, turn: int
) -> list[AskedTurn]:
    """Returns turn `turn` of all questions that have it; `done` are the answers so far by question id.

    `at` holds the run's seed, from which each question's own follows. A question whose earlier turn failed has no
    later one.
    """
    found = []
    for index, question in enumerate(questions):
        answers = done.get(question.prompt.id, ())
        if question.turns <= turn or len(answers) < turn:
            continue
        try:
            tokens = encode_prompt(question.asked(answers), models.tokenizer)
            request = models.request(tokens, at.for_row(index), index)
            found.append(AskedTurn(index, question, turn, request))
        except ValueError as error:
            found.append(AskedTurn(index, question, turn, None, str(error)))
    return found


def group(setup: SideBySide, asked: Sequence[AskedTurn]) -> list[AnswerBatch]:
    """Returns the readable turns in batches of like length, the shortest first."""
    able = sorted((a for a in asked if a.request is not None), key=lambda a: (len(_tokens(a)), a.index))
    if setup.slots and able:
        return _slot_groups(setup, able)
    classes: dict[int, list[AskedTurn]] = {}
    for one in able:
        classes.setdefault(_padded(one), []).append(one)
    groups = []
    for width, mine in classes.items():
        for begin in range(0, len(mine), setup.batch):
            chosen = mine[begin : begin + setup.batch]
            requests = make_requests(fill_up([a.request for a in chosen if a.request], setup.batch))
            groups.append(
                AnswerBatch(f"turn {chosen[0].turn}, from {chosen[0].question.prompt.id}", chosen, requests, width)
            )
    return groups


def _slot_groups(setup: SideBySide, able: Sequence[AskedTurn]) -> list[AnswerBatch]:
    """Returns turns, shortest first, in even groups that fill the slots some times over; all share their programs."""
    count = max(1, len(able) // (SLOT_TURNS * setup.slots))
    bounds = [len(able) * n // count for n in range(count + 1)]
    groups = []
    for begin, end in itertools.pairwise(bounds):
        mine = list(able[begin:end])
        name = f"turn {mine[0].turn}, {setup.slots} slots, from {mine[0].question.prompt.id}"
        requests = make_requests([a.request for a in mine if a.request])
        groups.append(AnswerBatch(name, mine, requests, len(_tokens(able[-1]))))
    return groups


def keys(setup: SideBySide, chosen: AnswerBatch, at: Settings) -> list[tuple[Any, ...]]:
    """Returns the keys of all rows that a batch gives."""
    asked = [(a.question.prompt.id, a.turn) for a in chosen.asked]
    return [(arm, at.temperature, at.seed, *one) for arm in setup.arms for one in asked]


def failures(setup: SideBySide, asked: Sequence[AskedTurn], at: Settings) -> list[Row]:
    """Returns a row of every arm for each turn that the target cannot read."""
    return [_row(a, name, at, error=a.problem) for a in asked if a.request is None for name in setup.arms]


def measure(
    setup: SideBySide,
    chosen: AnswerBatch,
    at: Settings,
    warmed: set[Any],
    turn: int,
    tell: Callable[[str], None] = lambda status: None,
) -> Iterator[tuple[str, list[Row]]]:
    """Yields each arm's rows of a batch once all repeats of it are done, plain decoding's first.

    `warmed` holds the programs that have run, and gains those that this batch warms up. `turn` numbers the batch: every
    other one begins with the last arm. `tell` is told how far the slots of an arm are.
    """
    order = list(setup.arms)
    decode = functools.partial(_decode_in_slots, tell) if setup.slots else _decode
    for name in order if not setup.slots else ():
        _warm(setup, name, chosen, warmed)
    taken: dict[str, list[Timed]] = {name: [] for name in order}
    for repeat in range(setup.repeats):
        for name in order if (turn + repeat) % 2 == 0 else order[::-1]:
            taken[name].append(decode(setup, name, chosen))
    plain = taken[PLAIN][0].answers
    for name, runs in taken.items():
        yield name, _rows(setup, name, chosen, at, runs, plain)


class Timed(NamedTuple):
    """One arm's answers to a batch, and their time."""

    answers: list[Answer]
    prefill_seconds: float
    decode_seconds: float
    own_latency: Sequence[float] = ()
    """Of each answer, in slots."""
    wall_seconds: float = 0.0
    """From the beginning to the end, read from the clock once more."""


def _decode(setup: SideBySide, name: str, chosen: AnswerBatch, limit: Any = NO_LIMIT) -> Timed:
    """Returns a batch's answers by one arm, prefill and rounds timed apart."""
    models = setup.arms[name].models
    capacity, slots = sizes(models.engine, chosen.capacity_for, setup.max_new_tokens)
    started = time.perf_counter()
    state = jax.block_until_ready(run_prefill(models.engine, models.weights, chosen.requests, capacity, slots))
    prefill_seconds, between = time.perf_counter() - started, time.perf_counter()
    state = jax.block_until_ready(run_rounds(models.engine, models.weights, state, limit))
    decode_seconds, wall_seconds = time.perf_counter() - between, time.perf_counter() - started
    return Timed(collect(state), prefill_seconds, decode_seconds, wall_seconds=wall_seconds)


def _decode_in_slots(tell: Callable[[str], None], setup: SideBySide, name: str, chosen: AnswerBatch) -> Timed:
    """Returns all answers by one arm, its rows taking the next prompt as they end; everything is compiled before."""
    models, wall = setup.arms[name].models, 0.0
    requests = [a.request._replace(key=number) for number, a in enumerate(chosen.asked) if a.request is not None]
    answers: dict[int, Answer] = {}
    latency = [0.0] * len(requests)
    for request, answer, seconds, began in queue.serve(
        models, requests, slots=setup.slots, longest=chosen.capacity_for
    ):
        answers[request.key], latency[request.key], wall = answer, seconds - began, seconds
        tell(f"{name}: {len(answers):,} of {len(requests):,} answers")
    return Timed([answers[number] for number in range(len(requests))], 0.0, wall, latency, wall)


def _warm(setup: SideBySide, name: str, chosen: AnswerBatch, warmed: set[Any]) -> None:
    """Runs the programs of a batch once, where they have not been run."""
    program = (name, chosen.requests.tokens_BL.shape, chosen.capacity_for)
    if program not in warmed:
        _decode(setup, name, chosen, np.int32(WARM_ROUNDS))
        warmed.add(program)


def _rows(
    setup: SideBySide, name: str, chosen: AnswerBatch, at: Settings, runs: Sequence[Timed], plain: Sequence[Answer]
) -> list[Row]:
    """Returns the rows of a batch by one arm."""
    answers, count = runs[0].answers, len(chosen.asked)
    calls = max(answer.calls for answer in answers[:count])
    comparable, parted = setup.comparable(name, at.temperature), {}
    if comparable and name != PLAIN:
        found = divergences(setup.plain.engine, setup.plain.weights, chosen.requests, answers[:count], plain[:count])
        parted = {d.row: (d.index, d.margin) for d in found}
    rows = []
    for number, (asked, answer) in enumerate(zip(chosen.asked, answers, strict=False)):
        rows.append(
            _row(
                asked,
                name,
                at,
                tokens=tuple(answer.tokens.tolist()),
                finish=answer.finish,
                **rounds_of(answer)._asdict(),
                rejected=_rejected(setup, name, asked, answer),
                group=chosen.name,
                group_rows=count,
                group_calls=calls,
                prefill_seconds=tuple(run.prefill_seconds for run in runs),
                decode_seconds=tuple(run.decode_seconds for run in runs),
                wall_seconds=tuple(run.wall_seconds for run in runs),
                own_latency=tuple(run.own_latency[number] for run in runs if run.own_latency),
                identical=number not in parted if comparable else None,
                divergence=parted.get(number),
            )
        )
    return rows


def _rejected(setup: SideBySide, name: str, asked: AskedTurn, answer: Answer) -> tuple[tuple[int, ...], ...]:
    """Returns the rejected drafts of an answer whose drafts are kept; says where they cannot be."""
    models = setup.arms[name].models
    if models.engine.tree is None or asked.request is None or asked.question.prompt.id not in setup.rejected_of:
        return ()
    found = rejected_drafts(models, asked.request, answer, _padded(asked))
    if found is None:
        alone = f"{name} writes another text, or in other rounds, alone than in the batch"
        say(f"note: {asked.question.prompt.id}: {alone}; no drafts are kept")
    return tuple(map(tuple, found or ()))


def _padded(asked: AskedTurn) -> int:
    """Returns the width that a prompt's caches are made for."""
    return max(LEAST_WIDTH, 2 ** (len(_tokens(asked)) - 1).bit_length())


def _row(asked: AskedTurn, arm: str, at: Settings, **figures: Any) -> Row:
    """Returns a row with the facts of its prompt."""
    tokens = [] if asked.request is None else _tokens(asked)
    return Row(
        id=asked.question.prompt.id,
        task=asked.question.task,
        turn=asked.turn,
        arm=arm,
        temperature=at.temperature,
        seed=at.seed,
        prompt_tokens=len(tokens),
        prompt_hash=hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()[:16],
        **figures,
    )


def _tokens(asked: AskedTurn) -> Sequence[int] | np.ndarray:
    assert asked.request is not None
    return asked.request.tokens
