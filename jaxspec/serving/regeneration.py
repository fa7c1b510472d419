"""The target as its own teacher: it answers the user turns of a data set, and writes user turns where there is none."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.messages import Conversation, Message
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.requests import Settings
from jaxspec.serving.loading import Models
from jaxspec.serving.queue import RequestsByLength, serve_growing

STOPPED, LENGTH, UNFIT = "stop", "length", "unfit"
_TEMPERATURE_DRAW = 1
"""Keeps the draw of a conversation's temperature apart from its noise."""


@dataclasses.dataclass(frozen=True)
class Temperatures:
    """Temperatures to answer at, each conversation at one of them. ValueError names a field out of range."""

    values: tuple[float, ...]
    weights: tuple[float, ...]
    """How often each value is drawn, relative to the others."""

    def __post_init__(self) -> None:
        for value in self.values:
            if not 0 <= value < math.inf:
                raise ValueError(f"temperatures hold {value:g}; each must be 0 (greedy) or above")
        for weight in self.weights:
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights of temperatures hold {weight:g}; each must be 0 or above")
        if len(self.values) != len(self.weights) or not 0 < math.fsum(self.weights) < math.inf:
            raise ValueError("weights of temperatures must be one for each, and not all 0")
        if len(set(self.values)) != len(self.values):
            raise ValueError("temperatures hold one twice; give it once, with a larger weight")

    def draw(self, seed: int, index: int) -> float:
        """Returns the temperature of conversation `index` of a run: the same in whatever batch, shard or order."""
        bits = np.random.SeedSequence((seed, index, _TEMPERATURE_DRAW)).generate_state(1)[0]
        shares = np.cumsum(self.weights) / math.fsum(self.weights)
        place = int(np.searchsorted(shares, int(bits) / 2**32, side="right"))
        return self.values[min(place, int(np.flatnonzero(self.weights)[-1]))]  # the last share may round below 1


def parse_temperatures(text: str) -> Temperatures:
    """Returns the temperatures of `0:1,0.3:2,1`, each with its weight or 1. Raises ValueError for any other form."""
    pairs = [item.partition(":") for item in text.split(",")]
    try:
        values = tuple(float(value) for value, _, _ in pairs)
        weights = tuple(float(weight) if colon else 1.0 for _, colon, weight in pairs)
    except ValueError:
        raise ValueError(
            f"temperatures are {text!r}; they must be numbers, perhaps each with a weight: 0:1,0.3:1,0.7:2"
        ) from None
    return Temperatures(values, weights)


class Rewritten(NamedTuple):
    """A conversation whose assistant turns are the target's."""

    conversation: Conversation
    finish: str
    """`stop`: every answer ended by itself; `length`: the last one was cut at the budget, and what follows is missing;
    `unfit`: the next turn has no room in the target's positions, or its template refuses it, and is missing."""
    turns: int
    """Answers, a cut one included."""
    tokens: int
    """Tokens of the answers, stop ids included."""
    temperature: float
    """The answers were drawn at."""

    @property
    def complete(self) -> bool:
        """Returns whether it holds answers, all of them whole."""
        return self.turns > 0 and self.finish != LENGTH

    def record(self) -> dict[str, Any]:
        """Returns its line of JSON: a conversation as `read_conversations` reads it, and facts about its answers."""
        about = {"finish": self.finish, "tokens": self.tokens, "temperature": self.temperature}
        c = self.conversation
        return {"id": c.id, "source": c.source, "messages": c.messages, **about}


@dataclasses.dataclass
class _Draft:
    """A conversation being rewritten."""

    original: Conversation
    settings: Settings
    messages: list[Message]
    runs: list[tuple[Message, ...]]
    """Messages that the target has not read yet, one run a turn."""
    tokens: int = 0
    turns: int = 0

    def append(self, models: Models, answer: Answer) -> None:
        """Adds the target's answer as the next message."""
        self.messages.append({"role": "assistant", "content": _text(models, answer)})
        self.turns += 1
        self.tokens += len(answer.tokens)

    def finished(self, finish: str) -> Rewritten:
        """Returns the conversation as it stands."""
        conversation = self.original._replace(messages=tuple(self.messages), unfinished=finish == LENGTH)
        return Rewritten(conversation, finish, self.turns, self.tokens, self.settings.temperature)


def user_runs(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """Returns the others' messages before each assistant turn and behind the last; each run holds a user turn."""
    runs: list[tuple[Message, ...]] = []
    run: list[Message] = []
    for message in [*messages, {"role": "assistant", "content": ""}]:
        if message["role"] != "assistant":
            run.append(message)
        elif any(m["role"] == "user" for m in run):
            runs.append(tuple(run))
            run = []
    return runs


def rewrite(
    models: Models,
    numbered: Iterable[tuple[int, Conversation]],
    settings: Settings,
    *,
    batch: int,
    temperatures: Temperatures | None = None,
) -> Iterator[tuple[list[Answer], list[Rewritten]]]:
    """Lets the target write every assistant turn anew, its own earlier answers before it.

    `numbered` pairs each conversation with its index in the whole data set. `settings` are the run's; a row's noise
    comes from the run's seed and the index, as does its temperature where there are `temperatures`, and `batch` rows
    run side by side, whichever they are, so a conversation's answers depend neither on shards nor on the others.
    Yields answers, and the conversations that they finished; first, without answers, those that cannot be begun.
    """
    drafts: dict[int, _Draft] = {}
    waiting, unfit = RequestsByLength(), []
    for index, conversation in numbered:
        own = settings.for_row(index)
        if temperatures is not None:
            own = dataclasses.replace(own, temperature=temperatures.draw(settings.seed, index))
        drafts[index] = _Draft(conversation, own, [], user_runs(conversation.messages))
        if not _ask(models, waiting, index, drafts[index]):
            unfit.append(drafts.pop(index).finished(UNFIT))
    yield [], unfit
    waiting.reverse()
    for request, answer, _ in serve_growing(models, waiting, slots=batch, max_new_tokens=settings.max_new_tokens):
        draft, index = drafts[request.key], request.key
        draft.append(models, answer)
        finish = None
        if answer.finish != STOPPED:
            finish = LENGTH
        elif not draft.runs:
            finish = STOPPED
        elif not _ask(models, waiting, index, draft):
            finish = UNFIT
        yield [answer], [] if finish is None else [drafts.pop(index).finished(finish)]


def _ask(models: Models, waiting: RequestsByLength, index: int, draft: _Draft) -> bool:
    """Queues the draft's next turn; returns False, the draft unchanged, where the target cannot read it."""
    if not draft.runs:
        return False
    messages = [*draft.messages, *draft.runs[0]]
    try:
        request = models.request(models.tokenizer.encode_prompt(messages), draft.settings, index)
    except ValueError:
        return False
    draft.messages = messages
    draft.runs.pop(0)
    waiting.add(request)
    return True


def _text(models: Models, answer: Answer) -> str:
    """Returns the answer's text without the stop id, whether or not that is a special token."""
    return models.tokenizer.decode(answer.tokens[:-1] if answer.finish == STOPPED else answer.tokens)


class UserTurn(NamedTuple):
    """A prompt that the target wrote itself."""

    attempt: int
    """Number of turns drawn before it, dropped ones included."""
    text: str


def user_header(tokenizer: ChatTokenizer) -> tuple[str, str]:
    """Returns the chat template's text before a first user turn, and between that turn and its answer."""
    mark = "USERTURN"
    text = tokenizer.render([{"role": "user", "content": mark}], add_generation_prompt=True)
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError("the chat template does not show the user's turn, so there is no header to continue")
    return before, after


LONG = Settings(max_new_tokens=192, temperature=1.0)
"""User turns of all kinds and lengths that the target knows, in its own proportions."""
VARIED = dataclasses.replace(LONG, max_new_tokens=96)
"""User turns to learn from: as `LONG`, the short ones."""
SENSIBLE = dataclasses.replace(VARIED, temperature=0.7)
"""User turns to measure on: those that a small target draws at temperature 1 often make no sense."""


def write_user_turns(
    models: Models,
    count: int,
    *,
    seed: int,
    settings: Settings = LONG,
    batch: int = 16,
    known: Sequence[UserTurn] = (),
) -> Iterator[UserTurn]:
    """Yields user turns that the target samples behind its bare template header, at most `count` with those `known`.

    Dropped are turns that are empty, came before, hold special tokens or did not end. Gives up after `8 * count`
    attempts. The same `seed`, which takes the place of that of `settings`, gives the same turns in the same order, and
    goes on behind the first ones of them, `known`.
    """
    before, after = user_header(models.tokenizer)
    header = models.tokenizer.encode(before)
    special = {i for i, token in models.tokenizer.tokenizer.get_added_tokens_decoder().items() if token.special}
    ending = tuple(int(i) for i in models.tokenizer.encode(after)[:1] if int(i) in special)
    settings = dataclasses.replace(settings, seed=seed, stop_ids=ending)
    seen = {turn.text for turn in known}
    if len(seen) >= count:
        return
    begin, end = known[-1].attempt + 1 if known else 0, 8 * count
    # A row that has finished takes the next attempt; answers that come early wait for those before them.
    attempts, waiting = iter(range(begin, end)), RequestsByLength()
    for attempt in reversed(list(itertools.islice(attempts, batch))):
        waiting.add(models.request(header, settings.for_row(attempt), attempt))
    early: dict[int, Answer] = {}
    for request, answer, _ in serve_growing(models, waiting, slots=batch, max_new_tokens=settings.max_new_tokens):
        early[request.key] = answer
        for attempt in itertools.islice(attempts, 1):
            waiting.add(models.request(header, settings.for_row(attempt), attempt))
        while begin in early:
            text = _whole_turn(models, early.pop(begin), after.strip(), special)
            if text and text not in seen:
                seen.add(text)
                yield UserTurn(begin, text)
            begin += 1
            if len(seen) == count:
                return


def _whole_turn(models: Models, answer: Answer, closing: str, special: set[int]) -> str:
    """Returns the text of a turn that ended and holds no special token; empty if it did not, or does."""
    stopped = answer.finish == STOPPED
    body: np.ndarray = answer.tokens[:-1] if stopped else answer.tokens
    text = models.tokenizer.decode(body)
    if closing and closing in text:  # a template whose turns end with plain words
        text, stopped = text[: text.index(closing)], True
    return text.strip() if stopped and not special & set(body.tolist()) else ""
