"""Figures of a report about rounds: accepted tokens, survival by depth, tau along answers and prompts, delivery."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxspec.evaluation.breakdown import (
    POSITIONS,
    TauBin,
    chunk_milliseconds,
    chunk_sizes,
    tau_along,
    tau_by_prompt_length,
)
from jaxspec.evaluation.rows import Row
from jaxspec.pages.axes import Axis, axis_over
from jaxspec.pages.lines import Frame, Series, legend_of, line_plot
from jaxspec.pages.page import DataTable, Picture
from jaxspec.report.runs import ALL, Method, Report
from jaxspec.report.speed_pictures import one_named
from jaxspec.report.wording import at_temperature, known, spoken

SHARES = tuple(i / 5 for i in range(6))


def acceptance_pictures(method: Method, tasks: Sequence[str], temperatures: Sequence[float]) -> list[Picture]:
    """Returns accepted tokens a round, survival and conditional acceptance of a method: a line a task, and of several
    temperatures one more set with a line each."""
    found = []
    for number, temperature in enumerate(temperatures, 1):
        by_task = {spoken(t): f for t in tasks if (f := method.figures(temperature, t)) is not None}
        title = f"{method.label}, {at_temperature(temperature)}"
        found += _set(f"{method.look + 1}-{number}", title, by_task)
    warm = {at_temperature(t): f for t in temperatures if (f := method.figures(t)) is not None}
    if len(warm) > 1:
        found += _set(f"{method.look + 1}-all", f"{method.label}, all tasks", warm)
    return found


def _set(anchor: str, title: str, lines: Mapping[str, Mapping[str, Any]]) -> list[Picture]:
    """Returns three figures whose lines are these figures of `metrics.summarize`."""
    if not lines:
        return []
    return [
        _accepted(anchor, title, lines),
        _by_depth(anchor, title, lines, "survival", "S_i: rounds that accept i or more"),
        _by_depth(anchor, title, lines, "conditional", "c_i: of rounds that accept i - 1 and draft i"),
    ]


def _accepted(anchor: str, title: str, lines: Mapping[str, Mapping[str, Any]]) -> Picture:
    shares = {name: _shares(f["histogram"]) for name, f in lines.items()}
    places = [float(k) for k in range(max(map(len, shares.values())))]
    series = [Series(name, places[: len(mine)], mine) for name, mine in shares.items()]
    y = axis_over("share of rounds", [v for mine in shares.values() for v in mine], percent=True)
    numbers = [[name, k, f["histogram"][k], share] for name, f in lines.items() for k, share in enumerate(shares[name])]
    return _picture(
        f"accepted-{anchor}",
        f"Accepted tokens per round: {title}",
        Frame(axis_over("drafted tokens accepted in a round", places, whole=True), y),
        series,
        DataTable(f"Accepted per round: {title}", ["line", "accepted", "rounds", "share"], numbers),
    )


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total if total else float("nan") for count in counts]


def _by_depth(anchor: str, title: str, lines: Mapping[str, Mapping[str, Any]], key: str, label: str) -> Picture:
    depths = [float(i + 1) for i in range(max((len(f[key]) for f in lines.values()), default=1))]
    series = [Series(name, depths[: len(f[key])], f[key]) for name, f in lines.items()]
    of = "rounds" if key == "survival" else "rounds that accept i - 1 and draft i"
    numbers = [
        [name, i, value, sum(f["histogram"]) if key == "survival" else f["tried"][i - 1]]
        for name, f in lines.items()
        for i, value in enumerate(f[key], 1)
    ]
    note = "At greater depth few rounds are left: the numbers say how many." if key == "conditional" else None
    caption = f"{key.capitalize()} by depth: {title}"
    return _picture(
        f"{key}-{anchor}",
        caption,
        Frame(axis_over("depth i", depths, whole=True, from_zero=False), Axis(label, 0, 1, percent=True, ticks=SHARES)),
        series,
        DataTable(caption, ["line", "depth", key, of], numbers),
        note if len(lines) > 1 or note is None else f"{next(iter(lines))}. {note}",
    )


def _picture(
    anchor: str, caption: str, frame: Frame, series: Sequence[Series], numbers: DataTable, note: str | None = None
) -> Picture:
    told = "; ".join(f"{s.name}: {', '.join(f'{v:.3g}' for v in s.y if known(v))}" for s in series)
    names = [s.name for s in series]
    if len(names) == 1 and note is None:
        note = f"{names[0]}."
    return Picture(anchor, caption, line_plot(caption, told, frame, series), numbers, note, legend_of(series))


# Along answers and prompts.


def along_pictures(report: Report, temperature: float, number: int) -> list[Picture]:
    """Returns tau by the place in the answer, by the prompt's length, and the sizes of chunks."""
    found = [
        _binned(report, temperature, f"along-{number}", tau_along) if has_bins(report) else None,
        _binned(report, temperature, f"length-{number}", tau_by_prompt_length),
        _delivery(report, temperature, f"chunks-{number}"),
    ]
    return [picture for picture in found if picture is not None]


def _binned(
    report: Report, temperature: float, anchor: str, bins_of: Callable[[Sequence[Row]], list[TauBin]]
) -> Picture | None:
    """Returns tau by bin, a line a method; None without a round."""
    bins = {m: mine for m in report.methods if (mine := bins_of(m.rows(temperature)))}
    every = [b for mine in bins.values() for b in mine]
    if not every:
        return None
    along = bins_of is tau_along
    # A point stands at the middle of its bin along the answer, and at the end of one of prompt lengths.
    places = {m: [b.first + POSITIONS / 2 if along else float(b.last) for b in mine] for m, mine in bins.items()}
    series = []
    for m, mine in bins.items():
        value, low, high = ([b.tau[i] for b in mine] for i in range(3))
        series.append(Series(m.label, places[m], value, low, high, look=m.look))
    x = (
        axis_over(f"token of the answer, in bins of {POSITIONS}", [0.0, *(b.last + 1.0 for b in every)])
        if along
        else _lengths([b.last for b in every])
    )
    y = axis_over("tau: tokens per target call", [v for b in every for v in b.tau])
    what = "along the answer" if along else "by the prompt's length"
    caption = f"tau {what}, {at_temperature(temperature)}"
    columns = ["method", "from token", "to", "tau", "low", "high", "rounds", "answers"]
    numbers = [[m.label, b.first, b.last, *b.tau, b.rounds, b.answers] for m, mine in bins.items() for b in mine]
    note = "A round counts where its first token stands. " if along else "Prefill is not counted. "
    note = one_named(report, f"{note}Band: 95 %.")
    return _picture(anchor, caption, Frame(x, y), series, DataTable(caption, columns, numbers), note)


def _lengths(ends: Sequence[int]) -> Axis:
    """Returns an axis of powers of two around the ends of bins of prompt lengths."""
    low, high = min(ends) // 2, max(ends)
    ticks = [float(low)]
    while ticks[-1] < high:
        ticks.append(2 * ticks[-1])
    return Axis("tokens of the prompt, up to", low, high, doubling=True, ticks=tuple(ticks[:: len(ticks) // 8 + 1]))


def _delivery(report: Report, temperature: float, anchor: str) -> Picture | None:
    """Returns the sizes of chunks as a reader gets them, plain decoding's among them; None without a round."""
    methods = [*report.methods, *report.plains]
    rows = {m: m.rows(temperature) for m in methods}
    counts = {m: chunk_sizes(mine) for m, mine in rows.items()}
    if not any(mine.sum() for mine in counts.values()):
        return None
    shares = {m: mine[1:] / mine.sum() for m, mine in counts.items() if mine.sum()}
    series = [
        Series(m.label, np.arange(1.0, len(mine) + 1).tolist(), mine.tolist(), look=m.look)
        for m, mine in shares.items()
    ]
    caption = f"Tokens per chunk, {at_temperature(temperature)}"
    times = {m: chunk_milliseconds(mine) for m, mine in rows.items() if m in shares}
    numbers = [
        [m.label, k, int(counts[m][k]), float(share), times[m]]
        for m, mine in shares.items()
        for k, share in enumerate(mine, 1)
    ]
    note = "; ".join(f"{m.label}: {ms:.3g} ms" for m, ms in times.items())
    return _picture(
        anchor,
        caption,
        Frame(
            axis_over("tokens that one round delivers", [x for s in series for x in s.x], whole=True, from_zero=False),
            axis_over("share of chunks", [v for s in series for v in s.y], percent=True),
        ),
        series,
        DataTable(caption, ["method", "tokens", "chunks", "share", "mean ms between chunks"], numbers),
        f"Mean time between two chunks: {note}.",
    )


def has_bins(report: Report) -> bool:
    """Returns whether some answer is longer than a bin along it."""
    return any(row.length > POSITIONS for run in report.runs for row in run.evaluation.rows)


def unmeasured(methods: Sequence[Method], temperatures: Sequence[float]) -> list[str]:
    """Returns the methods and temperatures without an answer."""
    return [f"{m.label}, {at_temperature(t)}" for m in methods for t in temperatures if m.figures(t, ALL) is None]
