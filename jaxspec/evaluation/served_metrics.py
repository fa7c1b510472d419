"""Figures of a task that a server answered, from its rows and sittings alone.

Notation, of one answer: `L` new tokens by the server's count, `R` target calls behind prefill; of all its rounds `a`
accepted and `d` drafted tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxspec.evaluation.served_rows import Pass, ServedRow, Sitting
from jaxspec.serving.served_acceptance import Counters

FORMULAS = {
    "acceptance_length": "1 + accepted / drafts, as vLLM prints it: of the server's counters over the task, or where "
    "it shows none of its answers (acceptance_from)",
    "survival": "accepted at each position of the draft / drafts",
    "acceptance_rate": "accepted / drafted tokens",
    "uncounted": "answers that the counters miss: the server was away, or started again, as they were given",
    "tau_micro": "sum (L - 1) / sum R: tokens per target call, bonus token in, the prefill call and its token out; of "
    "answers that tell their rounds, or else of counters that hold these answers alone",
    "tau_macro": "mean over answers of (L - 1) / R, of those that tell their rounds",
    "tau_raw": "1 + sum a / sum R, of answers that tell their rounds: without the cut at a stop id or the budget",
    "gauge_acceptance_length": "the server's own gauge at the end of the task, of its last interval (SGLang)",
    "gauge_acceptance_rate": "likewise",
    "tokens_per_second": "new tokens of the task / its wall time up to the last answer, all requests in flight",
    "user_tokens_per_second": "median over answers of (new tokens - 1) / (seconds - time to first token)",
    "ttft_ms": "median milliseconds from a request to the first chunk with text or thoughts",
}
"""Name of a figure -> how it is computed."""
UNKNOWN = ("speedup", "efficiency", "identical_fraction")
"""Figures that need plain decoding, which a server does not show."""


def summarize_served(
    of: Pass, unanswered: int, rows: Sequence[ServedRow], sittings: Sequence[Sitting]
) -> dict[str, Any]:
    """Returns the figures of a task; those that the server does not tell are None. `unanswered` turns have no row."""
    answers = [row for row in rows if not row.error]
    steady = [
        (row.count - 1) / (row.seconds - row.ttft_seconds)
        for row in answers
        if row.count > 1 and row.seconds > row.ttft_seconds
    ]
    tokens, wall = sum(row.count for row in answers), sum(sitting.wall_seconds for sitting in sittings)
    gauges = next((sitting.gauges for sitting in reversed(sittings) if sitting.gauges is not None), None)
    return {
        **dict(zip(("task", "temperature", "seed"), of, strict=True)),
        "method": "served",
        "answers": len(answers),
        "failed": len(rows) - len(answers),
        "unanswered": unanswered,
        "tokens": tokens,
        **_acceptance(rows, sittings),
        **_tau(rows, sittings),
        "gauge_acceptance_length": None if gauges is None else gauges.acceptance_length,
        "gauge_acceptance_rate": None if gauges is None else gauges.acceptance_rate,
        "tokens_per_second": tokens / wall if wall and answers else None,
        "user_tokens_per_second": float(np.median(steady)) if steady else None,
        "ttft_ms": 1e3 * float(np.median([row.ttft_seconds for row in answers])) if answers else None,
        **dict.fromkeys(UNKNOWN),
    }


def _told(rows: Sequence[ServedRow]) -> list[tuple[ServedRow, int]]:
    """Returns the answers that tell their rounds, each with its target calls."""
    return [(row, row.calls) for row in rows if not row.error and row.calls is not None]


def _tau(rows: Sequence[ServedRow], sittings: Sequence[Sitting]) -> dict[str, float | None]:
    """Returns tau as the library defines it, over all rounds and as a mean of answers, and without the last cut."""
    told = _told(rows)
    emitted, calls = sum(row.count - 1 for row, _ in told), sum(count for _, count in told)
    raw = 1 + sum(row.accepted or 0 for row, _ in told) / calls if calls else None
    each = [(row.count - 1) / count for row, count in told if count]
    if not told and (counted := _of_these_alone(rows, sittings)) is not None:
        emitted = sum(row.count - 1 for row in rows)
        calls = max(counted.drafts, emitted - counted.accepted_tokens)
    return {
        "tau_micro": emitted / calls if calls else None,
        "tau_macro": float(np.mean(each)) if each else None,
        "tau_raw": raw,
    }


def _of_these_alone(rows: Sequence[ServedRow], sittings: Sequence[Sitting]) -> Counters | None:
    """Returns the counters of a task if all that they counted became these answers, and something was drafted."""
    whole = all(row.count and not row.error for row in rows) and not any(s.unanswered for s in sittings)
    counters = _sum([sitting.counters for sitting in sittings])
    if not whole or counters is None or any(s.counters is None for s in sittings):
        return None
    return counters if counters.drafts else None


def _acceptance(rows: Sequence[ServedRow], sittings: Sequence[Sitting]) -> dict[str, Any]:
    """Returns the acceptance by the server's counters, or else by its answers, and which of them it is."""
    counters = _sum([sitting.counters for sitting in sittings])
    told = [row for row, _ in _told(rows)]
    source = "counters" if counters is not None and counters.drafts else "answers" if told else None
    found = counters if source == "counters" else _of_answers(told)
    missed = _uncounted(rows, sittings) if source == "counters" else 0
    return {"acceptance_from": source, **(found or Counters(0, 0, 0, ())).figures(), "uncounted": missed}


def _uncounted(rows: Sequence[ServedRow], sittings: Sequence[Sitting]) -> int:
    """Returns the answers of sittings that no counters are known of; rows stand in the order of sittings."""
    ends = list(itertools.accumulate((sitting.rows for sitting in sittings), initial=0))
    missed = [rows[a:b] for s, a, b in zip(sittings, ends, ends[1:], strict=False) if s.counters is None]
    return sum(not row.error for mine in missed for row in mine)


def _of_answers(told: Sequence[ServedRow]) -> Counters:
    """Returns what counters would say of these answers; no positions where one has no histogram."""
    total = Counters(0, 0, 0, ())
    for row in told:
        kept = tuple(float(sum(row.histogram[i:])) for i in range(1, len(row.histogram)))
        total = total.plus(Counters(row.rounds or 0, row.drafted or 0, row.accepted or 0, kept))
    return total if all(row.histogram or not row.rounds for row in told) else total._replace(by_position=())


def _sum(counters: Sequence[Counters | None]) -> Counters | None:
    """Returns all that are known added up; None where none is."""
    known = [found for found in counters if found is not None]
    return functools.reduce(Counters.plus, known) if known else None
