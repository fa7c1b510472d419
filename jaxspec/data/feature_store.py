"""A target's features on disk: stored in the order of the first epoch, and read for any packing of the same documents.

The features of a document depend on its tokens alone, so a store is looked up by `corpus.key`. It serves every part,
mix and order of the documents that it holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.data import shards
from jaxspec.data.corpus import Documents
from jaxspec.data.packing import PackedBatches
from jaxspec.data.shards import Field, Records, Shard
from jaxspec.data.target_outputs import ARRAYS, KINDS, Kind

FORMAT = "jaxspec-features/1"
INDEX = "index.npy"
CONTENTS = "contents.json"
ENTRY = np.dtype([("key", "<u8"), ("length", "<i4")])


def feature_fields(
    width: int, vocab: int, kind: Kind, *, taps: int = 0, top_k: int = 0, whole: bool = False
) -> tuple[Field, ...]:
    """Returns the arrays of a record: features `width` wide, the same for each of `taps` layers, and `top_k` tokens.

    With `whole` the facts of the whole distribution are among them, see `target_outputs.Whole`.
    """
    fields = []
    for name, parts in (("features", 1), ("taps", taps)):
        if parts:
            fields.append(Field(name, KINDS[kind], width * parts))
            fields += [Field(f"{name}_scale", "float32", parts)] if kind == "int8" else []
    if top_k:
        token = "uint16" if vocab <= 1 << 16 else "int32"
        fields += [Field("top_tokens", token, top_k), Field("top_logp", "float32", top_k), Field("rest", "float32", 1)]
    if whole:
        fields += [Field("best_token", "int32", 1), Field("log_total", "float32", 1)]
    return tuple(fields)


class BatchPiece(NamedTuple):
    """A batch that the target runs for the sake of its new documents, those that no earlier batch holds."""

    part: int
    index: int
    first: int
    """Number of its first new document among all that are stored."""
    count: int
    """Number of its new documents."""


class FeaturePlan(NamedTuple):
    """The documents of a store, their order, and the batches that they are computed in."""

    index: np.ndarray
    """`key` and `length` of every document."""
    pieces: tuple[BatchPiece, ...]
    shards: tuple[tuple[int, int], ...]
    """The pieces of each file, as (first, last + 1)."""
    bytes_per_token: int

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents."""
        return int(self.index["length"].sum(dtype=np.int64))

    def of(self, shard: int) -> np.ndarray:
        """Returns the part of the index that one file holds."""
        first, last = (self.pieces[i] for i in (self.shards[shard][0], self.shards[shard][1] - 1))
        return self.index[first.first : last.first + last.count]

    def size(self, shard: int) -> int:
        """Returns the approximate size of a file in bytes."""
        index = self.of(shard)
        own = int(index["length"].sum(dtype=np.int64)) * self.bytes_per_token
        return own + len(index) * shards.RECORD_OVERHEAD + shards.FILE_OVERHEAD

    @property
    def digest(self) -> str:
        """A short hash of documents, order and files."""
        return hashlib.sha256(self.index.tobytes() + repr((self.pieces, self.shards)).encode()).hexdigest()[:16]


def plan_features(parts: Sequence[PackedBatches], fields: Sequence[Field], *, shard_bytes: int) -> FeaturePlan:
    """Returns a plan of every document of `parts`, in the order in which each first occurs.

    A file ends with the batch that fills `shard_bytes`.
    """
    keys = [part.corpus.keys for part in parts]
    bytes_per_token = sum(field.size for field in fields)
    seen: set[int] = set()
    entries: list[tuple[int, int]] = []
    pieces: list[BatchPiece] = []
    ranges: list[tuple[int, int]] = []
    filled, begin = 0, 0
    for number, part in enumerate(parts):
        for index in range(len(part)):
            new = [d for row in part.documents_of(index) for d in row if not _met(int(keys[number][d]), seen)]
            if not new:
                continue
            pieces.append(BatchPiece(number, index, len(entries), len(new)))
            entries += [(int(keys[number][d]), int(part.corpus.lengths[d])) for d in new]
            filled += sum(length for _, length in entries[-len(new) :]) * bytes_per_token
            if filled >= shard_bytes:
                ranges.append((begin, len(pieces)))
                filled, begin = 0, len(pieces)
    if begin < len(pieces):
        ranges.append((begin, len(pieces)))
    return FeaturePlan(np.asarray(entries, ENTRY), tuple(pieces), tuple(ranges), bytes_per_token)


def _met(key: int, seen: set[int]) -> bool:
    """Returns whether `key` was seen before, and notes it as seen."""
    known = key in seen
    seen.add(key)
    return known


def spans(batch: Mapping[str, np.ndarray]) -> Iterator[tuple[int, int, int, int]]:
    """Yields `(document, row, begin, end)` of every document of a batch, row by row."""
    for row, begin in np.argwhere((batch["segments"] > 0) & (batch["positions"] == 0)):
        length = int(np.sum(batch["segments"][row] == batch["segments"][row, begin]))
        yield int(batch["documents"][row, begin]), int(row), int(begin), int(begin) + length


def new_records(
    plan: FeaturePlan,
    piece: BatchPiece,
    fields: Sequence[Field],
    keys: np.ndarray,
    batch: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
) -> Iterator[bytes]:
    """Yields the records of a piece, cut out of the target's `arrays` of its batch, `[B, L, width]`."""
    wanted = iter(plan.index["key"][piece.first : piece.first + piece.count].tolist())
    expected = next(wanted, None)
    for document, row, begin, end in spans(batch):
        if int(keys[document]) == expected:
            yield shards.pack_record(fields, {name: array[row, begin:end] for name, array in arrays.items()})
            expected = next(wanted, None)


def begin_store(folder: Path, settings: dict[str, Any], plan: FeaturePlan) -> None:
    """Makes the folder for a plan, or checks one that was begun before.

    Raises ValueError if it was begun with other settings or documents.
    """
    shards.begin(folder, {"format": FORMAT, **settings, "contents": plan.digest})
    # Always: nothing may be finished of a folder that was begun with another plan.
    shards.write_array(folder / INDEX, plan.index)
    shards.write_json(folder / CONTENTS, {"records": [len(plan.of(i)) for i in range(len(plan.shards))]})


class FeatureStore:
    """The features in a folder that `jaxspec features` or `jaxspec import features` finished.

    Raises ValueError if it is not finished, or a file is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.about = shards.read_about(self.folder, FORMAT)
        if not (self.folder / CONTENTS).is_file():
            raise ValueError(f"{folder}: is not complete; give the jaxspec {self.maker} command that began it again")
        counts = json.loads((self.folder / CONTENTS).read_text(encoding="utf-8"))["records"]
        made = sum(Shard(self.folder, number).note_path.is_file() for number in range(len(counts)))
        if made < len(counts):
            raise ValueError(
                f"{folder}: {made} of {len(counts)} files are finished; give the jaxspec {self.maker} command that "
                "began it"
            )
        self._fields = [Field(*field) for field in self.about["fields"]]
        self._records = Records(self.folder, counts, self.maker)
        index = shards.read_array(self.folder / INDEX)
        self._lengths, self.stored_keys = index["length"], index["key"]
        self._order = np.argsort(self.stored_keys, kind="stable")
        self._sorted = self.stored_keys[self._order]

    @property
    def imported(self) -> bool:
        """True where another project made the features, perhaps with a target whose layers cannot be run here."""
        return "imported" in self.about

    @property
    def maker(self) -> str:
        """The verb that made it."""
        return "import features" if self.imported else "features"

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose inputs are stored beside the features."""
        return tuple(self.about["taps"])

    @property
    def top_k(self) -> int:
        """Number of likeliest tokens whose log-probabilities are stored; 0 for none."""
        return self.about["top_k"]

    def check(self, **facts: Any) -> None:
        """Raises ValueError naming the first of these facts (fields of `about.json`) that differs from the store's."""
        for name, mine in facts.items():
            if self.about[name] != mine:
                raise ValueError(
                    f"{self.folder}: was made with {name} {self.about[name]!r}, and this run has {mine!r}; make the "
                    f"features again with jaxspec {self.maker}, for the same config"
                )

    def find(self, corpus: Documents) -> np.ndarray:
        """Returns int64 [documents]: the number of each document's record. Raises ValueError if some are not stored."""
        keys = corpus.keys
        place = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        missing = int(np.sum(self._sorted[place] != keys))
        if missing and self.imported:
            raise ValueError(
                f"{self.folder}: {missing:,} of {len(keys):,} documents are not stored; train on the corpora beside "
                f"them: data.train={self.folder / 'train'} data.eval={self.folder / 'eval'}"
            )
        if missing:
            raise ValueError(
                f"{self.folder}: {missing:,} of {len(keys):,} documents are not stored; give jaxspec features the same "
                "data, data.length and tokenizer as the training"
            )
        return self._order[place]

    def read(self, numbers: Sequence[int], names: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Returns the arrays `[L, width]` of these names of some records. Raises ValueError naming a damaged file."""
        found = []
        for number, record in zip(numbers, self._records.read(numbers), strict=True):
            arrays, _ = shards.unpack_record(self._fields, record, int(self._lengths[number]))
            found.append({name: arrays[name] for name in names})
        return found

    def empty(self, rows: int, length: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns arrays of zeros for a batch, `[B, L, width]`."""
        return {f.name: np.zeros((rows, length, f.width), f.kind) for f in self._fields if f.name in names}


class JoinedStores(FeatureStore):
    """Several stores as one; a document that more than one holds is read from the first of them.

    Raises ValueError where they store other arrays.
    """

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        self.stores = tuple(stores)
        self.folder, self.about = Path(", ".join(str(s.folder) for s in stores)), stores[0].about
        for store in stores[1:]:
            if store.about["fields"] != self.about["fields"] or store.taps != stores[0].taps:
                raise ValueError(
                    f"{store.folder}: stores other arrays than {stores[0].folder}: join stores of one kind"
                )
        self._starts = np.cumsum([0, *(len(store.stored_keys) for store in stores)])
        self.stored_keys = np.concatenate([store.stored_keys for store in stores])
        self._order = np.argsort(self.stored_keys, kind="stable")
        self._sorted = self.stored_keys[self._order]

    @property
    def top_k(self) -> int:
        """The least of the stores' numbers."""
        return min(store.top_k for store in self.stores)

    def check(self, **facts: Any) -> None:
        """Raises ValueError as `FeatureStore.check` of the first store that differs."""
        for store in self.stores:
            store.check(**facts)

    def read(self, numbers: Sequence[int], names: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """See `FeatureStore`."""
        part = np.searchsorted(self._starts, numbers, side="right") - 1
        found: dict[int, dict[str, np.ndarray]] = {}
        for which, store in enumerate(self.stores):
            places = np.flatnonzero(part == which).tolist()
            own = [int(numbers[place] - self._starts[which]) for place in places]
            found |= dict(zip(places, store.read(own, names), strict=True))
        return [found[place] for place in range(len(numbers))]

    def empty(self, rows: int, length: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """See `FeatureStore`."""
        return self.stores[0].empty(rows, length, names)


def open_features(names: str) -> FeatureStore:
    """Returns the store in a folder, or those of several folders joined by commas as one."""
    stores = [FeatureStore(name.strip()) for name in names.split(",")]
    return stores[0] if len(stores) == 1 else JoinedStores(stores)


class FeatureBatches:
    """Packed batches with the target's outputs, read from a store: arrays of `ARRAYS`, zero on padding.

    With `taps` the auxiliary hidden states are among them, with `top_k` that many of the likeliest tokens, and with
    `whole` the facts of the whole distribution where the store has them. Raises ValueError if a document is not stored,
    or fewer than `top_k` tokens are.
    """

    def __init__(
        self, packed: PackedBatches, store: FeatureStore, *, taps: bool = False, top_k: int = 0, whole: bool = False
    ) -> None:
        if top_k > store.top_k:
            raise ValueError(
                f"{store.folder}: holds {store.top_k} log-probabilities a token, and data.top_k is {top_k}"
            )
        self.packed, self.corpus = packed, packed.corpus
        self._store, self._top_k, self._places = store, top_k, store.find(packed.corpus)
        wanted = ARRAYS[:2] + (ARRAYS[2:4] if taps else ()) + (ARRAYS[4:7] if top_k else ())
        wanted += ARRAYS[7:] if whole else ()
        self._names = [name for name in wanted if name in store.empty(0, 0, ARRAYS)]

    def __len__(self) -> int:
        return len(self.packed)

    def token_count(self, index: int) -> int:
        """See `PackedBatches`."""
        return self.packed.token_count(index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch = self.packed[index]
        rows, length = batch["tokens"].shape
        arrays = self._store.empty(rows, length, self._names)
        placed = list(spans(batch))
        read = self._store.read([self._places[document] for document, *_ in placed], self._names)
        for (_, row, begin, end), record in zip(placed, read, strict=True):
            for name in self._names:
                arrays[name][row, begin:end] = record[name]
        return batch | (shorten(arrays, self._top_k) if self._top_k else arrays)


def shorten(arrays: dict[str, np.ndarray], top_k: int) -> dict[str, np.ndarray]:
    """Returns the arrays with the first `top_k` of the likeliest tokens; `rest` gains the mass of the others."""
    logp, rest = arrays["top_logp"], arrays["rest"]
    for place in range(logp.shape[-1] - 1, top_k - 1, -1):
        rest = np.logaddexp(rest, logp[..., place : place + 1])
    kept = {
        "top_tokens": arrays["top_tokens"][..., :top_k].astype(np.int32),
        "top_logp": logp[..., :top_k],
        "rest": rest,
    }
    return {**arrays, **kept}
