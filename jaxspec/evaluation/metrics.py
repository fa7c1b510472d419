"""Figures of an evaluation, computed from its rows alone.

A conversation is the unit that is resampled; of times it is the batch, where a batch holds several answers: their times
are one measurement.

Notation, of one answer: `L` new tokens (stop id counted), `R` target calls without the prefill call; of each call
`d_j` drafted, `a_j` accepted, `e_j` emitted tokens and `l_j` drafted levels; `D` levels and `N` nodes of the arm's
tree. Rounds of adaptive trees and of prompt lookup draft fewer than `D` levels, or none.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.evaluation.equivalence import NEAR_TIE
from jaxspec.evaluation.rows import PLAIN, Row
from jaxspec.evaluation.statistics import Interval, Statistic, over, quotient, resampled

FORMULAS = {
    "tau_micro": "sum e / sum R: tokens per target call, bonus token in; the prefill call and its token out",
    "tau_macro": "mean over answers of (sum e / R), as HASS and z-lab's DFlash print it; short answers weigh more",
    "tau_raw": "1 + sum a / sum R, as vLLM prints it: without the cut at a stop id or the budget",
    "length_sglang": "sum L / sum R: the prefill token in, its call out",
    "length_specdec": "mean over answers of L / (R + 1), as specdec_bench prints it",
    "survival": "S_i: share of all rounds with a >= i",
    "survival_drafted": "share of the rounds with l >= i that have a >= i",
    "conditional": "c_i: share of the rounds with a >= i - 1 and l >= i that have a >= i; S_i / S_(i-1) if all draft D",
    "tried": "rounds with a >= i - 1 and l >= i",
    "drafted_tokens": "sum d",
    "acceptance_rate": "sum a / sum l: of a chain sum a / sum d; of a tree whose rounds all draft D (tau_raw - 1) / D",
    "alpha": "solves tau_raw = 1 + sum over i of (share of rounds with l >= i) alpha^i, which is "
    "(1 - alpha^(D+1)) / (1 - alpha) if all draft D: a model, not a measurement",
    "mbsu": "tau / (1 + cost): the speed-up if time were the weights read alone",
    "speedup": "plain seconds / seconds, over the same prompts, prefill in; each the median of its repeats",
    "speedup_macro": "mean of that ratio over conversations, or over batches of several answers",
    "decode_speedup": "plain seconds per token / seconds per token of the rounds alone",
    "efficiency": "decode_speedup / tau: time of a plain call over time of a round",
    "tokens_per_second": "sum L / sum of seconds, prefill in, all answers of a batch together; a batch of several "
    "tasks has none of each",
    "user_tokens_per_second": "sum e / sum of each answer's own rounds, prefill out",
    "ttft_ms": "median milliseconds from a prompt to its first token; not known in slots",
    "identical_fraction": "share of answers whose token ids are those of plain decoding",
    "near_ties": f"answers that differ, where the target's two scores are less than {NEAR_TIE} apart",
}
"""Name of a figure -> how it is computed."""
SHARED_BATCHES = (
    "Some batches hold answers of several tasks and have one time for all, so those tasks have no speed-up and no "
    "tokens/s of their own; decode with a batch of 1 for them."
)
NAN = float("nan")
UNKNOWN = Interval(NAN, NAN, NAN)


class Units(NamedTuple):
    """Sums of the rows of one arm by unit `U`: a conversation, or a batch."""

    names: tuple[str, ...]
    tasks: tuple[str, ...]
    emitted_U: np.ndarray
    calls_U: np.ndarray
    accepted_U: np.ndarray
    length_U: np.ndarray
    seconds_U: np.ndarray
    own_seconds_U: np.ndarray
    macro_U: np.ndarray
    """Sum of `sum e / R` over the answers with `R > 0`."""
    counted_U: np.ndarray
    """Number of those answers."""


def units_of(rows: Sequence[Row], name_of: Callable[[Row], str] = lambda row: row.unit) -> Units:
    """Returns the sums of one arm's rows by unit, by default the conversation, in the order in which names sort."""
    by_unit: dict[str, list[Row]] = {}
    for row in rows:
        by_unit.setdefault(name_of(row), []).append(row)
    names = sorted(by_unit)
    sums = [
        (
            sum(sum(r.emitted) for r in mine),
            sum(r.calls for r in mine),
            sum(sum(r.accepted) for r in mine),
            sum(r.length for r in mine),
            sum(r.seconds for r in mine),
            sum(r.own_seconds for r in mine),
            sum(sum(r.emitted) / r.calls for r in mine if r.calls),
            sum(r.calls > 0 for r in mine),
        )
        for mine in (by_unit[name] for name in names)
    ]
    columns = [np.asarray(column, np.float64) for column in zip(*sums, strict=True)] or [np.zeros(0)] * 8
    return Units(tuple(names), tuple(by_unit[name][0].task for name in names), *columns)


def times_of(rows: Sequence[Row]) -> Units | None:
    """Returns the sums of one arm's rows by what is timed by itself: conversations, or batches of several answers.

    None where a batch holds answers besides these rows, and has one time for all.
    """
    if all(row.group_rows == 1 for row in rows):
        return units_of(rows)
    sizes = collections.Counter((row.seed, row.group) for row in rows)
    if any(sizes[row.seed, row.group] != row.group_rows for row in rows):
        return None
    batches = units_of(rows, lambda row: f"{row.seed}/{row.group}")
    return batches._replace(tasks=("",) * len(batches.names))  # a batch may hold several: all are of one stratum


def survival(rows: Sequence[Row], depth: int) -> np.ndarray:
    """Returns `S_1 .. S_D` over all rounds of the rows; NaN where there is none."""
    accepted = np.concatenate([np.asarray(r.accepted, np.int64) for r in rows] or [np.zeros(0, np.int64)])
    if not accepted.size:
        return np.full(depth, np.nan)
    return np.asarray([np.mean(accepted >= i) for i in range(1, depth + 1)])


class Depths(NamedTuple):
    """Rounds of one arm's rows by depth `1 .. D`."""

    accepted_D: np.ndarray
    """Those that accepted so many tokens or more."""
    drafted_D: np.ndarray
    """Those whose drafts are so deep or deeper."""
    tried_D: np.ndarray
    """Of these, those that accepted all tokens above."""


def depths_of(rows: Sequence[Row], depth: int) -> Depths:
    """Returns the rows' rounds by depth."""
    pairs = [pair for r in rows for pair in zip(r.accepted, r.levels, strict=False)]
    accepted_R, levels_R = np.asarray(pairs, np.int64).reshape(-1, 2).T
    at_D1 = np.arange(1, depth + 1)[:, None]
    accepted_DR, drafted_DR, above_DR = accepted_R >= at_D1, levels_R >= at_D1, accepted_R >= at_D1 - 1
    return Depths(accepted_DR.sum(1), drafted_DR.sum(1), (drafted_DR & above_DR).sum(1))


def shares(some_D: np.ndarray, of_D: np.ndarray) -> list[float]:
    """Returns the shares of counts; NaN where there is nothing to have a share of."""
    return np.divide(some_D, of_D, out=np.full(len(some_D), np.nan), where=of_D > 0).tolist()


def alpha_of(tau: float, drafted_D: Sequence[float]) -> float:
    """Returns the acceptance of independent drafts that gives `tau`; NaN where none does.

    `drafted_D` are the shares of rounds whose drafts are 1, 2 .. deep or deeper: ones of a chain.
    """
    if not np.isfinite(tau) or not sum(drafted_D) or not 1 <= tau <= 1 + sum(drafted_D):
        return NAN
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        # The sum has no division, which the closed form lacks at alpha = 1.
        found = 1 + sum(share * middle**i for i, share in enumerate(drafted_D, 1))
        low, high = (middle, high) if found < tau else (low, middle)
    return (low + high) / 2


def same_conversations(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Returns the rows of both whose question, turn and seed are in both."""
    keys = {(r.unit, r.turn, r.seed) for r in ours} & {(r.unit, r.turn, r.seed) for r in theirs}
    return tuple([r for r in rows if (r.unit, r.turn, r.seed) in keys] for rows in (ours, theirs))  # type: ignore[return-value]


def speedups(ours: Sequence[Row], plain: Sequence[Row]) -> dict[str, Any]:
    """Returns the speed-ups of an arm over plain decoding on the same answers, each with its paired interval.

    Where the answers share batches with others, all are NaN but `decode_speedup`, which has no interval then.
    """
    ours, plain = same_conversations(ours, plain)
    u, p = times_of(ours), times_of(plain)
    if u is None or p is None or u.names != p.names:
        own = [_ratio(side.own_seconds_U, side.emitted_U) for side in (units_of(plain), units_of(ours))]
        decode = Interval(own[0] / own[1] if own[1] else NAN, NAN, NAN)
        return {**_named("speedup", UNKNOWN), "speedup_macro": NAN, **_named("decode_speedup", decode)}
    per_answer_token = over(quotient(p.own_seconds_U, p.emitted_U), quotient(u.own_seconds_U, u.emitted_U))
    per_token = over(quotient(p.seconds_U, p.length_U), quotient(u.seconds_U, u.length_U))
    with np.errstate(divide="ignore", invalid="ignore"):
        each_U = (p.seconds_U / p.length_U) / (u.seconds_U / u.length_U)
    return {
        **_named("speedup", resampled(per_token, u.tasks)),
        "speedup_macro": float(np.mean(each_U)) if each_U.size else NAN,
        **_named("decode_speedup", resampled(per_answer_token, u.tasks)),
    }


def summarize(rows: Sequence[Row], facts: Mapping[str, Any], plain: Sequence[Row]) -> dict[str, Any]:
    """Returns the figures of one arm's rows (of a task or of all, at one temperature); `plain` are the plain arm's.

    `facts` are the arm's (`depth`, `nodes`, `cost`). Rows with an error are counted and left out.
    """
    # In one order, so that sums of floats do not depend on how rows were joined.
    failed, rows = sum(bool(r.error) for r in rows), sorted((r for r in rows if not r.error), key=lambda r: r.key)
    plain = sorted((r for r in plain if not r.error), key=lambda r: r.key)
    units, times, depth = units_of(rows), times_of(rows), int(facts["depth"])
    tau = _figure(quotient(units.emitted_U, units.calls_U), units)
    raw = 1 + _ratio(units.accepted_U, units.calls_U)
    by_depth, calls = depths_of(rows, depth), int(np.sum(units.calls_U))
    levels = np.asarray([sum(r.levels) for r in rows], np.float64)
    found = {
        "prompts": len(units.names),
        "answers": len(rows),
        "failed": failed,
        "without_rounds": sum(not r.calls for r in rows),
        "tokens": int(np.sum(units.length_U)),
        "target_calls": calls,
        **_named("tau_micro", tau),
        **_named("tau_macro", _figure(quotient(units.macro_U, units.counted_U), units)),
        "tau_raw": raw,
        "length_sglang": _ratio(units.length_U, units.calls_U),
        "length_specdec": float(np.mean([r.length / (r.calls + 1) for r in rows])) if rows else NAN,
        "survival": survival(rows, depth).tolist(),
        "survival_drafted": shares(by_depth.accepted_D, by_depth.drafted_D),
        "conditional": shares(by_depth.accepted_D, by_depth.tried_D),
        "tried": by_depth.tried_D.tolist(),
        "histogram": histogram(rows, depth).tolist(),
        "drafted_tokens": sum(sum(r.drafted) for r in rows),
        "acceptance_rate": _ratio(units.accepted_U, levels) if depth else None,
        "alpha": alpha_of(raw, shares(by_depth.drafted_D, np.full(depth, calls))) if depth else None,
        "mbsu": tau.value / (1 + float(facts["cost"])),
        "tokens_per_second": NAN if times is None else _ratio(times.length_U, times.seconds_U),
        "user_tokens_per_second": _ratio(units.emitted_U, units.own_seconds_U),
        "ttft_ms": 1e3 * float(np.median([r.ttft for r in rows])) if rows else NAN,
        **speedups(rows, plain),
        **agreement(rows),
    }
    return found | {"efficiency": found["decode_speedup"] / tau.value if tau.value else NAN}


def histogram(rows: Sequence[Row], depth: int) -> np.ndarray:
    """Returns the rounds that accepted 0, 1 .. D drafted tokens."""
    accepted = [a for r in rows for a in r.accepted]
    return np.bincount(np.asarray(accepted, np.int64), minlength=depth + 1)


def agreement(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns how many answers are those of plain decoding; None where they need not be."""
    compared = [r for r in rows if r.identical is not None]
    parted = [r.divergence[1] for r in compared if r.divergence is not None]
    return {
        "identical_fraction": float(np.mean([bool(r.identical) for r in compared])) if compared else None,
        "near_ties": sum(margin < NEAR_TIE for margin in parted),
        "differing": sum(margin >= NEAR_TIE for margin in parted),
    }


def summarize_all(rows: Sequence[Row], arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a summary for each temperature, task (`all` first) and arm."""
    tasks = sorted({row.task for row in rows})
    found = []
    for temperature in sorted({row.temperature for row in rows}):
        for task in [None, *tasks] if len(tasks) > 1 else [None]:
            chosen = [r for r in rows if r.temperature == temperature and task in (None, r.task)]
            plain = [r for r in chosen if r.arm == PLAIN]
            for arm, facts in arms.items():
                mine = [r for r in chosen if r.arm == arm]
                if mine:
                    about = {"task": task or "all", "method": arm, "temperature": temperature}
                    found.append(about | summarize(mine, facts, plain))
    return found


def _figure(statistic: Statistic, units: Units) -> Interval:
    return resampled(statistic, units.tasks)


def _ratio(above_U: np.ndarray, below_U: np.ndarray) -> float:
    below = float(np.sum(below_U))
    return float(np.sum(above_U)) / below if below else NAN


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
