"""Folders of ArrayRecord files that are whole or absent, carry their SHA-256, and are read record by record.

A folder holds `about.json`, the settings that it was begun with, and files `00000.array_record`, each with a note
`00000.json` of its checksum, written last: a file without one was not finished. ArrayRecord hashes every record, so
damage also shows where a single one is read.
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

ABOUT = "about.json"
RECORD_OVERHEAD = 96
"""Bytes that a record takes beside its own, about; every file has 128 KiB more."""
FILE_OVERHEAD = 1 << 17


class Field(NamedTuple):
    """One array of a record: so many numbers a token, `[L, width]`."""

    name: str
    dtype: str
    width: int

    @property
    def kind(self) -> np.dtype:
        """`dtype` as numpy's."""
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def size(self) -> int:
        """Bytes a token."""
        return self.kind.itemsize * self.width


def pack_record(fields: Sequence[Field], arrays: dict[str, np.ndarray], tail: bytes = b"") -> bytes:
    """The arrays of one document, one after another in the order of `fields`, and `tail` behind them."""
    return b"".join([*(np.ascontiguousarray(arrays[f.name], f.kind).tobytes() for f in fields), tail])


def unpack_record(fields: Sequence[Field], record: bytes, length: int) -> tuple[dict[str, np.ndarray], bytes]:
    """What `pack_record` was given, for a document of `length` tokens: arrays `[L, width]`, and the tail."""
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
        """What was noted of the whole file; None if it is not, or no longer, whole by its size."""
        if not self.note_path.is_file() or not self.path.is_file():
            return None
        note = json.loads(self.note_path.read_text(encoding="utf-8"))
        return note if self.path.stat().st_size == note["bytes"] else None

    def is_damaged(self) -> bool:
        """Whether its SHA-256 is not the one noted; reads all of it."""
        note = self.note()
        return note is None or _sha256(self.path) != note["sha256"]

    def remove(self) -> None:
        """Let it be made again."""
        self.note_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class ShardWriter:
    """Writes one shard: `write` records, then `seal`. Left unsealed, as by a kill, nothing of it counts."""

    def __init__(self, shard: Shard, options: str) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        shard.remove()
        self._shard, self._records = shard, 0
        self._draft = shard.path.with_suffix(".draft")
        self._writer = ArrayRecordWriter(str(self._draft), options)

    def write(self, record: bytes) -> None:
        """Append one record."""
        self._writer.write(record)
        self._records += 1

    def seal(self, **note: Any) -> None:
        """Finish the file and note its checksum, and `note` (JSON) with it; on disk when this returns."""
        self._writer.close()
        with self._draft.open("rb+") as file:
            os.fsync(file.fileno())
        size, digest = self._draft.stat().st_size, _sha256(self._draft)
        self._draft.replace(self._shard.path)
        write_json(self._shard.note_path, {"records": self._records, "bytes": size, "sha256": digest, **note})


class Records:
    """The records of several shards, one shard after another, by number. Picklable; files are opened when needed."""

    def __init__(self, folder: Path, counts: Sequence[int], verb: str) -> None:
        """`counts` are the records of each shard, `verb` what made them and makes a damaged one anew.

        Raises ValueError naming the first file that is missing or has another size than it was finished with.
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
        """Some records, in the order asked for. Raises ValueError naming the file of one that cannot be read."""
        if not len(numbers):
            return []
        try:
            return list(self._source.__getitems__([int(n) for n in numbers]))
        except RuntimeError as error:
            self._refuse(self._blame(numbers), error)

    def _blame(self, numbers: Sequence[int]) -> Path:
        """The file of the first of these records that cannot be read."""
        ends = np.cumsum(self._counts)
        for number in numbers:
            try:
                self._source[int(number)]
            except RuntimeError:
                return self._shards[int(np.searchsorted(ends, number, side="right"))].path
        return self._folder


class _Extent(NamedTuple):
    """A file whose number of records is known, so that it is not opened to count them; a `FileInstruction`."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder and note the `settings` of what it is to hold, or go on in one.

    Raises ValueError where something else is there, or it was begun with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ABOUT
    if not path.is_file():
        if any(p.suffix != ".draft" for p in folder.iterdir()):
            raise ValueError(f"{folder}: holds files of something else; give another --out")
        write_json(path, settings)
        return
    begun = read_about(folder, settings["format"])
    changed = [f"{k}={begun.get(k)!r}, not {v!r}" for k, v in settings.items() if begun.get(k) != v]
    if changed:
        raise ValueError(f"{folder}: was begun with {', '.join(changed)}; give another --out or the same settings")


def read_about(folder: Path, format: str) -> dict[str, Any]:
    """What a folder says of itself; ValueError if it is not of this `format`."""
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
    """Write a JSON file all at once."""
    _write(path, lambda file: file.write((json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file all at once."""
    _write(path, lambda file: np.save(file, array))


def read_array(path: Path) -> np.ndarray:
    """A `.npy` file, mapped into memory. ValueError where it is missing or not whole."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole index ({error}); give the command that made the folder again") from error


def free_bytes(folder: Path) -> int:
    """What the disk under a folder, which need not be there yet, can still take."""
    folder = folder.absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.draft")  # machines may share a folder
    with draft.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
