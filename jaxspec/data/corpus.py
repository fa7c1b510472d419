"""Tokenized documents: from conversations in memory, from several corpora as one, and by hash."""

import hashlib
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxspec.data.account import Account
from jaxspec.data.chat import ChatTokenizer, EncodedConversation
from jaxspec.data.messages import Conversation
from jaxspec.data.turns import AGAINST, CUT, NO_ROOM, Rendered, TurnEncoder


class Summary(NamedTuple):
    """Counts of what became of a set of conversations when they were tokenized."""

    documents: int
    tokens: int
    truncated: int  # documents longer than a row
    without_assistant: int  # documents where no token kept is the assistant's
    only_assistant: int  # documents where every token is the assistant's

    def __str__(self) -> str:
        parts = [f"{self.documents:,} documents", f"{self.tokens:,} tokens"]
        named = ("truncated", "without_assistant", "only_assistant")
        return ", ".join(parts + [f"{getattr(self, n):,} {n.replace('_', ' ')}" for n in named if getattr(self, n)])


class Document(NamedTuple):
    """One tokenized document."""

    tokens: np.ndarray  # int32 [L]
    assistant_mask: np.ndarray  # bool [L]


class Documents(Protocol):
    """Tokenized documents, in memory (`Corpus`) or on disk (`tokenized_corpus.StoredCorpus`).

    The arrays describe all documents and are enough to pack them; `read` returns the tokens of some.
    """

    @property
    def lengths(self) -> np.ndarray:
        """Integers [documents]: the number of tokens of each."""
        ...

    @property
    def said(self) -> np.ndarray:
        """Integers [documents]: the number of the assistant's tokens, not counting a document's first token."""
        ...

    @property
    def keys(self) -> np.ndarray:
        """uint64 [documents]: `key` of each."""
        ...

    @property
    def source(self) -> np.ndarray:
        """Integers [documents]: index into `sources`."""
        ...

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """The id of each document's conversation."""
        ...

    @property
    def summary(self) -> Summary:
        """Counts of what became of them when they were tokenized."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """Numbers of turns and records that were left out or changed, by the words that say it."""
        ...

    def read(self, documents: Sequence[int]) -> list[Document]:
        """Returns some documents, in the order asked for."""
        ...


def fingerprint(documents: Documents) -> str:
    """Returns a hash, in hex, of everything that training reads of the documents."""
    digest = hashlib.sha256(repr(documents.sources).encode())
    for part in (documents.keys, documents.said, documents.source):
        digest.update(np.asarray(part, np.uint64).tobytes())
    return digest.hexdigest()[:16]


def key(tokens: np.ndarray) -> int:
    """Returns the 64-bit name of a document: the BLAKE2b hash of its tokens."""
    digest = hashlib.blake2b(np.ascontiguousarray(tokens, "<i4").tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class Corpus(NamedTuple):
    """Tokenized documents in memory, one after another; document `d` is `tokens[offsets[d]:offsets[d+1]]`."""

    tokens: np.ndarray  # int32 [total]
    assistant_mask: np.ndarray  # bool [total]
    offsets: np.ndarray  # int64 [documents + 1]
    source: np.ndarray  # int32 [documents], index into `sources`
    sources: tuple[str, ...]
    ids: Sequence[str]  # of the conversations
    truncated: np.ndarray  # bool [documents], whether it was longer
    counts: Mapping[str, int] = types.MappingProxyType({})

    @property
    def summary(self) -> Summary:
        """See `Documents`."""
        spoken = self._spoken(self.offsets[:-1])
        return Summary(
            documents=len(spoken),
            tokens=len(self.tokens),
            truncated=int(self.truncated.sum()),
            without_assistant=int((spoken == 0).sum()),
            only_assistant=int((spoken == self.lengths).sum()),
        )

    @property
    def lengths(self) -> np.ndarray:
        """See `Documents`."""
        return np.diff(self.offsets)

    @property
    def said(self) -> np.ndarray:
        """See `Documents`."""
        return self._spoken(np.minimum(self.offsets[:-1] + 1, self.offsets[1:]))

    def _spoken(self, starts: np.ndarray) -> np.ndarray:
        """Returns int64 [documents]: the number of the assistant's tokens of each from its place in `starts` on."""
        seen = np.concatenate([[0], np.cumsum(self.assistant_mask, dtype=np.int64)])
        return seen[self.offsets[1:]] - seen[starts]

    @property
    def keys(self) -> np.ndarray:
        """See `Documents`; computed at every call."""
        pieces = (self.tokens[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True))
        return np.fromiter(map(key, pieces), np.uint64, len(self.offsets) - 1)

    def read(self, documents: Sequence[int]) -> list[Document]:
        """See `Documents`."""
        bounds = [slice(self.offsets[d], self.offsets[d + 1]) for d in documents]
        return [Document(self.tokens[here], self.assistant_mask[here]) for here in bounds]


@dataclass(frozen=True)
class Ids(Sequence[str]):
    """A sequence of ids that are looked up one at a time."""

    size: int
    find: Callable[[int], str]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.find(int(index))


class Joined:
    """The documents of several corpora, one after another; see `Documents`."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(part.lengths) for part in parts)])
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.said = np.concatenate([part.said for part in parts])
        self.sources: tuple[str, ...] = tuple(sorted({source for part in parts for source in part.sources}))
        named = [np.asarray([self.sources.index(s) for s in part.sources], np.int32) for part in parts]
        self.source = np.concatenate([names[part.source] for names, part in zip(named, parts, strict=True)])
        self.summary = Summary(*(sum(counts) for counts in zip(*(part.summary for part in parts), strict=True)))
        self.counts: Mapping[str, int] = dict(sum((Counter(part.counts) for part in parts), Counter()))

    @property
    def keys(self) -> np.ndarray:
        """See `Documents`."""
        return np.concatenate([part.keys for part in self.parts])

    def _place(self, document: int) -> tuple[int, int]:
        """Returns the number of the part that holds a document, and the document's place in it."""
        part = int(np.searchsorted(self._starts, document, side="right")) - 1
        return part, int(document - self._starts[part])

    @property
    def ids(self) -> Sequence[str]:
        """See `Documents`."""
        return Ids(len(self.lengths), self._id)

    def _id(self, document: int) -> str:
        part, place = self._place(document)
        return self.parts[part].ids[place]

    def read(self, documents: Sequence[int]) -> list[Document]:
        """See `Documents`."""
        places = [self._place(document) for document in documents]
        found: dict[tuple[int, int], Document] = {}
        for number, part in enumerate(self.parts):
            wanted = [place for which, place in places if which == number]
            found |= {(number, at): document for at, document in zip(wanted, part.read(wanted), strict=True)}
        return [found[place] for place in places]


def join(*corpora: Documents) -> Documents:
    """Returns the documents of each corpus, one after another."""
    return corpora[0] if len(corpora) == 1 else Joined(corpora)


THINKING_ADVICE = (
    "let the records decide (data.thinking=record, --thinking record), or tell the template what the target is served "
    "with (data.template_args=enable_thinking=false)"
)


def tokenize_conversations(
    conversations: Sequence[Conversation],
    tokenizer: ChatTokenizer | TurnEncoder,
    *,
    length: int,
    account: Account | None = None,
) -> Corpus:
    """Returns all conversations as one corpus of rows of at most `length` tokens; see `turns` for what is a row.

    A plain text is divided instead of cut: it becomes as many documents of `length` tokens as it fills, and the last
    one is shorter. None of its tokens is the assistant's. The corpus's `counts` say what became of turns and, with
    those of `account`, of records. Raises ValueError naming the conversation that the chat template refuses, unless
    `account` skips such.
    """
    if not conversations:
        raise ValueError("conversations is empty")
    account = account or Account()
    turns = tokenizer if isinstance(tokenizer, TurnEncoder) else TurnEncoder(tokenizer)
    corpus = tokenize_block(conversations, turns, length, account)
    if not corpus.ids:
        left = "; ".join(account.sentences())
        advice = f": {THINKING_ADVICE}" if account.counts.get(AGAINST) else ""
        raise ValueError(f"no conversation is left to learn from: {left}{advice}")
    return corpus


def tokenize_block(conversations: Sequence[Conversation], turns: TurnEncoder, length: int, account: Account) -> Corpus:
    """Returns `tokenize_conversations` of part of some data, of which nothing may be left."""
    made = [
        (conversation, row, cut)
        for conversation, encoded in _encode(conversations, turns, length, account)
        for row, cut in encoded
    ]
    sources = tuple(sorted({c.source for c, *_ in made}))
    return Corpus(
        tokens=np.concatenate([np.zeros(0, np.int32), *(row.tokens for _, row, _ in made)]),
        assistant_mask=np.concatenate([np.zeros(0, bool), *(row.assistant_mask for _, row, _ in made)]),
        offsets=np.cumsum([0, *(len(row.tokens) for _, row, _ in made)]),
        source=np.asarray([sources.index(c.source) for c, *_ in made], np.int32),
        sources=sources,
        ids=tuple(c.id for c, *_ in made),
        truncated=np.asarray([cut for *_, cut in made], bool),
        counts=dict(account.counts),
    )


Rows = list[tuple[EncodedConversation, bool]]
"""The rows of a conversation, and whether each is cut."""


def _encode(
    conversations: Sequence[Conversation], turns: TurnEncoder, length: int, account: Account
) -> list[tuple[Conversation, Rows]]:
    """Returns the rows of each conversation that is not skipped, in their order."""
    rendered: list[tuple[Conversation, Rendered | None]] = []
    for conversation in conversations:
        try:
            talks = conversation.text is None and conversation.ready is None
            if conversation.ready is not None:
                turns.check_ids(conversation.ready.ids)
            rendered.append((conversation, turns.render(conversation) if talks else None))
        except ValueError as error:
            account.refuse(conversation.name, error)
    encoded = iter(turns.tokenize([r for _, r in rendered if r is not None], length))
    made = []
    for conversation, one in rendered:
        if one is None:
            made.append((conversation, _without_turns(conversation, turns.tokenizer, length)))
            continue
        rows, counts = next(encoded)
        account.counts.update(counts)
        # The last row of a conversation is the one that can be cut, or lack answers that had no room.
        cut = bool(counts.get(CUT, 0) + counts.get(NO_ROOM, 0))
        made.append((conversation, [(row, cut and n + 1 == len(rows)) for n, row in enumerate(rows)]))
    account.counts = +account.counts  # without the kinds that did not occur
    return made


def _without_turns(conversation: Conversation, tokenizer: ChatTokenizer, length: int) -> Rows:
    """Returns a plain text, divided, or a conversation that came as tokens, cut."""
    if conversation.ready is not None:
        tokens, mask = (np.asarray(x, t) for x, t in zip(conversation.ready, (np.int32, bool), strict=True))
        return [(EncodedConversation(tokens[:length], mask[:length]), len(tokens) > length)]
    assert conversation.text is not None
    tokens, mask = tokenizer.encode_text(conversation.text)
    pieces = [slice(at, at + length) for at in range(0, len(tokens), length)]
    return [(EncodedConversation(tokens[piece], mask[piece]), False) for piece in pieces]
