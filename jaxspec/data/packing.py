"""Packing of tokenized documents into rows of fixed length, as pure functions of (seed, step)."""

import functools
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxspec.data.corpus import Documents

_OPEN_ROWS = 64  # rows that may still take a document while packing
_ENDLESS = 1 << 40  # the length of a stream that repeats without end
_MIX_ORDER = 1  # keeps the order of the first mix, and this plus one that of the second, apart from the epochs'

LossOn = Literal["all", "assistant"]


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
    """Returns rows of documents of at most `length` tokens in all, by online best fit over `order`.

    Every document is in one row, whole. Raises ValueError for a document longer than a row.
    """
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
    """Documents at the end of a corpus that are mixed into every epoch in a fixed proportion.

    Every epoch holds all documents before the first mix once, and as many of the mix as make `share` of its trained
    tokens. The mix comes in one shuffled order after another, and an epoch continues where the one before it stopped.
    So the share over all epochs is exact to within a document, and no document is taken a second time before all were
    taken once.
    """

    first: int
    """Index of the mix's first document; the next mix, or the end of the corpus, ends it."""
    share: float
    """Share of all trained tokens, those of other mixes included."""
    loss_on: LossOn = "all"
    """Tokens of the mix that are trained on; all of them, as in pretraining, unless told otherwise."""
    name: str = "mix"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"mix_share is {self.share}; it must be above 0 and below 1")
        _check_loss_on("mix_loss_on", self.loss_on)


class Mixed(NamedTuple):
    """The part of a mix in the first epoch."""

    documents: int
    """Documents taken from the mix, repeated ones included."""
    held: int
    """Documents in the mix."""
    share: float
    """Share of the trained tokens."""
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
    * `loss_mask` bool: whether the token may be a training target (never a document's first token or padding);
    * `documents` int32: index into `corpus.ids`, -1 on padding;
    * `sources` int32: index into `corpus.sources`, -1 on padding.

    With `shuffle`, every epoch has its own order and its own packing; without, documents keep the order of the file.
    Epochs follow each other without a gap, and rows that are missing at the very end are padding.
    A process that needs only some `rows` of the global batch builds only those.
    With `mixes`, the documents of each mix are taken in its proportion and trained on as its `loss_on` says.
    """

    corpus: Documents
    length: int
    """Tokens of a row."""
    batch: int
    """Rows of the global batch."""
    seed: int = 0
    epochs: int | None = 1
    """Number of epochs; None for no end."""
    loss_on: LossOn = "all"
    shuffle: bool = True
    rows: tuple[int, ...] | None = None
    """Rows of the global batch that are built, ascending; None for all."""
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
                raise ValueError(f"the {name} holds no token to train on; check which tokens its loss is on")

    def __len__(self) -> int:
        if self.epochs is None:
            return _ENDLESS
        return -(-sum(map(self._row_count, range(self.epochs))) // self.batch)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._build(self.documents_of(index))

    def documents_of(self, index: int) -> list[list[int]]:
        """Returns the documents of each of the `rows` of batch `index`."""
        rows = range(self.batch) if self.rows is None else self.rows
        return [self._row(index * self.batch + i) for i in rows]

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches that the first epoch touches; later epochs pack differently, by well below 1 %."""
        return -(-len(self._plan(0)) // self.batch)

    @property
    def mixed(self) -> tuple[Mixed, ...]:
        """The part of each mix in the first epoch."""
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
        """int64 [documents]: the number of tokens of each that may be training targets."""
        whole, said = np.maximum(self.corpus.lengths - 1, 0), self.corpus.said
        trained = [np.where(loss_on == "all", whole[part], said[part]) for part, loss_on in self._parts]
        return np.concatenate(trained).astype(np.int64)

    @property
    def _parts(self) -> list[tuple[slice, LossOn]]:
        """The ranges of documents, which cover the corpus, and the tokens that the loss of each is on."""
        parts: list[tuple[slice, LossOn]] = [(self._own, self.loss_on)]
        return parts + [(part, mix.loss_on) for part, mix in zip(self._mixed_in, self.mixes, strict=True)]

    def _loss_on(self, document: int) -> LossOn:
        return next(loss_on for part, loss_on in self._parts if document < part.stop)

    def _mix_documents(self, number: int, epoch: int) -> np.ndarray:
        """Returns the documents of a mix in an epoch: a stretch of their endless order, repeated ones included."""
        begin, end = self._mix_place(number, epoch), self._mix_place(number, epoch + 1)
        count = self._mixed_in[number].stop - self._mixed_in[number].start
        passes = range(begin // count, end // count + 1)
        whole = np.concatenate([self._mix_pass(number, p) for p in passes])
        return whole[begin - passes[0] * count : end - passes[0] * count]

    def _mix_place(self, number: int, epoch: int) -> int:
        """Returns how many documents of a mix are taken before an epoch: the fewest that make the share so far."""
        share, total = self.mixes[number].share, sum(mix.share for mix in self.mixes)
        # The mix makes `share` of all tokens and the corpus 1 - `total`, so per token of the corpus the mix owes
        # share / (1 - total). Tokens are counted, not documents or rows, because the loss is a mean over tokens.
        owed = epoch * share / (1 - total) * int(self._trained[self._own].sum())
        whole = int(self._trained[self._mixed_in[number]].sum())
        passes = int(owed // whole)
        order = self._mix_pass(number, passes)
        within = np.concatenate([[0], np.cumsum(self._trained[order])])
        return passes * len(order) + int(np.searchsorted(within, owed - passes * whole))

    def _mix_pass(self, number: int, round: int) -> np.ndarray:
        """Returns all documents of a mix in the order of one of their rounds."""
        part = self._mixed_in[number]
        rng = np.random.default_rng((self.seed, round, _MIX_ORDER + number))
        return rng.permutation(np.arange(part.start, part.stop))

    def token_counts(self) -> Iterator[int]:
        """Yields the number of tokens, without padding, of batches 0, 1, 2 ... of all processes together."""
        yield from map(self.token_count, range(len(self)))

    def token_count(self, index: int) -> int:
        """Returns the number of tokens, without padding, of batch `index` of all processes together."""
        rows = (self._row(index * self.batch + i) for i in range(self.batch))
        return sum(int(np.sum(self.corpus.lengths[row], dtype=np.int64)) for row in rows if row)

    def _row(self, index: int) -> list[int]:
        """Returns the documents of row `index` of all epochs in sequence; none past the last epoch."""
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
        """Returns the rows of an epoch; the plans of two epochs are kept."""
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
