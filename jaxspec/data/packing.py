"""Tokenized conversations in memory and their packing into rows of fixed length, as pure functions of (seed, step)."""

import functools
import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple

import numpy as np

from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import Conversation

_OPEN_ROWS = 64  # rows that may still take a document while packing
_ENDLESS = 1 << 40  # the length of a stream that repeats without end
_MIX_ORDER = 1  # keeps the order of the mix apart from that of the epochs

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


class Corpus(NamedTuple):
    """Tokenized documents, one after another; document `d` is `tokens[offsets[d]:offsets[d+1]]`."""

    tokens: np.ndarray  # int32 [total]
    assistant_mask: np.ndarray  # bool [total]
    offsets: np.ndarray  # int64 [documents + 1]
    source: np.ndarray  # int32 [documents], index into `sources`
    sources: tuple[str, ...]
    ids: tuple[str, ...]  # the conversations' own ids
    summary: Summary

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens in each."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """Of all that training sees of it, in hex."""
        digest = hashlib.sha256(repr((self.sources, self.ids)).encode())
        for array in (self.tokens, self.assistant_mask, self.offsets, self.source):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]


def join(first: Corpus, second: Corpus) -> Corpus:
    """The documents of `first`, then those of `second`."""
    sources = tuple(sorted({*first.sources, *second.sources}))
    source = [np.asarray([sources.index(s) for s in c.sources], np.int32)[c.source] for c in (first, second)]
    return Corpus(
        tokens=np.concatenate([first.tokens, second.tokens]),
        assistant_mask=np.concatenate([first.assistant_mask, second.assistant_mask]),
        offsets=np.concatenate([first.offsets, first.offsets[-1] + second.offsets[1:]]),
        source=np.concatenate(source),
        sources=sources,
        ids=first.ids + second.ids,
        summary=Summary(*(a + b for a, b in zip(first.summary, second.summary, strict=True))),
    )


def tokenize_conversations(conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, length: int) -> Corpus:
    """All conversations as one corpus, each cut to `length` tokens; what was cut or odd is counted in `summary`."""
    if not conversations:
        raise ValueError("conversations is empty")
    unfinished = [c.unfinished for c in conversations]
    encoded = tokenizer.encode_conversations([c.messages for c in conversations], unfinished=unfinished)
    masks = [e.assistant_mask[:length] for e in encoded]
    sources = tuple(sorted({c.source for c in conversations}))
    summary = Summary(
        documents=len(encoded),
        tokens=sum(len(m) for m in masks),
        truncated=sum(len(e.tokens) > length for e in encoded),
        without_assistant=sum(not m.any() for m in masks),
        only_assistant=sum(bool(m.all()) for m in masks),
    )
    return Corpus(
        tokens=np.concatenate([e.tokens[:length] for e in encoded]),
        assistant_mask=np.concatenate(masks),
        offsets=np.cumsum([0, *(len(m) for m in masks)]),
        source=np.asarray([sources.index(c.source) for c in conversations], np.int32),
        sources=sources,
        ids=tuple(c.id for c in conversations),
        summary=summary,
    )


def pack(lengths: np.ndarray, order: np.ndarray, length: int) -> list[list[int]]:
    """Rows of documents that sum to at most `length` tokens: online best fit over `order`, nothing split or lost."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for document in order.tolist():
        need = int(lengths[document])
        if need > length:
            raise ValueError(f"document {document} has {need} tokens, more than a row of {length}")
        slot = bisect_left(open_rows, (need, 0))
        if slot < len(open_rows):
            free, row = open_rows.pop(slot)
        else:
            if len(open_rows) == _OPEN_ROWS:
                open_rows.pop(0)
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(document)
        insort(open_rows, (free - need, row))
    return rows


@dataclass(frozen=True)
class Mix:
    """Documents at the end of a corpus that stand beside the others in a fixed proportion.

    Every epoch holds all other documents once, and of these as many as make `share` of its trained tokens. They come in
    one shuffled order after another, and an epoch goes on where the one before it stopped: so the share of all epochs
    together is met to within a document, and no document is taken a second time before all were taken once.
    """

    first: int
    """Index of the first of them."""
    share: float
    loss_on: LossOn = "all"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"mix_share is {self.share}; it must be above 0 and below 1")
        _check_loss_on("mix_loss_on", self.loss_on)


class Mixed(NamedTuple):
    """What mixing comes to in the first epoch."""

    documents: int
    """Of the mix, repeated ones included."""
    held: int
    """Different ones that there are."""
    share: float
    """Of the trained tokens."""

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
    With a `mix`, the last documents of the corpus are taken in its proportion, and trained on as it says.
    """

    corpus: Corpus
    length: int
    batch: int  # rows of the global batch
    seed: int = 0
    epochs: int | None = 1  # None: without end
    loss_on: LossOn = "all"
    shuffle: bool = True
    rows: tuple[int, ...] | None = None  # of the global batch, ascending; None: all
    mix: Mix | None = None

    def __post_init__(self) -> None:
        _check_loss_on("loss_on", self.loss_on)
        longest = int(self.corpus.lengths.max())
        if longest > self.length:
            raise ValueError(
                f"length is {self.length} but a document has {longest} tokens; tokenize the corpus for this length"
            )
        for part, name in ((self._own, "corpus"), (self._mixed_in, "mix")) if self.mix else ():
            if not self._trained[part].sum():
                raise ValueError(f"the {name} holds no token to train on; look at what its loss is on")

    def __len__(self) -> int:
        if self.epochs is None:
            return _ENDLESS
        return -(-sum(map(self._row_count, range(self.epochs))) // self.batch)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rows = range(self.batch) if self.rows is None else self.rows
        return self._build([self._row(index * self.batch + i) for i in rows])

    @property
    def batches_per_epoch(self) -> int:
        """How many batches the first epoch touches; later ones differ by the luck of their packing, well below 1 %."""
        return -(-len(self._plan(0)) // self.batch)

    @property
    def mixed(self) -> Mixed | None:
        """What mixing comes to; None without."""
        if self.mix is None:
            return None
        taken = self._mix_documents(0)
        theirs, own = int(self._trained[taken].sum()), int(self._trained[self._own].sum())
        return Mixed(len(taken), len(self.corpus.ids) - self.mix.first, theirs / (theirs + own))

    @property
    def _own(self) -> slice:
        """The documents that every epoch holds once."""
        return np.s_[: self.mix.first if self.mix else None]

    @property
    def _mixed_in(self) -> slice:
        return np.s_[self.mix.first if self.mix else len(self.corpus.ids) :]

    @functools.cached_property
    def _trained(self) -> np.ndarray:
        """int64 [documents]: tokens of each that may be training targets."""
        starts, ends = self.corpus.offsets[:-1], self.corpus.offsets[1:]
        seen = np.concatenate([[0], np.cumsum(self.corpus.assistant_mask, dtype=np.int64)])
        said = seen[ends] - seen[np.minimum(starts + 1, ends)]
        whole = np.maximum(self.corpus.lengths - 1, 0)
        return np.where([self._loss_on(d) == "all" for d in range(len(starts))], whole, said)

    def _loss_on(self, document: int) -> LossOn:
        return self.mix.loss_on if self.mix and document >= self.mix.first else self.loss_on

    def _mix_documents(self, epoch: int) -> np.ndarray:
        """The documents of the mix in an epoch: a stretch of their endless order, repeated ones included."""
        if self.mix is None:
            return np.empty(0, np.int64)
        begin, end = self._mix_place(epoch), self._mix_place(epoch + 1)
        count = len(self.corpus.ids) - self.mix.first
        passes = range(begin // count, end // count + 1)
        return np.concatenate([self._mix_pass(p) for p in passes])[begin - passes[0] * count : end - passes[0] * count]

    def _mix_place(self, epoch: int) -> int:
        """How many documents of the mix are taken before an epoch: the fewest that make the share so far."""
        assert self.mix is not None
        owed = epoch * self.mix.share / (1 - self.mix.share) * int(self._trained[self._own].sum())
        whole = int(self._trained[self._mixed_in].sum())
        passes = int(owed // whole)
        order = self._mix_pass(passes)
        within = np.concatenate([[0], np.cumsum(self._trained[order])])
        return passes * len(order) + int(np.searchsorted(within, owed - passes * whole))

    def _mix_pass(self, number: int) -> np.ndarray:
        """All documents of the mix in the order of their pass `number`."""
        documents = np.arange(len(self.corpus.ids))[self._mixed_in]
        return np.random.default_rng((self.seed, number, _MIX_ORDER)).permutation(documents)

    def token_counts(self) -> Iterator[int]:
        """Real tokens, padding apart, of batches 0, 1, 2 ... of all processes together; without end as the batches."""
        yield from map(self.token_count, range(len(self)))

    def token_count(self, index: int) -> int:
        """Real tokens, padding apart, of batch `index` of all processes together."""
        offsets, rows = self.corpus.offsets, (self._row(index * self.batch + i) for i in range(self.batch))
        documents = np.asarray([document for row in rows for document in row], np.int64)
        return int(np.sum(offsets[documents + 1] - offsets[documents]))

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
    def _plans(self) -> dict[int, list[list[int]]]:
        return {}

    def _plan(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch; the two plans used last are kept."""
        plans = self._plans
        plan = plans.get(epoch)
        if plan is None:
            plan = self._pack_epoch(epoch)
            plans[epoch] = plan
            for old in sorted(plans)[:-2]:
                plans.pop(old, None)
        return plan

    def _pack_epoch(self, epoch: int) -> list[list[int]]:
        documents = np.concatenate([np.arange(len(self.corpus.ids))[self._own], self._mix_documents(epoch)])
        if not self.shuffle:
            return pack(self.corpus.lengths, documents, self.length)
        rng = np.random.default_rng((self.seed, epoch))
        rows = pack(self.corpus.lengths, rng.permutation(documents), self.length)
        return [rows[i] for i in rng.permutation(len(rows))]

    def _build(self, rows: list[list[int]]) -> dict[str, np.ndarray]:
        shape = (len(rows), self.length)
        fields = ("tokens", "segments", "positions", "documents", "sources")
        batch = {name: np.full(shape, -1 if name in ("documents", "sources") else 0, np.int32) for name in fields}
        batch["loss_mask"] = np.zeros(shape, bool)
        for r, documents in enumerate(rows):
            at = 0
            for segment, document in enumerate(documents, 1):
                start, end = self.corpus.offsets[document : document + 2]
                here = np.s_[r, at : at + end - start]
                batch["tokens"][here] = self.corpus.tokens[start:end]
                batch["segments"][here] = segment
                batch["positions"][here] = np.arange(end - start)
                batch["documents"][here] = document
                batch["sources"][here] = self.corpus.source[document]
                everything = self._loss_on(document) == "all"
                batch["loss_mask"][here] = True if everything else self.corpus.assistant_mask[start:end]
                batch["loss_mask"][r, at] = False
                at += end - start
        return batch


def _check_loss_on(name: str, value: str) -> None:
    if value not in ("all", "assistant"):
        raise ValueError(f"{name} is {value!r}; it must be 'all' or 'assistant'")
