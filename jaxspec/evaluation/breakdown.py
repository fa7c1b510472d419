"""Figures of an evaluation in parts: tau along the answer and by the prompt's length, chunks, prompts one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxspec.evaluation.metrics import same_conversations, units_of
from jaxspec.evaluation.rows import Row
from jaxspec.evaluation.statistics import Interval, quotient, resampled

POSITIONS = 64
"""Tokens of an answer in a bin."""
SHORTEST = 64
"""Longest prompt of the first bin; every further bin ends at twice the length."""


class TauBin(NamedTuple):
    """Tau of some rounds: of those that begin at some tokens of the answer, or of prompts of some lengths."""

    first: int
    """Least position or length of the bin."""
    last: int
    """Greatest one."""
    tau: Interval
    """`sum e / sum R`; the interval resamples conversations within tasks."""
    rounds: int
    answers: int
    """Answers with a round in the bin."""


def tau_along(rows: Sequence[Row], width: int = POSITIONS) -> list[TauBin]:
    """Returns tau by the position of a round's first token in the answer, in bins of `width` tokens.

    The answer's first token is prefill's and has position 0. Rows with an error have no rounds.
    """
    parts: dict[int, list[tuple[Row, int, int]]] = {}
    for row in rows:
        emitted = np.asarray(row.emitted, np.int64)
        bins = (1 + np.cumsum(emitted) - emitted) // width
        for number in np.unique(bins):
            mine = emitted[bins == number]
            parts.setdefault(int(number), []).append((row, int(mine.sum()), len(mine)))
    return [_bin(n * width, (n + 1) * width - 1, parts[n]) for n in sorted(parts)]


def tau_by_prompt_length(rows: Sequence[Row]) -> list[TauBin]:
    """Returns tau by the tokens of the prompt, in bins that double: up to 64, 65 to 128, and so on."""
    parts: dict[int, list[tuple[Row, int, int]]] = {}
    for row in rows:
        if row.calls:
            last = SHORTEST * 2 ** max(0, (-(-row.prompt_tokens // SHORTEST) - 1).bit_length())
            parts.setdefault(last, []).append((row, sum(row.emitted), row.calls))
    return [_bin(1 if last == SHORTEST else last // 2 + 1, last, parts[last]) for last in sorted(parts)]


def _bin(first: int, last: int, parts: Sequence[tuple[Row, int, int]]) -> TauBin:
    sums: dict[tuple[str, str], list[int]] = {}
    for row, emitted, calls in parts:
        mine = sums.setdefault((row.task, row.unit), [0, 0])
        mine[0] += emitted
        mine[1] += calls
    names = sorted(sums)
    counts_U2 = np.asarray([sums[name] for name in names], np.float64)
    tau = resampled(quotient(counts_U2[:, 0], counts_U2[:, 1]), [task for task, _ in names])
    return TauBin(first, last, tau, int(counts_U2[:, 1].sum()), len(parts))


def chunk_sizes(rows: Sequence[Row]) -> np.ndarray:
    """Returns the number of rounds that emitted 0, 1 .. tokens: the chunks that a reader of the answer gets."""
    return np.bincount(np.asarray([e for row in rows for e in row.emitted], np.int64))


def chunk_milliseconds(rows: Sequence[Row]) -> float:
    """Returns the mean milliseconds between two chunks: those of an answer's rounds over their number; NaN without."""
    calls = sum(row.calls for row in rows)
    return 1e3 * sum(row.own_seconds for row in rows) / calls if calls else float("nan")


class PromptTimes(NamedTuple):
    """Milliseconds a token of the rounds of one conversation, by plain decoding and by an arm."""

    task: str
    unit: str
    plain_ms: float
    ms: float
    speedup: float
    """Plain milliseconds over the arm's."""
    low: float
    """Least of the repeats; NaN with one repeat."""
    high: float
    repeats: int
    tau: float


def prompt_times(ours: Sequence[Row], plain: Sequence[Row]) -> list[PromptTimes]:
    """Returns the times of every conversation that both decoded with a round; rows with an error are left out.

    Figures are of median times. The ends of a conversation's speed-up are those of its repeats, each of which pairs
    the times of one repeat; no bootstrap is there for one conversation.
    """
    ours, plain = same_conversations(
        [r for r in ours if not r.error and r.calls], [r for r in plain if not r.error and r.calls]
    )
    mine, theirs = units_of(ours), units_of(plain)
    by_repeat_UR = per_token(plain, mine.names) / per_token(ours, mine.names)
    several = by_repeat_UR.shape[1] > 1
    found = []
    for i, unit in enumerate(mine.names):
        ms, plain_ms = (1e3 * u.own_seconds_U[i] / u.emitted_U[i] for u in (mine, theirs))
        ends = (by_repeat_UR[i].min(), by_repeat_UR[i].max()) if several else (float("nan"),) * 2
        speedup = plain_ms / ms if ms else float("nan")
        repeats, tau = by_repeat_UR.shape[1], mine.emitted_U[i] / mine.calls_U[i]
        found.append(
            PromptTimes(mine.tasks[i], unit, plain_ms, ms, speedup, float(ends[0]), float(ends[1]), repeats, tau)
        )
    return found


def per_token(rows: Sequence[Row], units: Sequence[str]) -> np.ndarray:
    """Returns seconds a token of the rounds by conversation and repeat `[U, R]`; `R` is the least of all rows."""
    repeats = min((len(row.own_latency or row.decode_seconds) for row in rows), default=0)
    place = {unit: i for i, unit in enumerate(units)}
    seconds_UR, tokens_U = np.zeros((len(units), repeats)), np.zeros(len(units))
    for row in rows:
        # In slots a group's seconds are those of all its answers, and each has its own.
        share = 1.0 if row.own_latency else row.calls / row.group_calls if row.group_calls else 0.0
        seconds_UR[place[row.unit]] += share * np.asarray((row.own_latency or row.decode_seconds)[:repeats])
        tokens_U[place[row.unit]] += sum(row.emitted)
    return seconds_UR / tokens_U[:, None]
