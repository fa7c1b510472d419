"""Invariants of a server's answers: what must hold whatever it said, and what is wrong where it does not.

The tokens of single target calls are not shown, so those of `row_checks` about them become bounds on their sums.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxspec.evaluation.served_rows import ServedFile, ServedRow, Sitting
from jaxspec.serving.served_acceptance import Counters

FIGURES = (
    "text", "tokens", "count", "prompt_tokens", "finish", "ttft_seconds", "seconds", "chunk_seconds",
    "rounds", "accepted", "drafted", "histogram",
)  # fmt: skip
"""Fields that a row with an error leaves empty."""


def check_served_file(file: ServedFile) -> list[str]:
    """Returns a sentence for everything in a file of served rows that cannot be; none for a sound file."""
    return [*_rows(file.rows, file.settings), *_twice(file.rows), *_turns(file.rows), *_sittings(file)]


def check_sitting(rows: Sequence[ServedRow], sitting: Sitting, settings: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for everything in one sitting, and in its rows by themselves, that cannot be."""
    return [*_rows(rows, settings), *_sitting(sitting, rows, settings["concurrency"])]


def _rows(rows: Sequence[ServedRow], settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with rows by themselves."""
    yield from (f"{_named(row)}: {problem}" for row in rows for problem in _row(row, settings))


def _row(row: ServedRow, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with one row by itself."""
    if row.error:
        if filled := [name for name in FIGURES if getattr(row, name) not in (None, "", 0, ())]:
            yield f"has an error and yet {', '.join(filled)}"
        return
    if row.finish not in ("stop", "length"):
        yield f"ended by {row.finish!r}, which is neither stop nor length"
    if row.count < 0 or row.prompt_tokens < 0:
        yield f"has {row.count} tokens behind {row.prompt_tokens}"
    if row.count > settings["max_new_tokens"]:
        yield f"has {row.count} tokens, more than its budget of {settings['max_new_tokens']}"
    if len(row.tokens) > row.count:  # fewer are no fault: some servers give no id of the stop token
        yield f"has {len(row.tokens)} token ids and, by the server's count, {row.count} tokens"
    yield from _counts(row)
    yield from _times(row)


def _counts(row: ServedRow) -> Iterator[str]:
    """Yields what is wrong with the sums over a row's target calls."""
    told = (row.rounds, row.accepted, row.drafted)
    if row.rounds is None or row.accepted is None or row.drafted is None:
        if row.histogram or any(count is not None for count in told):
            yield "tells a part of its rounds, accepted and drafted tokens, and not all three"
        return
    if row.rounds < 0 or not 0 <= row.accepted <= row.drafted:
        yield f"accepts {row.accepted} of {row.drafted} drafted tokens in {row.rounds} rounds"
    if row.count and row.rounds > row.count - 1:
        yield f"has {row.rounds} target calls behind prefill for {row.count} tokens; each gives one or more"
    if not row.histogram:
        return
    if min(row.histogram) < 0 or sum(row.histogram) != row.rounds:
        yield f"has {row.rounds} rounds, and a histogram of {sum(row.histogram)}"
    elif (total := sum(k * h for k, h in enumerate(row.histogram))) != row.accepted:
        yield f"accepts {row.accepted} tokens, and {total} by its histogram"


def _times(row: ServedRow) -> Iterator[str]:
    """Yields what is wrong with a row's times."""
    times = (row.ttft_seconds, *row.chunk_seconds, row.seconds)
    if not all(math.isfinite(s) and s >= 0 for s in times):
        yield "has a time that is negative or not finite"
    elif row.ttft_seconds > row.seconds or list(times[1:]) != sorted(times[1:]):
        yield "has times that go back"


def _twice(rows: Sequence[ServedRow]) -> Iterator[str]:
    """Yields the rows that are there twice."""
    first = {row.key: row for row in rows}
    for key, count in Counter(row.key for row in rows).items():
        if count > 1:
            yield f"{_named(first[key])}: stands {count} times"


def _turns(rows: Sequence[ServedRow]) -> Iterator[str]:
    """Yields the turns whose earlier turn has no answer."""
    answered = {row.key for row in rows if not row.error}
    for row in rows:
        if row.turn and (*row.key[:-1], row.turn - 1) not in answered:
            yield f"{_named(row)}: follows a turn that has no answer"


def _sittings(file: ServedFile) -> Iterator[str]:
    """Yields what is wrong with sittings beside their rows, which stand before each in its order."""
    place = 0
    for number, (of, sitting) in enumerate(file.sittings, 1):
        mine = file.rows[place : place + sitting.rows]
        place += sitting.rows
        name = f"sitting {number}, task {of[0]}"
        if len(mine) < sitting.rows or any(row.key[:3] != of for row in mine):
            yield f"{name}: says {sitting.rows} rows, and those before it are others"
            return
        yield from (f"{name}: {problem}" for problem in _sitting(sitting, mine, file.settings["concurrency"]))
    if place < len(file.rows):
        yield f"the last {len(file.rows) - place} rows are of a sitting that was stopped; the same command goes on"


def _sitting(sitting: Sitting, rows: Sequence[ServedRow], concurrency: int) -> Iterator[str]:
    wall, total = sitting.wall_seconds, sum(row.seconds for row in rows)
    if not math.isfinite(wall) or wall < 0 or sitting.unanswered < 0:
        yield f"took {wall:g} s and has {sitting.unanswered} turns without an answer"
    elif total > wall * concurrency:
        yield f"took {wall:.3g} s, and its answers {total:.3g} s, {concurrency} at a time"
    if sitting.counters is not None:
        yield from _counters(sitting.counters)


def _counters(gained: Counters) -> Iterator[str]:
    """Yields what is wrong with what a server's counters gained."""
    kept = gained.by_position
    if min(*gained[:3], *kept, 0) < 0 or gained.accepted_tokens > gained.draft_tokens:
        yield f"its counters say {gained.accepted_tokens:g} of {gained.draft_tokens:g} drafted tokens accepted"
    elif any(later > earlier for earlier, later in zip((gained.drafts, *kept), kept, strict=False)):
        yield f"its counters accept more at a position than before it: {gained.drafts:g} drafts, then {list(kept)}"
    elif kept and sum(kept) != gained.accepted_tokens:
        yield f"its counters accept {gained.accepted_tokens:g} tokens, and {sum(kept):g} by position"


def _named(row: ServedRow) -> str:
    return f"temperature {row.temperature:g}, seed {row.seed}, question {row.id}, turn {row.turn}"
