"""The target as its own teacher: it answers the user turns of a data set, and writes user turns where there is none."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.chat_template import parse_variables
from jaxspec.data.emitted import message_of
from jaxspec.data.messages import Conversation
from jaxspec.data.shown import ShownContent
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.requests import Settings
from jaxspec.serving.dialogue import NO_TURN, STOPPED, UNFIT, Dialogue, Reply, Rewritten
from jaxspec.serving.loading import Models
from jaxspec.serving.queue import RequestsByLength, serve_growing

_TEMPERATURE_DRAW, _TEMPLATE_DRAW = 1, 2
"""Keep the draws of a conversation's temperature and template variables apart from its noise, and from each other."""


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
        return self.values[weighted_draw(self.weights, (seed, index, _TEMPERATURE_DRAW))]


def weighted_draw(weights: Sequence[float], key: tuple[int, ...]) -> int:
    """Returns a place among `weights`, by its share of them; `key` decides which."""
    bits = np.random.SeedSequence(key).generate_state(1)[0]
    shares = np.cumsum(weights) / math.fsum(weights)
    place = int(np.searchsorted(shares, int(bits) / 2**32, side="right"))
    return min(place, int(np.flatnonzero(weights)[-1]))  # the last share may round below 1


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


@dataclasses.dataclass(frozen=True)
class TemplateMix:
    """Variables of the chat template to answer with, each conversation with one choice of them."""

    choices: tuple[tuple[tuple[str, Any], ...], ...]
    weights: tuple[float, ...]
    """How often each choice is drawn, relative to the others."""

    def draw(self, seed: int, index: int) -> dict[str, Any]:
        """Returns the variables of conversation `index` of a run: the same in whatever batch, shard or order."""
        return dict(self.choices[weighted_draw(self.weights, (seed, index, _TEMPLATE_DRAW))])


def parse_template_mix(text: str) -> TemplateMix:
    """Returns the choices of `enable_thinking=true:3,enable_thinking=false:1`, each with its weight or 1.

    Raises ValueError for any other form.
    """
    wrong = f"--template-mix is {text!r}"
    choices, weights = [], []
    for item in text.split(","):
        name, colon, weight = item.rpartition(":")
        choice = name if colon else item
        try:
            weights.append(float(weight) if colon else 1.0)
        except ValueError:
            raise ValueError(f"{wrong}: {weight!r} is no weight; give NAME=VALUE:WEIGHT") from None
        try:
            choices.append(parse_variables(choice) if "=" in choice else ())
        except ValueError:
            choices.append(())
    if not all(choices) or not all(0 <= w < math.inf for w in weights) or not sum(weights):
        raise ValueError(f"{wrong}; it must be like enable_thinking=true:3,enable_thinking=false:1")
    if twice := next((choice for i, choice in enumerate(choices) if choice in choices[:i]), None):
        raise ValueError(f"{wrong}: holds {twice[0][0]}={twice[0][1]} twice; give it once, with a larger weight")
    return TemplateMix(tuple(choices), tuple(weights))


class RewriteOptions(NamedTuple):
    """Options of how conversations are rewritten, besides the settings of the draws."""

    batch: int = 16
    """Rows side by side."""
    temperatures: Temperatures | None = None
    template_mix: TemplateMix | None = None
    made_with: Mapping[str, Any] = types.MappingProxyType({})
    """Hashes of the target, tokenizer and template, for the records."""
    variables: Mapping[str, Any] = types.MappingProxyType({})
    """Of the chat template, for every conversation that does not set or draw them itself."""


def begin_dialogue(
    index: int, conversation: Conversation, settings: Settings, options: RewriteOptions
) -> tuple[Dialogue, Settings]:
    """Returns conversation `index` of a run, to be rewritten, and its own settings: its noise and temperature."""
    own = settings.for_row(index)
    if options.temperatures is not None:
        own = dataclasses.replace(own, temperature=options.temperatures.draw(settings.seed, index))
    drawn = {} if options.template_mix is None else options.template_mix.draw(settings.seed, index)
    plain = Settings()
    sampling = {n: v for n in ("top_k", "top_p") if (v := getattr(own, n)) != getattr(plain, n)}
    variables = {**options.variables, **drawn, **conversation.variables}
    return Dialogue(conversation, own.temperature, variables, options.made_with, sampling), own


def rewrite(
    models: Models,
    numbered: Iterable[tuple[int, Conversation]],
    settings: Settings,
    options: RewriteOptions,
) -> Iterator[tuple[list[Answer], list[Rewritten]]]:
    """Lets the target write every assistant turn anew, its own earlier answers before it.

    `numbered` pairs each conversation with its index in the whole data set. `settings` are the run's; a row's noise
    comes from the run's seed and the index, as do its temperature and template variables where those are mixed, and the
    rows of a batch run side by side, whichever they are, so a conversation's answers depend neither on shards nor on
    the others. Yields answers, and the conversations that they finished; first, without answers, those that cannot be
    begun.
    """
    begun: dict[int, tuple[Dialogue, Settings]] = {}
    waiting, unfit, shown = RequestsByLength(), [], ShownContent(models.tokenizer)
    for index, conversation in numbered:
        begun[index] = begin_dialogue(index, conversation, settings, options)
        if (reason := _ask(models, waiting, index, *begun[index], shown)) is not None:
            unfit.append(begun.pop(index)[0].finished(UNFIT, reason))
    yield [], unfit
    waiting.reverse()
    served = serve_growing(models, waiting, slots=options.batch, max_new_tokens=settings.max_new_tokens)
    for request, answer, *_ in served:
        dialogue, own = begun[request.key]
        finish, reason = dialogue.take(_reply(models, dialogue, np.asarray(request.tokens), answer)), None
        if finish is None and (reason := _ask(models, waiting, request.key, dialogue, own, shown)) is not None:
            finish = UNFIT
        if finish is not None:
            del begun[request.key]
        yield [answer], [] if finish is None else [dialogue.finished(finish, reason or "")]


def _ask(
    models: Models,
    waiting: RequestsByLength,
    index: int,
    dialogue: Dialogue,
    settings: Settings,
    shown: ShownContent,
) -> str | None:
    """Queues the dialogue's next turn; returns why not where there is none, or the target cannot read it."""
    if dialogue.ended:
        return NO_TURN
    messages, tools, variables = dialogue.ask(), dialogue.original.tools, dialogue.variables
    try:
        shown.check(messages, tools, variables)
        tokens = models.tokenizer.encode_prompt(messages, tools=tools, variables=variables)
        waiting.add(models.request(tokens, settings, index))
    except ValueError as error:
        return str(error)
    return None


def _reply(models: Models, dialogue: Dialogue, prompt: np.ndarray, answer: Answer) -> Reply:
    """Returns the target's answer as a message, and as its tokens."""
    stopped = answer.finish == STOPPED
    words = answer.tokens[:-1] if stopped else answer.tokens
    opened = models.tokenizer.decode(prompt[-8:], skip_special=False).rstrip().endswith("<think>")
    message = message_of(models.tokenizer, words.tolist(), opened=opened, tools=bool(dialogue.original.tools))
    ids = (tuple(map(int, answer.tokens)), tuple(map(int, prompt)))
    return Reply(message, not stopped, len(answer.tokens), *ids)


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
    for request, answer, *_ in serve_growing(models, waiting, slots=batch, max_new_tokens=settings.max_new_tokens):
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
