"""A table of costs made part by part, each figure noted on disk as it comes, within a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxspec.console.progress import Progress
from jaxspec.data import jsonl
from jaxspec.decoding.rounds import Engine
from jaxspec.evaluation.measurements import MARGIN
from jaxspec.lab.costs import PARTS, CostRow
from jaxspec.lab.round_parts import Grid, Point, compared_round

FIGURE, FAILED, RATES = "figure", "failed", "rates"
"""Kinds of lines of a ledger."""


class Bench(Protocol):
    """Prices one part of a round at a time."""

    def points(self, batch: int, context: int) -> list[Point]:
        """Returns the parts to price at one batch and context."""
        ...

    def measure(self, point: Point) -> float:
        """Returns the seconds of a part. Raises ValueError, with the reason, where it has none."""
        ...


class Ledger:
    """Figures that are known, in `NAME.ledger.jsonl` beside the table `out`; in memory alone where `out` is None.

    Raises ValueError where the ledger was begun with other settings, or another process writes it.
    """

    def __init__(self, out: Path | None, settings: dict[str, Any]) -> None:
        self.path = out and out.with_name(f"{out.stem}.ledger.jsonl")
        self.lines: list[dict[str, Any]] = []
        if out is not None and self.path is not None:
            self.lines = jsonl.journal(self.path, settings, of=out, fields=("event",))

    def note(self, *lines: dict[str, Any]) -> None:
        """Adds lines; they are on disk when this returns."""
        if self.path is not None:
            jsonl.append(self.path, lines)
        self.lines.extend(lines)

    def add(self, seconds: dict[Point, float]) -> None:
        """Adds figures."""
        self.note(*({"event": FIGURE, **point._asdict(), "seconds": taken} for point, taken in seconds.items()))

    @property
    def seconds(self) -> dict[Point, float]:
        """Known figures, the latest of each part."""
        found = [line for line in self.lines if line["event"] == FIGURE]
        return {_point(line): line["seconds"] for line in found}

    @property
    def failed(self) -> dict[Point, str]:
        """Parts that have no figure, with the reason."""
        return {_point(line): line["reason"] for line in self.lines if line["event"] == FAILED}

    @property
    def rates(self) -> list[dict[str, Any]]:
        """Rates of the machine, as they were measured beside the parts."""
        return [line["rates"] for line in self.lines if line["event"] == RATES]

    @property
    def done(self) -> set[Point]:
        """Parts that have a figure, or cannot have one."""
        return {*self.seconds, *self.failed}


def _point(line: dict[str, Any]) -> Point:
    return Point(*(line[name] for name in Point._fields))


class Watch:
    """A time limit: whether the next piece of work, as long as the longest so far, still fits."""

    def __init__(self, deadline: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.deadline, self.clock, self.begun, self.longest = deadline, clock, clock(), 0.0

    def fits(self) -> bool:
        """Returns whether another piece fits; call it before each."""
        now = self.clock()
        self.longest, self.begun = max(self.longest, now - self.begun) if self.longest else now - self.begun, now
        return now + MARGIN * self.longest <= self.deadline


def all_points(grid: Grid, bench: Bench) -> list[Point]:
    """Returns the parts to price at every batch and context."""
    return [point for place in grid.places() for point in bench.points(*place)]


def price_points(bench: Bench, points: Sequence[Point], ledger: Ledger, watch: Watch, bar: Progress) -> list[Point]:
    """Prices the parts that the ledger does not have, one by one; returns those that the time did not suffice for."""
    open_points = [point for point in points if point not in ledger.done]
    for i, point in enumerate(open_points):
        if not watch.fits():
            return open_points[i:]
        started = time.monotonic()
        try:
            seconds = bench.measure(point)
        except ValueError as problem:
            ledger.note({"event": FAILED, **point._asdict(), "reason": str(problem)})
            bar.advance(1, f"{words_of(point)}: {problem}", at_once=True)
            continue
        ledger.add({point: seconds})
        slow = time.monotonic() - started > 1
        bar.advance(1, f"{words_of(point)}: {1e3 * seconds:.4g} ms", at_once=slow)
    return []


def words_of(point: Point) -> str:
    """Returns a part and its sizes in words."""
    sizes = {"nodes": 0 if point.width or point.part in ("round", "commit") else point.nodes, "width": point.width}
    said = [f"{name} {size}" for name, size in sizes.items() if size]
    return " ".join([point.part, *said, f"batch {point.batch} context {point.context:,}"])


def told(parts: dict[Point, float]) -> str:
    """Returns the first figures of a batch and context in words."""
    plain = next(seconds for point, seconds in parts.items() if point.part == "plain")
    verify = {point.nodes: seconds for point, seconds in parts.items() if point.part == "verify"}
    most = max(verify)
    return f"plain {1e3 * plain:.4g} ms, verify of {most} nodes {1e3 * verify[most]:.4g} ms"


class Result(NamedTuple):
    """The rows of a table, and the whole rounds beside the sums of their parts."""

    rows: list[CostRow]
    rounds: list[dict[str, Any]]


def rows_of(seconds: dict[Point, float], engine: Engine, source: str, device: str) -> Result:
    """Returns the rows of all figures.

    `rest` is what the parts leave of the reference round, and 0 where fusion saves more than the rest costs; the commit
    where no whole round was priced.
    """
    places = dict.fromkeys((point.batch, point.context) for point in seconds)
    found = [compared_round(engine, seconds, *place) for place in places if engine.tree is not None]
    rounds = [whole for whole in found if whole is not None]
    rest = {p._replace(part="rest", nodes=1): taken for p, taken in seconds.items() if p.part == "commit"}
    for r in rounds:
        rest[Point("rest", 1, 0, r["batch"], r["context"])] = r["round_seconds"] - r["parts_seconds"]
    # What was measured as the rest, turn by turn, stays.
    named = rest | seconds
    rows = [point.row(source, device, max(0.0, taken)) for point, taken in named.items() if point.part in PARTS]
    order = {part: i for i, part in enumerate(PARTS)}
    return Result(sorted(rows, key=lambda row: (order[row.part], row.batch, row.context, row.nodes, row.width)), rounds)
