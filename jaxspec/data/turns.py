"""Conversations as a server shows them: for each answer the prompt that it followed, and the tokens that were emitted.

A drafter is asked what its target emits next, behind the prompt that the server built. So each assistant turn is one
sample: the tokens of the template's prompt for the messages before it, and those of the answer, stop token included;
the answer alone is trained on. Samples of one conversation stand in one row as long as the next prompt begins with the
tokens of the last prompt and answer; templates that rewrite history (Qwen3 drops thoughts) begin another row.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxspec.data.chat import ChatTokenizer, EncodedConversation
from jaxspec.data.messages import BadRecord, Conversation, Message, StoredAnswer
from jaxspec.data.shown import ShownContent

Thinking = Literal["told", "record"]
"""Whether a template thinks: as its variables tell, or by whether the record's turn has a thought."""
# A block that the answer opens, or that the prompt has opened.
_EMPTY_THOUGHT = re.compile(r"\A\s*(<think>|<\|channel>thought)?\s*(</think>|<channel\|>)")
_MARK, _NEXT = "ANSWERMARK", "NEXTMARK"


@dataclasses.dataclass(frozen=True)
class TurnOptions:
    """Options of which turns are trained on. Raises ValueError for a number of turns below 1."""

    last_turn_only: bool = False
    """Only the last answer of a conversation."""
    max_turns: int | None = None
    """Most answers of a conversation, the first ones; None: all."""
    thinking: Thinking = "told"
    """`record` renders a turn with a thought as with `enable_thinking`, and one without as without it."""

    def __post_init__(self) -> None:
        if self.max_turns is not None and self.max_turns < 1:
            raise ValueError(f"max_turns is {self.max_turns}; it must be at least 1")
        if self.thinking not in ("told", "record"):
            raise ValueError(f"thinking is {self.thinking!r}; it must be told or record")


EVERY_TURN = TurnOptions()
"""The options by default."""

# Kinds of turns that are counted, by the words that say it.
EMPTY = "empty answers"
NO_USER = "answers without a user's turn before"
OFF = "answers switched off by their record"
FORGOTTEN = "thoughts that the template does not show"
AGAINST = "answers whose thought contradicts the template's variables"
NO_ROOM = "answers behind the row's end"
CUT = "answers cut at the row's end"
OTHER_IDS = "stored answers of another tokenizer, encoded anew"
NOT_ASKED = "answers beyond those asked for"
NO_STOP = "answers whose end the template does not mark by a stop token"


class _Sample(NamedTuple):
    """An assistant turn, rendered: the texts of its prompt and answer, or their ids where they are stored."""

    prompt: str
    answer: str
    prompt_ids: tuple[int, ...] | None = None
    answer_ids: tuple[int, ...] | None = None


class Rendered(NamedTuple):
    """A conversation, rendered and not yet tokenized."""

    samples: list[_Sample]
    whole: str | None
    """The text of a conversation in which no one answers; it is kept, and nothing of it is the assistant's."""
    counts: collections.Counter[str]


class Encoded(NamedTuple):
    """The rows of a conversation, and what became of its turns."""

    rows: list[EncodedConversation]
    counts: Mapping[str, int]
    """Numbers of turns, by the words that say what became of them."""


Pair = tuple[Sequence[int], Sequence[int]]
"""The ids of a prompt and of its answer."""


class TurnEncoder:
    """Encodes conversations by one tokenizer and template; remembers what the template drops and how turns end."""

    def __init__(self, tokenizer: ChatTokenizer, options: TurnOptions = EVERY_TURN) -> None:
        self.tokenizer, self.options = tokenizer, options
        ids = [tokenizer.tokenizer.id_to_token(i) for i in tokenizer.stop_ids]
        self._stops = tuple(text for text in ids if text)
        added = tokenizer.tokenizer.get_added_tokens_decoder().values()
        self._special = tuple(token.content for token in added if token.special)
        self._headers: dict[bool, str] = {}
        self._shown = ShownContent(tokenizer)

    def render(self, c: Conversation) -> Rendered:
        """Returns the samples of a conversation of messages.

        Raises BadRecord, which names the message, where the template refuses or drops something.
        """
        counts: collections.Counter[str] = collections.Counter()
        said = [i for i, m in enumerate(c.messages) if m["role"] == "assistant"]
        try:
            self._shown.check(c.messages, c.tools, c.variables)
            if not said:
                return Rendered([], self._text(c, c.messages, c.variables), counts)
            chosen = said[-1:] if self.options.last_turn_only else said[: self.options.max_turns]
            counts[NOT_ASKED] += len(said) - len(chosen)
            samples = [s for i in chosen if (s := self._sample(c, i, counts)) is not None]
            # A thought against the variables makes the whole conversation another one than the target's.
            whole = None if samples or counts[AGAINST] else self._text(c, c.messages, c.variables)
        except BadRecord:
            raise
        except ValueError as error:
            raise BadRecord("refused by the template", str(error)) from error
        return Rendered(samples, whole, counts)

    def tokenize(self, rendered: Sequence[Rendered], length: int) -> list[Encoded]:
        """Returns the rows of rendered conversations, of at most `length` tokens, in their order."""
        # All texts at once: the library encodes a batch on several threads.
        texts: list[str] = []
        for one in rendered:
            texts += [one.whole] if one.whole is not None else []
            for sample in one.samples:
                texts += [sample.prompt, sample.prompt + sample.answer]
        found = iter(self._encode_all(texts))
        made = []
        for one in rendered:
            if one.whole is not None:
                made.append(Encoded([_unanswered(next(found), length)], one.counts))
            else:
                pairs = [self._ids(sample, next(found), next(found)) for sample in one.samples]
                made.append(Encoded(join(pairs, length, one.counts), one.counts))
        return made

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        begin = self.tokenizer.bos_id if self.tokenizer.is_bare and self.tokenizer.adds_bos else None
        return [encoding.ids if begin is None else [begin, *encoding.ids] for encoding in encoded]

    def _ids(self, sample: _Sample, prompt: Sequence[int], both: Sequence[int]) -> Pair:
        """Returns the ids of a sample, from those of its prompt, and of prompt and answer together."""
        prompt = prompt if sample.prompt_ids is None else sample.prompt_ids
        if sample.answer_ids is not None:
            return prompt, sample.answer_ids
        # Encoded together, a text behind a prompt gets no space in front, which SentencePiece puts before a text alone.
        together = list(both[: len(prompt)]) == list(prompt)
        return prompt, both[len(prompt) :] if together else self.tokenizer.encode(sample.answer).tolist()

    def _text(
        self, c: Conversation, messages: Sequence[Message], variables: Mapping[str, Any], ask: bool = False
    ) -> str:
        return self.tokenizer.render(messages, add_generation_prompt=ask, tools=c.tools, variables=variables)

    def _sample(self, c: Conversation, i: int, counts: collections.Counter[str]) -> _Sample | None:
        """Returns the sample of assistant turn `i`; None, counted, where nothing of it is trained on."""
        message, before = c.messages[i], c.messages[:i]
        user = max((n for n, m in enumerate(before) if m["role"] == "user"), default=None)
        stored = next((a for a in c.stored if a.message == i), None)
        if c.learned and not c.learned[i]:
            counts[OFF] += 1
        elif not (message["content"].strip() or "tool_calls" in message or "reasoning_content" in message or stored):
            counts[EMPTY] += 1
        elif user is None:
            counts[NO_USER] += 1
        else:
            variables = self._variables(c, message)
            if stored is not None and self._is_own(c, stored):
                self.check_ids([*(stored.prompt_ids or ()), *stored.answer_ids])
                prompt = "" if stored.prompt_ids is not None else self._text(c, before, variables, ask=True)
                return _Sample(prompt, "", stored.prompt_ids, stored.answer_ids)
            counts[OTHER_IDS] += stored is not None
            prompt = self._text(c, before, variables, ask=True)
            # By the shortest history: what is emitted does not depend on how the template shows what came before.
            base = prompt if user == 0 and i == 1 else self._text(c, [c.messages[user]], variables, ask=True)
            tail = self._tail(c, base, [c.messages[user], message], variables, counts)
            if tail is not None and c.unfinished and i + 1 == len(c.messages):
                return _Sample(prompt, _cut_answer(tail, message))
            return None if tail is None else _Sample(prompt, self._to_stop(c, tail, message, counts))
        return None

    def _is_own(self, c: Conversation, stored: StoredAnswer) -> bool:
        """Returns whether stored ids are this tokenizer's."""
        made_by = c.made_with.get("tokenizer")
        if made_by is not None:
            return made_by == self.tokenizer.fingerprint["tokenizer"]
        # A server does not tell its tokenizer; its ids are used where they are the text that it gave.
        words = c.messages[stored.message]["content"].strip()
        known = max(stored.answer_ids) < self.tokenizer.vocab_size
        return known and words in self.tokenizer.decode(stored.answer_ids)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises BadRecord for an id that the tokenizer does not have."""
        if max(ids, default=0) >= self.tokenizer.vocab_size:
            raise BadRecord(
                "token ids",
                f"holds the token id {max(ids):,}, and the tokenizer has {self.tokenizer.vocab_size:,}: it was made "
                "for another model",
            )

    def _variables(self, c: Conversation, message: Message) -> Mapping[str, Any]:
        """Returns the variables of one turn."""
        if self.options.thinking == "told" or "enable_thinking" not in self.tokenizer.template.reads:
            return c.variables
        return {**c.variables, "enable_thinking": "reasoning_content" in message}

    def _tail(
        self,
        c: Conversation,
        base: str,
        pair: Sequence[Message],
        variables: Mapping[str, Any],
        counts: collections.Counter[str],
    ) -> str | None:
        """Returns the text of an answer behind `base`, the prompt of a user's turn; `pair` is that turn and the answer.

        None, counted, where a thought and the variables contradict each other. Raises ValueError where the template
        shows the turn otherwise than as a continuation of the prompt.
        """
        whole, (user, message) = self._text(c, pair, variables), pair
        thought = message.get("reasoning_content", "").strip()
        told = dict(self.tokenizer.template.variables) | dict(variables)
        if thought and told.get("enable_thinking") is False:
            counts[AGAINST] += 1
            return None
        if not whole.startswith(base) or (thought and thought not in whole[len(base) :]):
            if thought and self._thinks(c, user, message, thought):
                counts[AGAINST] += 1
                return None
            if not whole.startswith(base):
                raise ValueError(
                    "the chat template does not show an answer as the continuation of its prompt, so its tokens cannot "
                    "be told: let `jaxspec regenerate` write the answers, whose tokens it stores"
                )
            counts[FORGOTTEN] += 1
        tail = whole[len(base) :]
        if not thought and _EMPTY_THOUGHT.match(tail):
            counts[AGAINST] += 1  # a target that thinks does not emit an empty thought
            return None
        return tail

    def _thinks(self, c: Conversation, user: Message, message: Message, thought: str) -> bool:
        """Returns whether the template shows the thought if it is told to think."""
        if "enable_thinking" not in self.tokenizer.template.reads:
            return False
        told = {**c.variables, "enable_thinking": True}
        base, whole = self._text(c, [user], told, ask=True), self._text(c, [user, message], told)
        return whole.startswith(base) and thought in whole[len(base) :]

    def _to_stop(self, c: Conversation, tail: str, message: Message, counts: collections.Counter[str]) -> str:
        """Returns an answer up to the first stop token, that of the next turn's header where the turn has none."""
        ends = [tail.index(stop) + len(stop) for stop in self._stops if stop in tail]
        if ends:
            return tail[: min(ends)]
        header = self._header(c, "tool_calls" in message)
        if header:
            return tail + header
        counts[NO_STOP] += 1
        # White space behind a special token belongs to the next turn.
        return tail.rstrip() if tail.rstrip().endswith(self._special) else tail

    def _header(self, c: Conversation, calls: bool) -> str:
        """Returns the stop token that opens the turn behind an answer; empty if there is none."""
        if calls not in self._headers:
            answer: Message = {"role": "assistant", "content": _MARK}
            if calls:
                function = {"name": "f", "arguments": {}}
                answer["tool_calls"] = [{"id": "0", "type": "function", "function": function}]
            following: Message = {"role": "tool" if calls else "user", "content": _NEXT}
            try:
                text = self._text(c, [{"role": "user", "content": "a"}, answer, following], c.variables)
            except ValueError:  # the template has no place for such a turn
                text = ""
            text = text.partition(_MARK)[2].partition(_NEXT)[0]
            found = [(text.index(stop), stop) for stop in self._stops if stop in text]
            self._headers[calls] = min(found)[1] if found else ""
        return self._headers[calls]

    def unmarked_end(self) -> str | None:
        """Returns the special token by which the template ends an answer where that is no stop id, else None."""
        probe = Conversation("", "", ())
        try:
            text = self._text(probe, [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}], {})
        except ValueError:
            return None
        tail = text.partition(_MARK)[2]
        if any(stop in tail for stop in self._stops) or self._header(probe, False):
            return None
        found = [(tail.index(token), token) for token in self._special if token in tail]
        return min(found)[1] if found else None


def _cut_answer(tail: str, message: Message) -> str:
    """Returns an unfinished answer's text, which ends with its last words."""
    words = message["content"].strip() or message.get("reasoning_content", "").strip()
    at = tail.find(words)
    if at < 0:
        raise ValueError("the chat template rewrites an unfinished answer, so its end is not found; drop it")
    return tail[: at + len(words)]


def _unanswered(ids: Sequence[int], length: int) -> EncodedConversation:
    """Returns a row, cut to `length`, of which nothing is the assistant's."""
    tokens = np.asarray(ids[:length], np.int32)
    return EncodedConversation(tokens, np.zeros(len(tokens), bool))


def join(pairs: Iterable[Pair], length: int, counts: collections.Counter[str]) -> list[EncodedConversation]:
    """Returns the rows of a conversation's prompts and answers, of at most `length` tokens.

    A pair stands in the row before it where its prompt begins with all of that row. An answer behind the end of its row
    is left out, and one that reaches it is cut; both are added to `counts`. Where no answer has room, the first prompt
    is a row by itself.
    """
    rows: list[tuple[list[int], list[bool]]] = []
    first: list[int] | None = None
    for prompt, answer in ((list(p), list(a)) for p, a in pairs):
        first = prompt if first is None else first
        if len(prompt) >= length:
            counts[NO_ROOM] += 1
            continue
        if not rows or prompt[: len(rows[-1][0])] != rows[-1][0]:
            rows.append(([], []))
        tokens, mask = rows[-1]
        mask += [False] * (len(prompt) - len(tokens)) + [True] * len(answer)
        tokens += prompt[len(tokens) :] + answer
        counts[CUT] += len(tokens) > length
        del tokens[length:], mask[length:]
    if not rows and first is not None:
        return [_unanswered(first, length)]
    return [EncodedConversation(np.asarray(t, np.int32), np.asarray(m, bool)) for t, m in rows]
