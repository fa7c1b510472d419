"""Measurements that are done one by one within a time limit, each noted on disk the moment it is known."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.data import jsonl

Figures = dict[str, Any]
"""Figures of one measurement: `seconds`, `bytes_per_second`, `flops_per_second`, `compile_seconds`, and others."""
BEGIN, ROW, FAILED, STOPPED, SESSION, DEVICE, LEFT = "begin", "row", "failed", "stopped", "session", "device", "left"
"""Kinds of lines of a journal."""
ROW_KEYS = ("seconds", "bytes_per_second", "flops_per_second", "share_of_peak", "compile_seconds")
"""Figures of every row; None where there is none."""
MARGIN = 1.3
"""Factor of an estimate: programs of one kind differ, and machines are disturbed."""


class Measurement(NamedTuple):
    """One figure to be measured."""

    part: int
    kind: str
    """Its program's kind: measurements of one kind take about as long as each other."""
    settings: dict[str, Any]
    job: str
    """The process that measures it."""
    program: tuple[Any, ...] = ()
    """Measurements of one kind and program share what is compiled."""
    guess: float = 0.0
    """Seconds that it takes, compilation included, as long as none of its kind has been measured."""

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return json.dumps([self.part, self.kind, self.settings], sort_keys=True)


class Spent(NamedTuple):
    """Seconds that a measurement took."""

    compiling: float
    rest: float


class Journal:
    """The lines of `measured.jsonl` in a folder, below the settings the folder was begun with.

    One process holds it; the processes that this one starts, and waits for, take it as `lent`. Raises ValueError where
    the folder was begun with other settings, or where another process holds it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, lent: bool = False) -> None:
        self.folder, self.path = folder, folder / "measured.jsonl"
        self.lines = jsonl.journal(self.path, settings, of=folder, fields=("event",), lent=lent)

    def note(self, event: str, **fields: Any) -> None:
        """Adds a line; it is on disk when this returns."""
        line = {"event": event, **fields}
        jsonl.append(self.path, [line])
        self.lines.append(line)

    def read_again(self) -> None:
        """Takes in the lines that another process has added."""
        jsonl.drop_torn_line(self.path)
        self.lines = jsonl.read_lines(self.path)[1:]

    def of(self, *events: str) -> list[dict[str, Any]]:
        """Returns the lines of these kinds, in order."""
        return [line for line in self.lines if line["event"] in events]

    @property
    def finished(self) -> set[str]:
        """Keys of all that is measured, or cannot be."""
        return {line["key"] for line in self.of(ROW, FAILED)}

    @property
    def open(self) -> dict[str, Any] | None:
        """Line of the measurement that was begun last, where that has not ended: its `key`, and `at`, its time."""
        last = next((line for line in reversed(self.lines) if line["event"] in (BEGIN, ROW, FAILED, STOPPED)), None)
        return last if last and last["event"] == BEGIN else None

    def use_device(self, facts: dict[str, Any]) -> None:
        """Notes the device that measures. Raises ValueError where another one has measured before."""
        before = self.of(DEVICE)
        if before and before[0]["name"] != facts["name"]:
            raise ValueError(
                f"{self.folder}: was measured on {before[0]['name']}, and this is {facts['name']}: give another --out"
            )
        if facts not in [{k: v for k, v in line.items() if k != "event"} for line in before]:
            self.note(DEVICE, **facts)

    def estimate(self, m: Measurement, *, compiled: bool) -> float:
        """Returns the seconds that `m` is likely to take, by the last ones of its kind, else by its guess.

        `compiled` says that its program is. One that was stopped takes longer than it had.
        """
        kin = [_spent(line) for line in self.of(ROW) if _kind(line) == m.kind]
        stopped = max((line["after_seconds"] for line in self.of(STOPPED) if line["key"] == m.key), default=0.0)
        if not kin:
            return max(m.guess, MARGIN * stopped)
        compiling = next((spent.compiling for spent in reversed(kin) if spent.compiling and not compiled), 0.0)
        return MARGIN * max(kin[-1].rest + compiling, stopped)


def _kind(line: dict[str, Any]) -> str:
    return json.loads(line["key"])[1]


def _spent(line: dict[str, Any]) -> Spent:
    compiling = line["compile_seconds"] or 0.0
    return Spent(compiling, max(0.0, line["spent_seconds"] - compiling))


def work_through(
    measurements: Iterable[Measurement],
    measure: Callable[[Measurement], Figures],
    journal: Journal,
    deadline: float,
    *,
    clock: Callable[[], float] = time.time,
) -> None:
    """Measures what is not in the journal yet and fits before `deadline`, a time of `clock`.

    A measurement that raises is a line with its reason, and the next one goes on; one that does not fit is noted with
    its estimate.
    """
    compiled = set()
    for m in measurements:
        if m.key in journal.finished:
            continue
        need, left = journal.estimate(m, compiled=(m.kind, m.program) in compiled), deadline - clock()
        if need > left:
            reason = f"takes about {need:.0f} s, and {max(0.0, left):.0f} s are left"
            journal.note(LEFT, key=m.key, reason=reason)
            continue
        started = clock()
        journal.note(BEGIN, key=m.key, at=started)
        try:
            figures = measure(m)
        except Exception as failure:  # whatever one measurement runs into, the others are worth having
            journal.note(FAILED, key=m.key, part=m.part, settings=shown(m), reason=reason_of(failure))
            continue
        compiled.add((m.kind, m.program))
        journal.note(ROW, key=m.key, part=m.part, settings=shown(m), **row_of(figures), spent_seconds=clock() - started)


def shown(m: Measurement) -> dict[str, Any]:
    """Returns the settings of a row: what is measured, and how."""
    return {"what": m.kind, **m.settings}


def row_of(figures: Figures) -> Figures:
    """Returns the figures with the keys that every row has."""
    return (
        dict.fromkeys(("seconds", "bytes_per_second", "flops_per_second", "share_of_peak", "compile_seconds")) | figures
    )


def reason_of(failure: BaseException) -> str:
    """Returns one line about a failure; memory that did not suffice is named first."""
    text = " ".join(str(failure).split())[:300] or type(failure).__name__
    memory = isinstance(failure, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    return f"out of memory: {text}" if memory else text


def left_out(measurements: Sequence[Measurement], journal: Journal) -> list[dict[str, Any]]:
    """Returns part, settings and reason of all that is neither measured nor failed, as of the last session."""
    begun = max((i for i, line in enumerate(journal.lines) if line["event"] == SESSION), default=0)
    reasons = {line["key"]: line["reason"] for line in journal.lines[begun:] if line["event"] in (LEFT, STOPPED)}
    finished = journal.finished
    return [
        {"part": m.part, "settings": shown(m), "reason": reasons.get(m.key, "the time was over before its turn")}
        for m in measurements
        if m.key not in finished
    ]
