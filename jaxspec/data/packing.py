"""Tokenized conversations in memory and their packing into rows of fixed length, as pure functions of (seed, step)."""

import functools
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple

import numpy as np

from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import Conversation

_OPEN_ROWS = 64  # rows that may still take a document while packing
_ENDLESS = 1 << 40  # the length of a stream that repeats without end


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
    With `shard_count` processes, each builds its `batch / shard_count` rows of the same global batch.
    """

    corpus: Corpus
    length: int
    batch: int  # rows of the global batch
    seed: int = 0
    epochs: int | None = 1  # None: without end
    loss_on: Literal["all", "assistant"] = "all"
    shuffle: bool = True
    shard_index: int = 0
    shard_count: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.shard_count:
            raise ValueError(f"batch is {self.batch}, which {self.shard_count} processes cannot share evenly")
        if self.loss_on not in ("all", "assistant"):
            raise ValueError(f"loss_on is {self.loss_on!r}; it must be 'all' or 'assistant'")
        longest = int(self.corpus.lengths.max())
        if longest > self.length:
            raise ValueError(
                f"length is {self.length} but a document has {longest} tokens; tokenize the corpus for this length"
            )

    def __len__(self) -> int:
        if self.epochs is None:
            return _ENDLESS
        return -(-sum(map(self._row_count, range(self.epochs))) // self.batch)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rows = self.batch // self.shard_count
        first = index * self.batch + self.shard_index * rows
        return self._build([self._row(first + i) for i in range(rows)])

    @property
    def batches_per_epoch(self) -> int:
        """How many batches the first epoch touches; later ones differ by the luck of their packing, well below 1 %."""
        return -(-len(self._plan(0)) // self.batch)

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
        documents = len(self.corpus.ids)
        if not self.shuffle:
            return pack(self.corpus.lengths, np.arange(documents), self.length)
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
                batch["loss_mask"][here] = (
                    self.corpus.assistant_mask[start:end] if self.loss_on == "assistant" else True
                )
                batch["loss_mask"][r, at] = False
                at += end - start
        return batch
