"""Tokenized conversations and their packing into rows of fixed length, as pure functions of (seed, step)."""

import functools
import hashlib
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from jaxspec.data.chat import ChatTokenizer, EncodedConversation
from jaxspec.data.conversations import Conversation

_OPEN_ROWS = 64  # rows that may still take a document while packing
_ENDLESS = 1 << 40  # the length of a stream that repeats without end
_MIX_ORDER = 1  # keeps the order of the first mix, and this plus one that of the second, apart from the epochs'

LossOn = Literal["all", "assistant"]


class Summary(NamedTuple):
    """What happened to a set of conversations on their way to tokens."""

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
    """One of them."""

    tokens: np.ndarray  # int32 [L]
    assistant_mask: np.ndarray  # bool [L]


class Documents(Protocol):
    """Tokenized documents, in memory (`Corpus`) or on disk (`data.stored_corpus`): what packing must know of them all,
    and their tokens when they are asked for."""

    @property
    def lengths(self) -> np.ndarray:
        """Integers [documents]: tokens in each."""
        ...

    @property
    def said(self) -> np.ndarray:
        """Integers [documents]: those that are the assistant's, a document's first token apart."""
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
        """Where they come from."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """The conversations' own ids."""
        ...

    @property
    def summary(self) -> Summary:
        """What happened to them on the way."""
        ...

    def read(self, documents: Sequence[int]) -> list[Document]:
        """Some of them, in the order asked for."""
        ...


def fingerprint(documents: Documents) -> str:
    """Of all that training sees of them, in hex."""
    digest = hashlib.sha256(repr(documents.sources).encode())
    for part in (documents.keys, documents.said, documents.source):
        digest.update(np.asarray(part, np.uint64).tobytes())
    return digest.hexdigest()[:16]


def key(tokens: np.ndarray) -> int:
    """A document's name by its tokens: 64 bits of their BLAKE2b."""
    digest = hashlib.blake2b(np.ascontiguousarray(tokens, "<i4").tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class Corpus(NamedTuple):
    """Tokenized documents, one after another; document `d` is `tokens[offsets[d]:offsets[d+1]]`."""

    tokens: np.ndarray  # int32 [total]
    assistant_mask: np.ndarray  # bool [total]
    offsets: np.ndarray  # int64 [documents + 1]
    source: np.ndarray  # int32 [documents], index into `sources`
    sources: tuple[str, ...]
    ids: Sequence[str]  # the conversations' own ids
    truncated: np.ndarray  # bool [documents], it was longer

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
        """int64 [documents]: the assistant's tokens of each from its place in `starts` on."""
        seen = np.concatenate([[0], np.cumsum(self.assistant_mask, dtype=np.int64)])
        return seen[self.offsets[1:]] - seen[starts]

    @property
    def keys(self) -> np.ndarray:
        """See `Documents`; made anew at every call."""
        pieces = (self.tokens[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True))
        return np.fromiter(map(key, pieces), np.uint64, len(self.offsets) - 1)

    def read(self, documents: Sequence[int]) -> list[Document]:
        """See `Documents`."""
        bounds = [slice(self.offsets[d], self.offsets[d + 1]) for d in documents]
        return [Document(self.tokens[here], self.assistant_mask[here]) for here in bounds]


@dataclass(frozen=True)
class Ids(Sequence[str]):
    """Ids that are looked up one at a time."""

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

    @property
    def keys(self) -> np.ndarray:
        """See `Documents`."""
        return np.concatenate([part.keys for part in self.parts])

    def _place(self, document: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, document, side="right")) - 1
        return part, int(document - self._starts[part])

    @property
    def ids(self) -> Sequence[str]:
        """See `Documents`."""

        def find(document: int) -> str:
            part, place = self._place(document)
            return self.parts[part].ids[place]

        return Ids(len(self.lengths), find)

    def read(self, documents: Sequence[int]) -> list[Document]:
        """See `Documents`."""
        places = [self._place(document) for document in documents]
        found: dict[tuple[int, int], Document] = {}
        for number, part in enumerate(self.parts):
            wanted = [place for which, place in places if which == number]
            found |= {(number, at): document for at, document in zip(wanted, part.read(wanted), strict=True)}
        return [found[place] for place in places]


def join(*corpora: Documents) -> Documents:
    """The documents of each, one after another."""
    return corpora[0] if len(corpora) == 1 else Joined(corpora)


def tokenize_conversations(conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, length: int) -> Corpus:
    """All conversations as one corpus, each cut to `length` tokens; what was cut or odd is counted in `summary`.

    A plain text is not cut but divided: it becomes as many documents of `length` tokens as it fills, the last one
    shorter. None of it is the assistant's. Raises ValueError naming the conversation that the chat template refuses.
    """
    if not conversations:
        raise ValueError("conversations is empty")
    sources = tuple(sorted({c.source for c in conversations}))
    made = [
        (conversation, slice(at, at + length), encoded)
        for conversation, encoded in zip(conversations, _encode(conversations, tokenizer), strict=True)
        for at in range(0, 1 if conversation.text is None else len(encoded.tokens), length)
    ]
    tokens = [encoded.tokens[here] for _, here, encoded in made]
    return Corpus(
        tokens=np.concatenate(tokens),
        assistant_mask=np.concatenate([encoded.assistant_mask[here] for _, here, encoded in made]),
        offsets=np.cumsum([0, *map(len, tokens)]),
        source=np.asarray([sources.index(c.source) for c, *_ in made], np.int32),
        sources=sources,
        ids=tuple(c.id for c, *_ in made),
        truncated=np.asarray([c.text is None and len(encoded.tokens) > length for c, _, encoded in made]),
    )


def _encode(conversations: Sequence[Conversation], tokenizer: ChatTokenizer) -> list[EncodedConversation]:
    def encode(some: Sequence[Conversation]) -> list[EncodedConversation]:
        return tokenizer.encode_conversations([c.messages for c in some], unfinished=[c.unfinished for c in some])

    talks = [c for c in conversations if c.text is None]
    try:
        talked = iter(encode(talks))
        return [next(talked) if c.text is None else tokenizer.encode_text(c.text) for c in conversations]
    except ValueError:
        for conversation in talks:  # which one was it?
            try:
                encode([conversation])
            except ValueError as error:
                raise ValueError(f"conversation {conversation.id!r} of {conversation.source}: {error}") from error
        raise


@dataclass(frozen=True, eq=False)
class Rows(Sequence[list[int]]):
    """Rows of documents: row `i` holds `documents[starts[order[i]] : starts[order[i] + 1]]`."""

    documents: np.ndarray  # int64 [documents]
    starts: np.ndarray  # int64 [rows + 1]
    order: np.ndarray  # int64 [rows]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        row = self.order[index]
        return self.documents[self.starts[row] : self.starts[row + 1]].tolist()


def pack(lengths: np.ndarray, order: np.ndarray, length: int) -> Rows:
    """Rows of documents that sum to at most `length` tokens: online best fit over `order`, nothing split or lost."""
    needs = np.asarray(lengths)[order]
    if len(needs) and needs.max() > length:
        worst = int(needs.argmax())
        raise ValueError(f"document {order[worst]} has {needs[worst]} tokens, more than a row of {length}")
    rows, taken = 0, array("q")
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for need in needs.tolist():
        slot = bisect_left(open_rows, (need, 0))
        if slot < len(open_rows):
            free, row = open_rows.pop(slot)
        else:
            if len(open_rows) == _OPEN_ROWS:
                open_rows.pop(0)
            free, row = length, rows
            rows += 1
        taken.append(row)
        insort(open_rows, (free - need, row))
    row_of = np.asarray(taken, np.int64)
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
    return Rows(order[np.argsort(row_of, kind="stable")], starts, np.arange(rows))


@dataclass(frozen=True)
class Mix:
    """Documents behind the others of a corpus that stand beside them in a fixed proportion.

    Every epoch holds all documents before the first mix once, and of these as many as make `share` of its trained
    tokens. They come in one shuffled order after another, and an epoch goes on where the one before it stopped: so the
    share of all epochs together is met to within a document, and no document is taken a second time before all were
    taken once.
    """

    first: int
    """Index of the first of them; the next mix, or the corpus's end, ends them."""
    share: float
    """Of all trained tokens, those of other mixes included."""
    loss_on: LossOn = "all"
    name: str = "mix"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"mix_share is {self.share}; it must be above 0 and below 1")
        _check_loss_on("mix_loss_on", self.loss_on)


class Mixed(NamedTuple):
    """What a mix comes to in the first epoch."""

    documents: int
    """Of the mix, repeated ones included."""
    held: int
    """Different ones that there are."""
    share: float
    """Of the trained tokens."""
    name: str = "mix"

    def __str__(self) -> str:
        taken = f"{self.documents:,} of {self.held:,} documents an epoch"
        if self.documents > self.held:
            taken = (
                f"too few documents, so the {self.held:,} are repeated {self.documents / self.held:.2f} times an epoch"
            )
        return f"{taken}, {self.share:.2%} of the trained tokens"


@dataclass(frozen=True, eq=False)
class PackedBatches:
    """Batches by number: `batches[i]` depends on the corpus, the settings and `i` alone.

    A batch is a dict of arrays `[B, L]`:

    * `tokens` int32;
    * `segments` int32: 1, 2 ... for the documents of a row, 0 on padding;
    * `positions` int32: from 0 in each document;
    * `loss_mask` bool: the token may be a training target (never a document's first token, never padding);
    * `documents` int32: index into `corpus.ids`, -1 on padding;
    * `sources` int32: index into `corpus.sources`, -1 on padding.

    With `shuffle`, every epoch has its own order and its own packing; without, documents keep the order of the file.
    Epochs follow each other without a gap, and rows that are missing at the very end are padding.
    A process that needs only some `rows` of the global batch builds these.
    With `mixes`, the documents behind the first one's are taken in their proportions, and trained on as each says.
    """

    corpus: Documents
    length: int
    batch: int  # rows of the global batch
    seed: int = 0
    epochs: int | None = 1  # None: without end
    loss_on: LossOn = "all"
    shuffle: bool = True
    rows: tuple[int, ...] | None = None  # of the global batch, ascending; None: all
    mixes: tuple[Mix, ...] = ()

    def __post_init__(self) -> None:
        _check_loss_on("loss_on", self.loss_on)
        longest = int(self.corpus.lengths.max())
        if longest > self.length:
            raise ValueError(
                f"length is {self.length} but a document has {longest} tokens; tokenize the corpus for this length"
            )
        if sum(mix.share for mix in self.mixes) >= 1:
            raise ValueError("the shares of the mixes leave nothing for the corpus; lower them to a sum below 1")
        for part, name in [(self._own, "corpus"), *zip(self._mixed_in, (mix.name for mix in self.mixes), strict=True)]:
            if self.mixes and not self._trained[part].sum():
                raise ValueError(f"the {name} holds no token to train on; look at what its loss is on")

    def __len__(self) -> int:
        if self.epochs is None:
            return _ENDLESS
        return -(-sum(map(self._row_count, range(self.epochs))) // self.batch)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._build(self.documents_of(index))

    def documents_of(self, index: int) -> list[list[int]]:
        """The documents of every one of the wanted rows of batch `index`."""
        rows = range(self.batch) if self.rows is None else self.rows
        return [self._row(index * self.batch + i) for i in rows]

    @property
    def batches_per_epoch(self) -> int:
        """How many batches the first epoch touches; later ones differ by the luck of their packing, well below 1 %."""
        return -(-len(self._plan(0)) // self.batch)

    @property
    def mixed(self) -> tuple[Mixed, ...]:
        """What each mix comes to."""
        taken = [self._mix_documents(i, 0) for i in range(len(self.mixes))]
        tokens = [int(self._trained[documents].sum()) for documents in taken]
        total = int(self._trained[self._own].sum()) + sum(tokens)
        held = [part.stop - part.start for part in self._mixed_in]
        return tuple(
            Mixed(len(t), h, n / total, m.name) for t, h, n, m in zip(taken, held, tokens, self.mixes, strict=True)
        )

    @property
    def _own(self) -> slice:
        """The documents that every epoch holds once."""
        return slice(0, self.mixes[0].first if self.mixes else len(self.corpus.lengths))

    @property
    def _mixed_in(self) -> list[slice]:
        """The documents of each mix."""
        ends = [*(mix.first for mix in self.mixes[1:]), len(self.corpus.lengths)]
        return [slice(mix.first, end) for mix, end in zip(self.mixes, ends, strict=False)]

    @functools.cached_property
    def _trained(self) -> np.ndarray:
        """int64 [documents]: tokens of each that may be training targets."""
        whole, said = np.maximum(self.corpus.lengths - 1, 0), self.corpus.said
        trained = [np.where(loss_on == "all", whole[part], said[part]) for part, loss_on in self._parts]
        return np.concatenate(trained).astype(np.int64)

    @property
    def _parts(self) -> list[tuple[slice, LossOn]]:
        """Every document once, with what its loss is on."""
        parts: list[tuple[slice, LossOn]] = [(self._own, self.loss_on)]
        return parts + [(part, mix.loss_on) for part, mix in zip(self._mixed_in, self.mixes, strict=True)]

    def _loss_on(self, document: int) -> LossOn:
        return next(loss_on for part, loss_on in self._parts if document < part.stop)

    def _mix_documents(self, number: int, epoch: int) -> np.ndarray:
        """The documents of a mix in an epoch: a stretch of their endless order, repeated ones included."""
        begin, end = self._mix_place(number, epoch), self._mix_place(number, epoch + 1)
        count = self._mixed_in[number].stop - self._mixed_in[number].start
        passes = range(begin // count, end // count + 1)
        whole = np.concatenate([self._mix_pass(number, p) for p in passes])
        return whole[begin - passes[0] * count : end - passes[0] * count]

    def _mix_place(self, number: int, epoch: int) -> int:
        """How many documents of a mix are taken before an epoch: the fewest that make the share so far."""
        share, total = self.mixes[number].share, sum(mix.share for mix in self.mixes)
        owed = epoch * share / (1 - total) * int(self._trained[self._own].sum())
        whole = int(self._trained[self._mixed_in[number]].sum())
        passes = int(owed // whole)
        order = self._mix_pass(number, passes)
        within = np.concatenate([[0], np.cumsum(self._trained[order])])
        return passes * len(order) + int(np.searchsorted(within, owed - passes * whole))

    def _mix_pass(self, number: int, round: int) -> np.ndarray:
        """All documents of a mix in the order of one of their rounds."""
        part = self._mixed_in[number]
        rng = np.random.default_rng((self.seed, round, _MIX_ORDER + number))
        return rng.permutation(np.arange(part.start, part.stop))

    def token_counts(self) -> Iterator[int]:
        """Real tokens, padding apart, of batches 0, 1, 2 ... of all processes together; without end as the batches."""
        yield from map(self.token_count, range(len(self)))

    def token_count(self, index: int) -> int:
        """Real tokens, padding apart, of batch `index` of all processes together."""
        rows = (self._row(index * self.batch + i) for i in range(self.batch))
        return sum(int(np.sum(self.corpus.lengths[row], dtype=np.int64)) for row in rows if row)

    def _row(self, index: int) -> list[int]:
        """The documents of row `index` of the sequence of all epochs; none past the last epoch."""
        for epoch in count() if self.epochs is None else range(self.epochs):
            rows = self._row_count(epoch)
            if index < rows:
                return self._plan(epoch)[index]
            index -= rows
        return []

    @functools.cached_property
    def _row_counts(self) -> dict[int, int]:
        return {}

    def _row_count(self, epoch: int) -> int:
        if epoch not in self._row_counts:
            self._row_counts[epoch] = len(self._plan(epoch))
        return self._row_counts[epoch]

    @functools.cached_property
    def _plans(self) -> dict[int, Rows]:
        return {}

    def _plan(self, epoch: int) -> Rows:
        """The rows of an epoch; the two plans used last are kept."""
        plans = self._plans
        plan = plans.get(epoch)
        if plan is None:
            plan = self._pack_epoch(epoch)
            plans[epoch] = plan
            for old in sorted(plans)[:-2]:
                plans.pop(old, None)
        return plan

    def _pack_epoch(self, epoch: int) -> Rows:
        mixed = [self._mix_documents(i, epoch) for i in range(len(self.mixes))]
        documents = np.concatenate([np.arange(self._own.stop), *mixed])
        if not self.shuffle:
            return pack(self.corpus.lengths, documents, self.length)
        rng = np.random.default_rng((self.seed, epoch))
        rows = pack(self.corpus.lengths, rng.permutation(documents), self.length)
        return Rows(rows.documents, rows.starts, rng.permutation(len(rows)))

    def _build(self, rows: list[list[int]]) -> dict[str, np.ndarray]:
        shape = (len(rows), self.length)
        fields = ("tokens", "segments", "positions", "documents", "sources")
        batch = {name: np.full(shape, -1 if name in ("documents", "sources") else 0, np.int32) for name in fields}
        batch["loss_mask"] = np.zeros(shape, bool)
        read = iter(self.corpus.read([document for documents in rows for document in documents]))
        for r, documents in enumerate(rows):
            at = 0
            for segment, document in enumerate(documents, 1):
                tokens, assistant_mask = next(read)
                here = np.s_[r, at : at + len(tokens)]
                batch["tokens"][here] = tokens
                batch["segments"][here] = segment
                batch["positions"][here] = np.arange(len(tokens))
                batch["documents"][here] = document
                batch["sources"][here] = self.corpus.source[document]
                everything = self._loss_on(document) == "all"
                batch["loss_mask"][here] = True if everything else assistant_mask
                batch["loss_mask"][r, at] = False
                at += len(tokens)
        return batch


def _check_loss_on(name: str, value: str) -> None:
    if value not in ("all", "assistant"):
        raise ValueError(f"{name} is {value!r}; it must be 'all' or 'assistant'")
