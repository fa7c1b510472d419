"""Import of hidden states that other projects dumped, as a feature store and the two corpora that are trained from it.

The folder is what `jaxspec features` writes: shards, an index and `about.json`. Tokens and loss masks are the dump's
own, so they lie beside it: `train` and `eval` are corpora as `jaxspec tokenize` writes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxspec.data import shards
from jaxspec.data.chat import ChatTokenizer, TemplateChoice
from jaxspec.data.chat_template import DATE
from jaxspec.data.corpus import Document, key
from jaxspec.data.feature_store import CONTENTS, ENTRY, FORMAT, INDEX
from jaxspec.data.shards import Shard, ShardWriter
from jaxspec.data.target_outputs import shrink
from jaxspec.data.tokenized_corpus import CorpusSettings, TokenizedDocument, write_documents
from jaxspec.interchange.dump_checks import (
    Finding,
    check_embedding,
    find_last_state,
    is_affordable,
    recompute,
)
from jaxspec.interchange.dumps import BadDocument, DumpedDocument, measure, names_of
from jaxspec.interchange.hf import table_fingerprint
from jaxspec.interchange.import_plan import PLAN, DumpImport

SAMPLE = 8
"""Documents that the checks read, spread over the dump."""
SKIPPING = "--skip-bad leaves such documents out and counts them"
_TOKEN = np.dtype([("token", "<i4"), ("assistant", "?")])
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Sample(NamedTuple):
    """Documents of a dump that its checks read."""

    documents: tuple[DumpedDocument, ...]
    dtype: str
    """Of the states."""
    tokens: int
    """Of the documents, cut to the settings' length."""
    bytes: int
    """Of their files."""


class ImportSummary(NamedTuple):
    """Counts of an imported dump."""

    documents: int
    tokens: int
    answer_tokens: int
    truncated: int
    held_out: int
    longest: int
    """Tokens of the longest document."""
    skipped: dict[str, int]
    """Documents left out, by reason."""
    examples: dict[str, str]
    """The first of them by each reason, in a sentence."""


def read_sample(work: DumpImport) -> Sample:
    """Reads some documents of the dump, spread over it; of a dump whose documents there are bad, one that is not.

    Raises ValueError naming the first file that cannot be used, unless bad ones are skipped; and where none is left.
    """
    reader, found, failure = work.reader, [], None
    spread = np.unique(np.linspace(0, len(work.files) - 1, SAMPLE).astype(int)).tolist()
    others = [at for at in range(len(work.files)) if at not in spread]
    for number, at in enumerate([*spread, *others]):
        # Where bad ones take their places, others are read until there is one.
        if number >= len(spread) and found:
            break
        path = work.files[at]
        try:
            document = reader.read(path)
        except BadDocument as error:
            if not work.settings.skip_bad:
                raise ValueError(f"{error}; {SKIPPING}") from error
            failure = failure or error
            continue
        if len(document.tokens_L) > 1:
            found.append((_cut(document, work.settings.length), path))
    if not found:
        why = "has two tokens or more" if failure is None else f"can be used; the first: {failure}"
        raise ValueError(f"{work.dump.folder}: none of its {len(work.files):,} documents {why}")
    dtype = measure(work.dump, found[-1][1], work.tables.config.width).dtype
    tokens = sum(len(document.tokens_L) for document, _ in found)
    return Sample(tuple(d for d, _ in found), dtype, tokens, sum(path.stat().st_size for _, path in found))


def estimate(work: DumpImport, sample: Sample) -> tuple[int, int]:
    """Returns about how many tokens the dump has, and bytes the store takes, by the sample."""
    total = sum(path.stat().st_size for path in work.files)
    tokens = int(sample.tokens * total / sample.bytes)
    own = sum(field.size for field in work.fields)
    return tokens, tokens * (own + _TOKEN.itemsize) + len(work.files) * shards.RECORD_OVERHEAD


def _cut(document: DumpedDocument, length: int) -> DumpedDocument:
    mask_L = None if document.mask_L is None else document.mask_L[:length]
    return DumpedDocument(document.tokens_L[:length], mask_L, document.states_LND[:length])


def examine(work: DumpImport, sample: Sample) -> tuple[Finding, dict[str, float]]:
    """Returns where the last state lies, and the relative errors of states that were computed again, by their names.

    Raises ValueError where the states are not the target's, see `dump_checks`.
    """
    name, errors = str(work.dump.folder), {}
    finding = find_last_state(work.tables, sample.documents, work.settings.agreement, name)
    if work.layers[0] == 0:
        errors["embedding"] = check_embedding(work.tables, sample.documents[0], name)
    wanted = work.settings.recompute
    if wanted or (wanted is None and is_affordable(work.folder)):
        document = sample.documents[0]
        features_LD = finding.features(work.tables, document.states_LND[:, -1])
        try:
            errors |= recompute(work.folder, document, work.layers[:-1], features_LD)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return finding, errors


def begin_import(work: DumpImport, sample: Sample) -> Finding:
    """Checks the dump and makes the folder, or checks one that was begun before; returns where the last state lies."""
    plan = [[n, path.stat().st_size] for n, path in zip(names_of(work.dump, work.files), work.files, strict=True)]
    settings = dataclasses.asdict(work.settings)
    about = {
        "format": FORMAT,
        "imported": {"kind": work.dump.kind, "layers": list(work.layers), "length": settings["length"],
                     "limit": settings["limit"], "held_out": settings["held_out"]},
        "target": work.settings.target,
        "weights": table_fingerprint(work.folder),
        "target_weights": "same",
        **ChatTokenizer.load(work.folder, TemplateChoice(work.settings.template, date=DATE)).fingerprint,
        "dtype": _DTYPES[sample.dtype],
        "store": work.settings.store,
        "taps": list(work.taps),
        "top_k": 0,
        "shard_gb": work.settings.shard_gb,
        "fields": [list(field) for field in work.fields],
        "contents": hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16],
    }  # fmt: skip
    if (work.out / shards.ABOUT).is_file():
        begun = shards.read_about(work.out, FORMAT)
        same = all(begun.get(name) == value for name, value in about.items())
        if shards.anything_finished(work.out) or (same and "finding" in begun):
            shards.begin(work.out, about)
            if "finding" not in begun:
                raise ValueError(
                    f"{work.out}: does not say where the last state lies: import it anew, into another OUT"
                )
            return Finding(**begun["finding"])
    finding, errors = examine(work, sample)
    shards.begin(work.out, about | {"finding": finding._asdict(), "relative_errors": errors})
    shards.write_json(work.out / PLAN, {"folder": str(work.dump.folder), "limit": settings["limit"], "files": plan})
    return finding


def import_shards(work: DumpImport, finding: Finding, part: tuple[int, int] = (0, 1)) -> Iterator[int]:
    """Makes every n-th shard from the i-th on that is not finished, for `part` `(i, n)`.

    Yields after each document of the dump how many are done; finished shards count at once. Raises ValueError naming a
    file that cannot be used, unless bad ones are skipped.
    """
    for number in range(part[0], len(work.shards), part[1]):
        first, last = work.shards[number]
        shard = Shard(work.out, number)
        if shard.note() is None:
            yield from _write_shard(work, finding, shard, work.files[first:last])
        else:
            yield last - first


def _write_shard(work: DumpImport, finding: Finding, shard: Shard, files: Sequence[Path]) -> Iterator[int]:
    """Writes one shard, and beside it the tokens of its documents and their part of the index."""
    reader, entries, tokens, ids, cut = work.reader, [], [], [], []
    skipped, examples = Counter(), {}
    writer = ShardWriter(shard, "group_size:1,uncompressed")
    for path in files:
        try:
            whole = reader.read(path)
        except BadDocument as error:
            if not work.settings.skip_bad:
                raise ValueError(f"{error}; {SKIPPING}") from error
            skipped[error.kind] += 1
            examples.setdefault(error.kind, str(error))
            yield 1
            continue
        document = _cut(whole, work.settings.length)
        writer.write(shards.pack_record(work.fields, _arrays(work, finding, document)))
        held = np.zeros(len(document.tokens_L), _TOKEN)
        held["token"], held["assistant"] = document.tokens_L, False if document.mask_L is None else document.mask_L
        entries.append((key(document.tokens_L), len(held)))
        tokens.append(held)
        ids.append(names_of(work.dump, [path])[0])
        cut.append(len(held) < len(whole.tokens_L))
        yield 1
    shards.write_array(_beside(shard, "index"), np.asarray(entries, ENTRY))
    shards.write_array(_beside(shard, "tokens"), np.concatenate([np.zeros(0, _TOKEN), *tokens]))
    masked = sum(int(held["assistant"].any()) for held in tokens)
    writer.seal(ids=ids, truncated=cut, skipped=dict(skipped), examples=examples, with_answers=masked)


def _beside(shard: Shard, what: str) -> Path:
    return shard.path.with_suffix(f".{what}.npy")


def _arrays(work: DumpImport, finding: Finding, document: DumpedDocument) -> dict[str, np.ndarray]:
    """Returns the arrays of a record: features, and the states that enter the layers that are stored."""
    states_LND, length = document.states_LND, len(document.tokens_L)
    found = {"features": finding.features(work.tables, states_LND[:, -1])}
    if work.taps:
        order = [work.layers.index(layer) for layer in work.taps]
        found["taps"] = states_LND[:, order].reshape(length, -1)
    if work.settings.store != "int8":
        return found
    arrays = {}
    for name, array in found.items():
        parts = 1 if name == "features" else len(work.taps)
        # Padded, so that few lengths are compiled for.
        padded = np.pad(array.astype(np.float32), ((0, -length % 256), (0, 0)))
        small, scale = shrink(jnp.asarray(padded), "int8", parts)
        arrays[name], arrays[f"{name}_scale"] = np.asarray(small)[:length], np.asarray(scale)[:length]
    return arrays


def finish_import(work: DumpImport) -> ImportSummary | None:
    """Writes the corpora and the index when all shards are finished; returns what became of the dump, else None.

    Raises ValueError where too few documents are left to hold one out.
    """
    made = [Shard(work.out, number) for number in range(len(work.shards))]
    notes = [shard.note() for shard in made]
    if any(note is None for note in notes):
        return None
    index = np.concatenate([shards.read_array(_beside(shard, "index")) for shard in made])
    chosen = _held_out(work, made, index)
    tokenizer = ChatTokenizer.load(work.folder, TemplateChoice(work.settings.template, date=DATE))
    settings = CorpusSettings(work.settings.length, work.settings.limit)
    for name, wanted in (("train", ~chosen), ("eval", chosen)):
        write_documents(
            work.out / name, _documents(made, wanted), tokenizer, settings,
            source=(work.dump.folder.name, int(wanted.sum())), vocab=work.tables.config.vocab,
        )  # fmt: skip
    shards.write_array(work.out / INDEX, index)
    shards.write_json(work.out / CONTENTS, {"records": [note["records"] for note in notes if note]})
    skipped: Counter[str] = Counter()
    for note in notes:
        skipped.update(note["skipped"] if note else {})
    examples = {kind: text for note in notes[::-1] if note for kind, text in note.get("examples", {}).items()}
    answers = sum(int(shards.read_array(_beside(shard, "tokens"))["assistant"].sum()) for shard in made)
    truncated = sum(sum(note["truncated"]) for note in notes if note)
    lengths = index["length"]
    return ImportSummary(
        len(index), int(lengths.sum()), answers, truncated, int(chosen.sum()), int(lengths.max()), dict(skipped),
        examples,
    )  # fmt: skip


def _held_out(work: DumpImport, made: Sequence[Shard], index: np.ndarray) -> np.ndarray:
    """Returns bool [documents]: those that are held out. Equal documents are on the same side.

    They are those of the least keys, which are hashes, among those with answers where some have.
    """
    spoken = np.concatenate([_spoken(shard) for shard in made])
    able = index["key"][spoken] if spoken.any() else index["key"]
    keys = np.unique(able)
    if len(keys) < 2:
        raise ValueError(
            f"{work.dump.folder}: has {len(keys)} documents to learn from, and one to train on and one to hold out are "
            "needed: dump more"
        )
    count = min(work.settings.held_out, max(1, len(keys) // 10))
    return np.isin(index["key"], keys[:count])


def _spoken(shard: Shard) -> np.ndarray:
    """Returns bool [documents]: whether a document of a shard has a token of an answer behind its first token."""
    lengths = shards.read_array(_beside(shard, "index"))["length"]
    assistant = shards.read_array(_beside(shard, "tokens"))["assistant"]
    ends = np.cumsum(lengths)
    return np.asarray([bool(assistant[end - n + 1 : end].any()) for n, end in zip(lengths, ends, strict=True)], bool)


def _documents(made: Sequence[Shard], wanted: np.ndarray) -> Iterator[TokenizedDocument]:
    """Yields the wanted documents of all shards."""
    number = 0
    for shard in made:
        note, tokens, at = shard.note() or {}, shards.read_array(_beside(shard, "tokens")), 0
        for id, cut, length in zip(
            note["ids"], note["truncated"], shards.read_array(_beside(shard, "index"))["length"], strict=True
        ):
            if wanted[number]:
                held = tokens[at : at + length]
                yield TokenizedDocument(id, Document(held["token"], held["assistant"]), cut)
            number, at = number + 1, at + int(length)
