"""Tokenized corpora on disk: one record a document, read when its batch is built, and an index mapped into memory.

A process holds only the index of a corpus in memory, and shares that with the other processes of its machine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.data import shards
from jaxspec.data.account import Account
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import Record, find_files, parse_records, read_records, split_names
from jaxspec.data.corpus import Document, Ids, Summary, key, tokenize_block
from jaxspec.data.shards import Field, Records, Shard, ShardWriter
from jaxspec.data.turns import EVERY_TURN, TurnEncoder, TurnOptions

FORMAT = "jaxspec-corpus/1"
INDEX = "index.npy"
CONTENTS = "contents.json"
"""The file that is written last: a folder with it holds a complete corpus."""
_TOGETHER = 1024  # conversations tokenized together
_ENTRY = np.dtype(
    [("length", "<i4"), ("assistant", "<i4"), ("said", "<i4"), ("source", "<i4"), ("truncated", "?"), ("key", "<u8")]
)
"""A document in the index: numbers of tokens, of the assistant's, and of these after the first token; and so on."""


def token_fields(vocab: int) -> tuple[Field, ...]:
    """Returns the arrays of a record; the conversation's id follows them."""
    return Field("tokens", "uint16" if vocab <= 1 << 16 else "int32", 1), Field("assistant", "uint8", 1)


@dataclass(frozen=True)
class CorpusSettings:
    """Settings that decide the contents of a corpus's files."""

    length: int
    """Tokens that a conversation is cut to."""
    limit: int | None = None
    """Conversations taken of each name; None for all."""
    shard_documents: int = 1 << 16
    """Conversations of a shard."""
    turns: TurnOptions = EVERY_TURN
    skip_bad: bool = False
    """Whether conversations that cannot be used are left out, and counted."""

    def about(self) -> dict[str, Any]:
        """Returns the settings as a corpus notes them; those of later versions are None at their defaults."""
        turns = {name: value for name, value in asdict(self.turns).items() if value != getattr(EVERY_TURN, name)}
        found = {"length": self.length, "limit": self.limit, "shard_documents": self.shard_documents}
        return found | {"turns": turns or None, "skip_bad": self.skip_bad or None}


def write_corpus(
    folder: Path,
    names: str,
    tokenizer: ChatTokenizer,
    settings: CorpusSettings,
    *,
    part: tuple[int, int] = (0, 1),
    verify: bool = False,
) -> Generator[int, None, None]:
    """Tokenizes the conversations of `names` (joined by commas) into `folder`.

    A call continues where an earlier one stopped. With `part` `(i, n)` it makes every n-th shard from the i-th on; the
    call that finds all shards finished completes the corpus. With `verify` it makes shards again whose checksum has
    changed. Yields how many conversations each step has tokenized or skipped. Raises ValueError if the folder was begun
    with other settings, and naming the conversation that is malformed or that the chat template refuses, unless such
    are skipped.
    """
    turns = TurnEncoder(tokenizer, settings.turns)
    fields = token_fields(tokenizer.vocab_size)
    chosen = [named.name for named in split_names(names)]
    if split_names(names)[0].weight is not None:
        raise ValueError(f"{names!r}: weights are for data.train; tokenize each apart, and weigh the folders there")
    files = [path for name in chosen for path in find_files(name)]
    about = {
        "format": FORMAT,
        **tokenizer.fingerprint,
        "files": [[str(path), path.stat().st_size] for path in files],
        "contents": [shards.content_hash(path) for path in files],
        **settings.about(),
        "fields": [list(field) for field in fields],
    }
    shards.begin(folder, about)
    records = (record for name in chosen for record in read_records(name, limit=settings.limit))
    whole = True
    for number in count():
        first = next(records, None)
        if first is None:
            break
        shard, block = Shard(folder, number), chain([first], islice(records, settings.shard_documents - 1))
        if shard.note() and not (verify and shard.is_damaged()):
            yield sum(1 for _ in block)
        elif number % part[1] == part[0]:
            yield from _write_shard(shard, block, turns, fields, settings)
        else:
            whole = False
            yield sum(1 for _ in block)
    if number == 0:
        raise ValueError(f"{names}: holds no conversation")
    if whole:
        _complete(folder, number)


class TokenizedDocument(NamedTuple):
    """A document that somebody else tokenized."""

    id: str
    document: Document
    truncated: bool


def write_documents(
    folder: Path,
    documents: Iterable[TokenizedDocument],
    tokenizer: ChatTokenizer,
    settings: CorpusSettings,
    *,
    source: tuple[str, int],
    vocab: int,
) -> None:
    """Writes documents that are tokenized already as a complete corpus, which `tokenizer` checks as its own.

    `source` is their source's name and their number. A call that was killed is repeated whole. Raises ValueError if the
    folder was begun with other settings.
    """
    fields, rest, number = token_fields(vocab), iter(documents), 0
    about = {
        "format": FORMAT,
        **tokenizer.fingerprint,
        "files": [list(source)],
        **settings.about(),
        "fields": [list(field) for field in fields],
    }
    shards.begin(folder, about)
    while block := list(islice(rest, settings.shard_documents)):
        shard = Shard(folder, number)
        writer = ShardWriter(shard, "group_size:1,zstd:3")
        for id, (tokens, mask), _ in block:
            writer.write(shards.pack_record(fields, {"tokens": tokens, "assistant": mask}, id.encode()))
        shards.write_array(_index_of(shard), _entries(np.asarray([d.truncated for d in block]), [d[1] for d in block]))
        writer.seal(sources=[source[0]])
        number += 1
    _complete(folder, number)


def _write_shard(
    shard: Shard, records: Iterator[Record], turns: TurnEncoder, fields: Sequence[Field], settings: CorpusSettings
) -> Iterator[int]:
    """Writes one shard and its part of the index; yields how many conversations each step has done."""
    entries, sources = [np.zeros(0, _ENTRY)], {}
    account = Account(skip_bad=settings.skip_bad)
    writer = ShardWriter(shard, "group_size:1,zstd:3")
    while block := list(islice(records, _TOGETHER)):
        corpus = tokenize_block(parse_records(block, account), turns, settings.length, account)
        documents = corpus.read(range(len(corpus.ids)))
        for id, (tokens, mask) in zip(corpus.ids, documents, strict=True):
            writer.write(shards.pack_record(fields, {"tokens": tokens, "assistant": mask}, id.encode()))
        entries.append(_entries(corpus.truncated, documents))
        entries[-1]["source"] = [sources.setdefault(corpus.sources[s], len(sources)) for s in corpus.source]
        yield len(block)
    shards.write_array(_index_of(shard), np.concatenate(entries))
    writer.seal(sources=list(sources), counts=dict(account.counts), examples=account.examples)


def _entries(truncated: np.ndarray, documents: Sequence[Document]) -> np.ndarray:
    entries = np.zeros(len(documents), _ENTRY)
    entries["truncated"] = truncated
    for entry, (tokens, mask) in zip(entries, documents, strict=True):
        entry["length"], entry["assistant"], entry["said"] = len(tokens), mask.sum(), mask[1:].sum()
        entry["key"] = key(tokens)
    return entries


def _index_of(shard: Shard) -> Path:
    return shard.path.with_suffix(".npy")


def _complete(folder: Path, count: int) -> None:
    """Joins the parts of the index, and writes `CONTENTS`, which marks the corpus as complete."""
    made = [Shard(folder, number) for number in range(count)]
    notes = [shard.note() or {} for shard in made]
    sources = sorted({source for note in notes for source in note["sources"]})
    parts = []
    for shard, note in zip(made, notes, strict=True):
        part = np.array(shards.read_array(_index_of(shard)))
        part["source"] = np.asarray([sources.index(s) for s in note["sources"]], np.int32)[part["source"]]
        parts.append(part)
    shards.write_array(folder / INDEX, np.concatenate(parts))
    counts = [note["records"] for note in notes]
    told = Counter[str]()
    for note in notes:
        told.update(note.get("counts", {}))
    examples = {kind: text for note in notes[::-1] for kind, text in note.get("examples", {}).items()}
    shards.write_json(
        folder / CONTENTS, {"records": counts, "sources": sources, "counts": dict(told), "examples": examples}
    )


def is_corpus(name: str | Path) -> bool:
    """Returns whether `name` is a folder that `write_corpus` began."""
    path = Path(name) / shards.ABOUT
    if not path.is_file():
        return False
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error}): make the corpus anew, or move the file away") from error
    return isinstance(about, dict) and about.get("format") == FORMAT


def is_complete(folder: Path) -> bool:
    """Returns whether the corpus in a folder is complete."""
    return (folder / CONTENTS).is_file()


class StoredCorpus:
    """A corpus that `write_corpus` completed, or its first `limit` documents; see `corpus.Documents`.

    Raises ValueError if it is not complete.
    """

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self.folder, self.limit = Path(folder), limit
        self.about = shards.read_about(self.folder, FORMAT)
        if not is_complete(self.folder):
            raise ValueError(f"{folder}: is not complete; give the jaxspec tokenize command that began it again")
        contents = json.loads((self.folder / CONTENTS).read_text(encoding="utf-8"))
        self.sources: tuple[str, ...] = tuple(contents["sources"])
        self.counts: dict[str, int] = contents.get("counts", {})
        self.examples: dict[str, str] = contents.get("examples", {})
        """The first record of each kind that was left out."""
        self._fields = [Field(*field) for field in self.about["fields"]]
        self._records = Records(self.folder, contents["records"], "tokenize")
        self._index = index = shards.read_array(self.folder / INDEX)[:limit]
        self.summary = Summary(
            documents=len(index),
            tokens=int(index["length"].sum(dtype=np.int64)),
            truncated=int(index["truncated"].sum()),
            without_assistant=int((index["assistant"] == 0).sum()),
            only_assistant=int((index["assistant"] == index["length"]).sum()),
        )

    def __reduce__(self) -> Any:
        return StoredCorpus, (self.folder, self.limit)  # a copy in another process maps the same file

    @property
    def lengths(self) -> np.ndarray:
        """See `Documents`."""
        return self._index["length"]

    @property
    def said(self) -> np.ndarray:
        """See `Documents`."""
        return self._index["said"]

    @property
    def keys(self) -> np.ndarray:
        """See `Documents`."""
        return self._index["key"]

    @property
    def source(self) -> np.ndarray:
        """See `Documents`."""
        return self._index["source"]

    @property
    def ids(self) -> Sequence[str]:
        """See `Documents`."""
        return Ids(len(self._index), lambda document: self._unpack([document])[0][1])

    def read(self, documents: Sequence[int]) -> list[Document]:
        """See `Documents`. Raises ValueError naming a file that is damaged."""
        return [document for document, _ in self._unpack(documents)]

    @property
    def turns(self) -> TurnOptions:
        """The turns that it was made of."""
        return TurnOptions(**(self.about.get("turns") or {}))

    def check(self, tokenizer: ChatTokenizer, turns: TurnOptions = EVERY_TURN) -> None:
        """Raises ValueError if it was made with another tokenizer or template, or of other turns."""
        if self.turns != turns:
            raise ValueError(
                f"{self.folder}: was tokenized with {self.turns}, not {turns}; give jaxspec tokenize the same flags as "
                "the config, and another --out"
            )
        for name, mine in tokenizer.fingerprint.items():
            if self.about[name] != mine:
                raise ValueError(
                    f"{self.folder}: was tokenized with another {name} than the target's; give jaxspec tokenize the "
                    "--target (and --template) that is trained for, and another --out"
                )

    def _unpack(self, documents: Sequence[int]) -> list[tuple[Document, str]]:
        found = []
        for document, record in zip(documents, self._records.read(documents), strict=True):
            arrays, id = shards.unpack_record(self._fields, record, int(self._index["length"][document]))
            tokens, mask = arrays["tokens"][:, 0].astype(np.int32), arrays["assistant"][:, 0].astype(bool)
            found.append((Document(tokens, mask), id.decode()))
        return found
