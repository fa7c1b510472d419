"""Conversations and plain text on disk, in files or folders.

A conversation is one JSON object in a line or record, in jaxspec's, OpenAI's or ShareGPT's form. A plain text is such
an object too, or stands in a text file.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from jaxspec.data.account import Account
from jaxspec.data.messages import BadRecord, Conversation, decode_line, json_fault, parse_conversation, text_bytes

_RECORDS_AT_ONCE = 1024
_SUFFIXES = (".jsonl", ".jsonl.gz", ".array_record", ".arrayrecord")
_OWN = (".state", ".partial", ".draft")
_TEXT_SUFFIXES = (".txt", ".txt.gz")
_TEXT_ENDS = b"\f"  # between the texts of one file


class Record(NamedTuple):
    """A conversation as it is written, and its place."""

    path: Path
    place: str
    """`line 3`, `record 3` or `text 3`, from 1."""
    text: str | bytes
    source: str
    """The source, unless the conversation names one."""
    plain: bool = False
    """Whether `text` is plain text instead of JSON."""
    alone: bool = True
    """Whether its file is the only one that is read, so that its number tells it from the others."""

    def parse(self) -> Conversation:
        """Returns the conversation; raises BadRecord if it is malformed."""
        number, place = self.place.split()[1], f"{self.path}, {self.place}"
        id = number if self.alone and not self.plain else f"{self.path.name}:{number}"
        text = self.text if isinstance(self.text, str) else decode_line(self.text)
        if self.plain:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            return parse_conversation({"text": text}, id=id, source=self.source)._replace(place=place)
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadRecord("not JSON", json_fault(error)) from error
        except ValueError as error:
            raise BadRecord("not JSON", "holds a number that cannot be read") from error
        except RecursionError:
            raise BadRecord("not JSON", "is nested too deeply to be read") from None
        return parse_conversation(record, id=id, source=self.source)._replace(place=place)


def parse_records(records: Iterable[Record], account: Account | None = None) -> list[Conversation]:
    """Returns the conversations of records; `account` counts those that are skipped, and fields that are not read.

    Raises ValueError naming file and place of the first malformed one, unless the account skips such.
    """
    account, found = account or Account(), []
    for record in records:
        try:
            conversation = record.parse()
        except ValueError as error:
            account.refuse(f"{record.path}, {record.place}", error)
            continue
        account.note_unread(conversation.unread)
        found.append(conversation)
    return found


class Named(NamedTuple):
    """One of several sets of conversations, as a setting names it."""

    name: str
    weight: float | None
    """Its weight beside the other sets; None if the setting gives none."""


def split_names(names: str) -> list[Named]:
    """Returns the names in a setting such as `"a.jsonl:0.7, shards/:0.3"` with their weights.

    Raises ValueError for an empty name, a weight that is not above 0, or weights for some names only.
    """
    found = []
    for item in names.split(","):
        name, colon, weight = item.strip().rpartition(":")
        number = _number(weight) if colon else None
        found.append(Named(item.strip(), None) if number is None else Named(name, number))
    if not all(named.name for named in found):
        raise ValueError(f"{names!r}: names no file before or behind a comma; give files joined by commas")
    for name, weight in found:
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(f"{names!r}: the weight of {name} is {weight:g}; it must be above 0")
    if len({weight is None for _, weight in found}) > 1:
        raise ValueError(f"{names!r}: gives some a weight and others none; give each one, or none")
    return found


def read_conversations(
    path: str | Path, *, limit: int | None = None, account: Account | None = None
) -> list[Conversation]:
    """Returns the conversations that `path` names (see `find_files`) in their order, at most `limit` of them.

    A line, or a record of an ArrayRecord file, is a conversation as `messages.parse_conversation` reads it: OpenAI's
    `{"id", "source", "messages": [{"role", "content"}]}`, ShareGPT's `{"conversations": [{"from", "value"}]}`, tokens
    `{"input_ids", "loss_mask"}`, or a plain text `{"text"}`. `id` defaults to the line's number, behind the file's name
    if there are several files, `source` to the name of the file, or of the folder if `path` is one. With
    `"finish": "length"`, as `jaxspec regenerate` writes it, the conversation is unfinished. The text between two form
    feeds of a `.txt` (`.txt.gz`) file is a plain text too. Raises ValueError naming the file and line of the first
    malformed line, unless `account` skips such; the account counts the entries of a folder that are not read, too.
    """
    account = account or Account()
    account.counts.update(unread_files(path))
    conversations = parse_records(read_records(path, limit=limit), account)
    if not conversations:
        left_out = "".join(f"; {line}" for line in account.sentences())
        raise ValueError(f"{path}: holds no conversation that can be used{left_out}")
    return conversations


def read_all(names: str, *, limit: int | None = None, account: Account | None = None) -> list[Conversation]:
    """Returns the conversations of several names joined by commas, at most `limit` of each; weights are ignored."""
    return [c for named in split_names(names) for c in read_conversations(named.name, limit=limit, account=account)]


def read_records(name: str | Path, *, limit: int | None = None) -> Iterator[Record]:
    """Yields the conversations of `read_conversations` one at a time, not yet parsed."""
    files, left = find_files(name), math.inf if limit is None else limit
    alone = len(files) == 1 and Path(name) == files[0]
    for path in files:
        plain = path.name.endswith(_TEXT_SUFFIXES)
        read = _read_array_record if _is_array_record(path) else _read_texts if plain else _read_lines
        for place, text in read(path):
            if left <= 0:
                return
            left -= 1
            source = _stem(path) if alone else path.absolute().parent.name
            yield Record(path, place, text, source, plain, len(files) == 1)


def find_files(name: str | Path) -> list[Path]:
    """Returns the files that a name stands for, sorted: a file, those of a folder, or those that match a pattern.

    A folder stands for its files that end in `.jsonl`, `.jsonl.gz` or `.array_record`. Its `.txt` files have to be
    named by a pattern. Raises ValueError if there is no file.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        if (path / "about.json").is_file():
            raise ValueError(f"{path}: holds tokens or features, where conversations are needed")
        found = sorted(p for p in path.iterdir() if p.name.endswith(_SUFFIXES) or _is_array_record(p))
        if not found:
            raise ValueError(
                f"{path}: the folder holds no file that ends in {', '.join(_SUFFIXES)}; name text by a pattern such as "
                f"{path}/*.txt"
            )
        return found
    found = sorted(Path(p) for p in glob.glob(str(name), recursive=True) if Path(p).is_file())
    if not found:
        raise ValueError(f"{path}: no such file; give a JSONL file of conversations, or a folder or pattern of them")
    return found


def unread_files(name: str | Path) -> dict[str, int]:
    """Returns the number of a folder's entries that `find_files` passes over, by words that name them; else nothing."""
    folder = Path(name)
    if not folder.is_dir():
        return {}
    read = {path.name for path in find_files(folder)}
    # The state of `jaxspec regenerate` lies beside its files.
    names = sorted(p.name for p in folder.iterdir() if p.name not in read and not p.name.endswith(_OWN))
    names = [name for name in names if not name.startswith(".")]
    if not names:
        return {}
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    kind = f"entries of {folder} that are not read, as they do not end in {', '.join(_SUFFIXES)}: {shown}"
    return {kind: len(names)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0] or path.name


def _is_array_record(path: Path) -> bool:
    """Returns whether a file is an ArrayRecord file, such as `train.array_record-00000-of-00008`."""
    return ".array_record" in path.name or ".arrayrecord" in path.name


def _read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    return ((f"line {number}", line) for number, line in enumerate(_lines(path), 1) if line.strip())


def _lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a text file, gzipped or not, however they end."""
    opened = gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")
    with opened as file:
        try:
            for number, line in enumerate(file):
                whole = line if number else text_bytes(line, path)
                yield from whole.splitlines(keepends=True)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error})") from error


def _read_texts(path: Path) -> Iterator[tuple[str, bytes]]:
    number, text = 0, io.BytesIO()
    for line in chain(_lines(path), [_TEXT_ENDS]):
        first, *others = line.split(_TEXT_ENDS)
        text.write(first)
        for begun in others:
            if (whole := text.getvalue()).strip():
                number += 1
                yield f"text {number}", whole
            text = io.BytesIO()
            text.write(begun)


def _read_array_record(path: Path) -> Iterator[tuple[str, bytes]]:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        if not reader.ok():
            raise RuntimeError("it is no such file, or cut short")
        for first in range(0, reader.num_records(), _RECORDS_AT_ONCE):
            upto = min(first + _RECORDS_AT_ONCE, reader.num_records())
            for i, record in enumerate(reader.read(first, upto), first + 1):
                yield f"record {i}", record
    except RuntimeError as error:
        raise ValueError(f"{path}: not a whole ArrayRecord file ({error})") from error
