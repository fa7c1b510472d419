"""JSON Lines files that grow while a program runs, from which a killed run can continue."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxspec.console.disk import writing
from jaxspec.console.results import differences, json_text


def drop_torn_line(path: Path) -> None:
    """Removes the text after the last line break, which a killed run may have left."""
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSON Lines file; none if it does not exist."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            found += [json.loads(line.decode("utf-8"))] if line else []
        except ValueError as error:
            raise ValueError(f"{path}:{number}: is not valid JSON ({error}); move the file away") from error
    return found


_HELD: dict[tuple[int, int], int] = {}
"""Device and inode of the files that this process holds -> their descriptors, open until it ends."""


def hold(path: Path, *, of: Path) -> None:
    """Keeps a file for this process alone until it ends, however it ends.

    Raises ValueError, a sentence about the output `of`, where another process has it.
    """
    # The system forgets the lock with the process, so a crash leaves none behind; an empty file does not count.
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    known = os.fstat(file)
    if (known.st_dev, known.st_ino) in _HELD:
        os.close(file)
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ValueError(f"{of}: another process is writing it; wait for it, or give another place") from None
    _HELD[known.st_dev, known.st_ino] = file


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends one line for each record, and waits until they are on disk. Numbers that are not finite become null."""
    text = "".join(json_text(record, ensure_ascii=False) + "\n" for record in records)
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def journal(
    path: Path, settings: dict[str, Any], *, of: Path, fields: Sequence[str], lent: bool = False
) -> list[dict[str, Any]]:
    """Returns the records noted at `path` so far; the first line of the file holds the settings they were made with.

    Begins the file if there is none, and anew where it was begun with other settings and nothing was noted. This
    process holds it until it ends; one that is `lent` is held by the process that started this one, and waits for it.
    Raises ValueError if records were noted with other settings, in a sentence about the output `of` that is being made,
    and naming the first line that lacks one of `fields`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not lent:
        hold(path, of=of)
    drop_torn_line(path)
    lines = read_lines(path)
    if not lines:
        append(path, [settings])
        return []
    begun = lines[0]
    changed = differences({name: begun.get(name) for name in settings}, settings)
    if changed and len(lines) == 1 and begun.keys() == settings.keys():
        os.truncate(path, 0)  # the same file, which this process holds
        append(path, [settings])
        return []
    if changed:
        raise ValueError(
            f"{of}: was begun with other settings ({'; '.join(changed)}): give another --out or the same flags"
        )
    for number, record in enumerate(lines[1:], 2):
        if missing := [name for name in fields if name not in record]:
            raise ValueError(f"{path}:{number}: has no {missing[0]!r}: not noted by this verb; remove the line")
    return lines[1:]


def keep_lines(path: Path, count: int) -> None:
    """Cuts a file behind its first `count` lines; it is at no time without them."""
    lines = path.read_bytes().split(b"\n")[:count]
    os.truncate(path, sum(len(line) + 1 for line in lines))


Record = dict[str, Any]
_DONE: Record = {"done": True}


def resume(path: Path, settings: Record, make: Callable[[list[Record]], Iterable[Record]]) -> list[Record]:
    """Returns the records of a file, and those that `make(records so far)` still adds to it, each kept as it is made.

    Beside it, in `NAME.state`, are the settings that the records are made with and, at last, that none is missing; the
    file itself holds the records alone, for any reader. One that was begun with other settings is begun anew.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hold(path, of=path)
    state = path.with_name(f"{path.name}.state")
    for file in (path, state):
        drop_torn_line(file)
    begun = read_lines(state)
    if not begun or begun[0] != settings:
        for file in (path, state):  # records first: a kill in between leaves none with other settings
            file.write_bytes(b"")  # the same file, which this process holds
        append(state, [settings])
        begun = [settings]
    records = read_lines(path)
    if begun[-1] == _DONE:
        return records
    for record in make(list(records)):
        append(path, [record])
        records.append(json.loads(json_text(record)))  # as a later call reads it: tuples become lists
    append(state, [_DONE])
    return records
