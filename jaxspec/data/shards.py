"""Folders of ArrayRecord files that are whole or absent, carry their SHA-256, and are read record by record.

A folder holds `about.json`, the settings that it was begun with, and files `00000.array_record`. Each file has a note
`00000.json` with its checksum, which is written last: a file without a note is not finished. ArrayRecord hashes every
record, so reading a single damaged record also fails.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from jaxspec.console.disk import writing
from jaxspec.console.results import differences, json_text

ABOUT = "about.json"
RECORD_OVERHEAD = 96
"""Approximate bytes that ArrayRecord adds to a record."""
FILE_OVERHEAD = 1 << 17
"""Approximate bytes that ArrayRecord adds to a file."""


class Field(NamedTuple):
    """One array of a record, `[L, width]`: `width` numbers a token."""

    name: str
    dtype: str
    width: int

    @property
    def kind(self) -> np.dtype:
        """`dtype` as a numpy dtype."""
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def size(self) -> int:
        """Bytes a token."""
        return self.kind.itemsize * self.width


def pack_record(fields: Sequence[Field], arrays: dict[str, np.ndarray], tail: bytes = b"") -> bytes:
    """Returns the arrays of one document, one after another in the order of `fields`, and then `tail`."""
    return b"".join([*(np.ascontiguousarray(arrays[f.name], f.kind).tobytes() for f in fields), tail])


def unpack_record(fields: Sequence[Field], record: bytes, length: int) -> tuple[dict[str, np.ndarray], bytes]:
    """Returns the arrays `[L, width]` and the tail that `pack_record` packed, for a document of `length` tokens."""
    arrays, at = {}, 0
    for field in fields:
        count = length * field.width
        arrays[field.name] = np.frombuffer(record, field.kind, count, at).reshape(length, field.width)
        at += length * field.size
    return arrays, record[at:]


class Shard:
    """One file of a folder, by its number."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"{number:05d}.array_record"
        self.note_path = self.path.with_suffix(".json")

    def note(self) -> dict[str, Any] | None:
        """Returns the note of the file; None if there is none, or the file's size is not the one noted."""
        if not self.note_path.is_file() or not self.path.is_file():
            return None
        note = json.loads(self.note_path.read_text(encoding="utf-8"))
        return note if self.path.stat().st_size == note["bytes"] else None

    def is_damaged(self) -> bool:
        """Returns whether its SHA-256 is not the one noted; reads the whole file."""
        note = self.note()
        return note is None or _sha256(self.path) != note["sha256"]

    def remove(self) -> None:
        """Removes the file and its note, so that it can be made again."""
        self.note_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class ShardWriter:
    """Writes one shard: `write` records, then `seal`. A shard that is not sealed does not count."""

    def __init__(self, shard: Shard, options: str) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        shard.remove()
        self._shard, self._records = shard, 0
        self._draft = shard.path.with_suffix(".draft")
        self._writer = ArrayRecordWriter(str(self._draft), options)

    def write(self, record: bytes) -> None:
        """Appends one record."""
        self._writer.write(record)
        self._records += 1

    def seal(self, **note: Any) -> None:
        """Finishes the file and notes its checksum and `note` (JSON); both are on disk when this returns."""
        # Synced, hashed, renamed and only then noted: after a kill the shard is either whole or does not count.
        self._writer.close()
        with self._draft.open("rb+") as file:
            os.fsync(file.fileno())
        size, digest = self._draft.stat().st_size, _sha256(self._draft)
        self._draft.replace(self._shard.path)
        write_json(self._shard.note_path, {"records": self._records, "bytes": size, "sha256": digest, **note})


class Records:
    """The records of several shards by number, one shard after another. Picklable; files are opened when needed."""

    def __init__(self, folder: Path, counts: Sequence[int], verb: str) -> None:
        """`counts` are the numbers of records of each shard; `verb` is the verb that makes them, for error messages.

        Raises ValueError naming the first file that is missing or whose size is not the one noted.
        """
        self._folder, self._counts, self._verb = folder, list(counts), verb
        for shard in self._shards:
            if shard.note() is None:
                self._refuse(shard.path, "its size is not the one noted" if shard.path.is_file() else "it is missing")

    @property
    def _shards(self) -> list[Shard]:
        return [Shard(self._folder, number) for number in range(len(self._counts))]

    @functools.cached_property
    def _source(self) -> Any:
        from grain.sources import ArrayRecordDataSource

        files: list[Any] = [_Extent(str(s.path), 0, n, n) for s, n in zip(self._shards, self._counts, strict=True)]
        return ArrayRecordDataSource(files)

    def _refuse(self, path: Path, why: object) -> NoReturn:
        raise ValueError(f"{path}: is damaged ({why}); delete it and give the same jaxspec {self._verb} command again")

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns some records, in the order asked for. Raises ValueError naming the file of a damaged record."""
        if not len(numbers):
            return []
        try:
            return list(self._source.__getitems__([int(n) for n in numbers]))
        except RuntimeError as error:
            self._refuse(self._blame(numbers), error)

    def _blame(self, numbers: Sequence[int]) -> Path:
        """Returns the file of the first of these records that cannot be read."""
        ends = np.cumsum(self._counts)
        for number in numbers:
            try:
                self._source[int(number)]
            except RuntimeError:
                return self._shards[int(np.searchsorted(ends, number, side="right"))].path
        return self._folder


class _Extent(NamedTuple):
    """A file with its number of records, so that Grain does not open it to count them; a `FileInstruction`."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder and notes the `settings` of its contents, or checks those of a folder that was begun before.

    Raises ValueError if the folder holds something else, or was begun with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ABOUT
    if not path.is_file():
        if any(p.suffix != ".draft" for p in folder.iterdir()):
            raise ValueError(f"{folder}: holds files of something else; give another --out")
        write_json(path, settings)
        return
    begun = read_about(folder, settings["format"])
    changed = differences({name: begun.get(name) for name in settings}, settings)
    if changed and not anything_finished(folder):
        write_json(path, settings)
        return
    if changed:
        raise ValueError(
            f"{folder}: was begun with other settings ({'; '.join(changed)}): give another --out or the same settings"
        )


def anything_finished(folder: Path) -> bool:
    """Returns whether a folder holds a finished shard, which other settings might not have made."""
    return any(folder.glob("[0-9]*.json"))


def read_about(folder: Path, format: str) -> dict[str, Any]:
    """Returns the settings that a folder was begun with; raises ValueError if it is not of this `format`."""
    path = folder / ABOUT
    if not path.is_file():
        raise ValueError(f"{folder}: holds no {ABOUT}, so nothing of format {format} was begun in it")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if about.get("format") != format:
        raise ValueError(f"{folder}: is of format {about.get('format')!r}, not {format!r}")
    return about


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    _write(path, lambda file: file.write((json_text(value, ensure_ascii=False, indent=1) + "\n").encode()))


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes a `.npy` file atomically."""
    _write(path, lambda file: np.save(file, array))


def read_array(path: Path) -> np.ndarray:
    """Returns a `.npy` file mapped into memory. Raises ValueError if it is missing or not whole."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole index ({error}); give the command that made the folder again") from error


def free_bytes(folder: Path) -> int:
    """Returns the free bytes of the disk that a folder is on; the folder need not exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.draft")  # unique, since machines may share a folder
    with writing(path), draft.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def content_hash(path: Path) -> str:
    """Returns a short hash of a file's contents: of all of a small file, of 64 pieces of a large one."""
    size, piece, pieces = path.stat().st_size, 1 << 20, 64
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= piece * pieces:
            digest.update(file.read())
        else:
            for number in range(pieces):
                file.seek((size - piece) * number // (pieces - 1))
                digest.update(file.read(piece))
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
