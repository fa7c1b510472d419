"""Rows of a server's answers, and the sittings that they were given in, in a file that a stopped run goes on with.

A server shows no target calls, so a row holds a text and times, and counts where the answer tells them. A sitting is
one go at a task: where the server failed meanwhile, another sitting asks for what is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.data import jsonl
from jaxspec.serving.served_acceptance import Counters, Gauges

FORMAT = "jaxspec-served/2"
SITTING = "sitting"
"""Key of what is known of a sitting, in the line behind its rows."""
Pass = tuple[str, float, int]
"""A task, a temperature and a seed."""


@dataclasses.dataclass(frozen=True)
class ServedRow:
    """A server's answer to one turn. A row with an `error` has no figures: the server refused what it asks."""

    id: str
    task: str
    turn: int
    temperature: float
    seed: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    """Ids, where the server gives them."""
    count: int = 0
    """New tokens by the server's own count, `L`; 0 where it does not say."""
    prompt_tokens: int = 0
    finish: str = ""
    ttft_seconds: float = 0.0
    seconds: float = 0.0
    chunk_seconds: tuple[float, ...] = ()
    rounds: int | None = None
    """Rounds, accepted and drafted tokens, and the rounds that accepted 0, 1, 2 .. tokens, where it says so."""
    accepted: int | None = None
    drafted: int | None = None
    histogram: tuple[int, ...] = ()
    error: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """The work that the row is of: there is one row of each."""
        return self.task, self.temperature, self.seed, self.id, self.turn

    @property
    def calls(self) -> int | None:
        """Target calls without the prefill call, `R`; None where the answer does not tell its rounds.

        Servers may leave out calls that had no draft to verify. A call gives at most one token more than it accepts,
        so there are at least `L - 1 - accepted`.
        """
        if self.rounds is None or self.accepted is None or not self.count:
            return None
        return max(self.rounds, self.count - 1 - self.accepted)


@dataclasses.dataclass(frozen=True)
class Sitting:
    """One go at a task, and what the server's metrics page gained over it."""

    rows: int
    """Rows that it gave."""
    unanswered: int
    """Turns whose requests the server, or the way to it, failed."""
    wall_seconds: float
    """From the first request to the last answer."""
    counters: Counters | None
    """None where the server shows none, or was started again meanwhile."""
    gauges: Gauges | None
    """Of its end."""


class ServedFile(NamedTuple):
    """A file of a server's answers."""

    settings: Mapping[str, Any]
    rows: list[ServedRow]
    """All of them, those of a torn sitting last."""
    sittings: list[tuple[Pass, Sitting]]


def is_served(path: str | Path) -> bool:
    """Returns whether a file says that it holds a server's answers."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        first = file.readline()
    return b'"jaxspec-served/' in first


def read_served(path: str | Path) -> ServedFile:
    """Returns the rows of a file. Raises ValueError naming what is missing, or the line that cannot be read."""
    lines = jsonl.read_lines(Path(path))
    if not lines or not isinstance(lines[0], dict) or lines[0].get("format") != FORMAT:
        raise ValueError(f"{path}: is not a file of served rows: its first line does not say {FORMAT!r}")
    if missing := next((name for name in ("max_new_tokens", "concurrency") if name not in lines[0]), None):
        raise ValueError(f"{path}: its first line has no {missing!r}: make the file anew with jaxspec evaluate")
    return _parse(path, lines[0], lines[1:])


def _parse(path: str | Path, settings: Mapping[str, Any], lines: Sequence[dict[str, Any]]) -> ServedFile:
    found = ServedFile(settings, [], [])
    for number, line in enumerate(lines, 2):
        try:
            if SITTING in line:
                found.sittings.append(((line["task"], line["temperature"], line["seed"]), _sitting(line[SITTING])))
            else:
                found.rows.append(_row(line))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: is no row of a server's answer: {error}") from error
    return found


def _row(line: Mapping[str, Any]) -> ServedRow:
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in line.items()}
    return ServedRow(**given)


def _sitting(line: Mapping[str, Any]) -> Sitting:
    counters, gauges = line["counters"], line["gauges"]
    if counters is not None:
        counters = Counters(**counters | {"by_position": tuple(counters["by_position"])})
    return Sitting(**{**line, "counters": counters, "gauges": None if gauges is None else Gauges(**gauges)})


def _record(sitting: Sitting) -> dict[str, Any]:
    return {
        "rows": sitting.rows,
        "unanswered": sitting.unanswered,
        "wall_seconds": sitting.wall_seconds,
        "counters": None if sitting.counters is None else sitting.counters._asdict(),
        "gauges": None if sitting.gauges is None else sitting.gauges._asdict(),
    }


class ServedBook:
    """The file of a server's answers: the rows of a sitting, then the sitting.

    A stopped run goes on behind its last whole sitting. Raises ValueError where the file was begun with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        noted = jsonl.journal(path, settings, of=path.parent, fields=("task", "temperature", "seed"))
        whole = max((number for number, record in enumerate(noted, 1) if SITTING in record), default=0)
        if whole < len(noted):
            jsonl.keep_lines(path, 1 + whole)
        self.file = _parse(path, settings, noted[:whole])

    def rows_of(self, of: Pass) -> list[ServedRow]:
        """Returns the rows of a task at one temperature and seed."""
        return [row for row in self.file.rows if row.key[:3] == of]

    def sittings_of(self, of: Pass) -> list[Sitting]:
        """Returns the sittings of a task at one temperature and seed."""
        return [sitting for about, sitting in self.file.sittings if about == of]

    def add(self, of: Pass, rows: Sequence[ServedRow], sitting: Sitting) -> None:
        """Notes a sitting and its rows; they are on disk when this returns. One without rows leaves no trace."""
        if not rows:
            return
        about = dict(zip(("task", "temperature", "seed"), of, strict=True))
        jsonl.append(self.path, [*map(dataclasses.asdict, rows), about | {SITTING: _record(sitting)}])
        self.file.rows.extend(rows)
        self.file.sittings.append((of, sitting))
