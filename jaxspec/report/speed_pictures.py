"""Figures of a report about time: speed-up by task, its reasons, prompt by prompt, and over batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxspec.evaluation.breakdown import PromptTimes, prompt_times
from jaxspec.pages.axes import axis_over, doubling_axis
from jaxspec.pages.lines import Frame, Reference, Series, legend, legend_of, line_plot
from jaxspec.pages.page import DataTable, Picture
from jaxspec.pages.whiskers import IntervalGroup, IntervalRow, interval_chart
from jaxspec.report.runs import ALL, Method, Report
from jaxspec.report.wording import at_temperature, counted, interval, known, spoken, spread

RAYS = (1.0, 0.75, 0.5, 0.25)
"""Efficiencies of the rays from tau to speed-up."""
WORST = 10
"""Prompts that are named beside the figure of all."""


def speed_pictures(report: Report, temperature: float, number: int) -> list[Picture]:
    """Returns the figures of one temperature, none without a method; `number` tells their anchors apart."""
    if not any(method.figures(temperature) for method in report.methods):
        return []
    return [
        _by_task(report, temperature, number),
        _why(report, temperature, number),
        _by_prompt(report, temperature, number),
    ]


def one_named(report: Report, note: str) -> str:
    """Returns a note, with the method's name before it where there is one, for then no legend names it."""
    return f"{report.methods[0].label}. {note}" if len(report.methods) == 1 else note


def rows_of_tasks(report: Report, temperature: float) -> list[tuple[str, Method, Mapping[str, Any]]]:
    """Returns the figures by task, all tasks first, and method."""
    tasks = [ALL, *(report.tasks if len(report.tasks) > 1 else [])]
    found = [(t, m, m.figures(temperature, t)) for t in tasks for m in report.methods]
    return [("all tasks" if t == ALL else spoken(t), m, f) for t, m, f in found if f is not None]


def _by_task(report: Report, temperature: float, number: int) -> Picture:
    """Returns the speed-up with its interval, a row a method in a group a task."""
    rows = rows_of_tasks(report, temperature)
    values = [v for _, _, f in rows for v in interval(f, "speedup")]
    axis = axis_over("times plain decoding's speed", [*values, 1.0])
    groups = []
    for task in dict.fromkeys(task for task, _, _ in rows):
        mine = [(m, f) for t, m, f in rows if t == task]
        points = [IntervalRow(*interval(f, "speedup"), m.look, f"{m.label}: {spread(f, 'speedup')}") for m, f in mine]
        groups.append(IntervalGroup(f"{task} ({counted(max(f['prompts'] for _, f in mine), 'prompt')})", points))
    caption, shown = f"Speed-up by task, {at_temperature(temperature)}", list(dict.fromkeys(m for _, m, _ in rows))
    told = "; ".join(f"{t}, {m.label}: {spread(f, 'speedup')}" for t, m, f in rows)
    columns = ["task", "method", "prompts", "x plain", "low", "high", "tau", "decode x plain", "efficiency"]
    numbers = [
        [t, m.label, f["prompts"], *interval(f, "speedup"), f["tau_micro"], f["decode_speedup"],
         f["efficiency"]]
        for t, m, f in rows
    ]  # fmt: skip
    return Picture(
        f"speed-{number}",
        caption,
        interval_chart(caption, told, axis, groups, line_at=1.0),
        DataTable(caption, columns, numbers),
        one_named(
            report, "Plain seconds over seconds, prefill in. Whiskers: 95 %. Left of the line at 1 drafts cost time."
        ),
        legend([m.label for m in shown], [m.look for m in shown]),
    )


def _why(report: Report, temperature: float, number: int) -> Picture:
    """Returns the speed-up of rounds against tau, a point a task, with rays of equal efficiency."""
    rows = rows_of_tasks(report, temperature)
    x = axis_over("tau: tokens per target call", [f["tau_micro"] for _, _, f in rows])
    y = axis_over("decode speed-up, prefill out", [*(f["decode_speedup"] for _, _, f in rows), 1.0])
    series = []
    for method in dict.fromkeys(m for _, m, _ in rows):
        mine = [f for _, m, f in rows if m == method]
        points = [[f[name] for f in mine] for name in ("tau_micro", "decode_speedup")]
        series.append(Series(method.label, *points, joined=False, look=method.look))
    rays = []
    for efficiency in RAYS:
        end = min(x.high, y.high / efficiency)
        rays.append(Reference(f"{efficiency:g}", (0, end), (0, efficiency * end)))
    caption = f"Speed-up against tau, {at_temperature(temperature)}"
    told = "; ".join(f"{t}, {m.label}: tau {f['tau_micro']:.2f}, {f['decode_speedup']:.2f} times" for t, m, f in rows)
    columns = ["task", "method", "tau", "decode x plain", "efficiency", "answers"]
    numbers = [
        [t, m.label, *(f[k] for k in ("tau_micro", "decode_speedup", "efficiency", "answers"))] for t, m, f in rows
    ]
    return Picture(
        f"why-{number}",
        caption,
        line_plot(caption, told, Frame(x, y), series, rays),
        DataTable(caption, columns, numbers),
        one_named(report, "A mark a task. Dotted rays: equal efficiency, a plain call's time over a round's."),
        legend_of(series),
    )


def _by_prompt(report: Report, temperature: float, number: int) -> Picture:
    """Returns plain milliseconds a token against those with drafts, a point a prompt, the worst ten named."""
    measured = {m: prompt_times(m.rows(temperature), m.plain_rows(temperature)) for m in report.methods}
    times = {m: mine for m, mine in measured.items() if mine}
    every = [(m, t) for m, mine in times.items() for t in mine]
    x = axis_over("plain ms a token", [t.plain_ms for _, t in every])
    y = axis_over("ms a token with drafts", [t.ms for _, t in every])
    end = min(x.high, y.high)
    series = [
        Series(m.label, [t.plain_ms for t in mine], [t.ms for t in mine], joined=False, look=m.look)
        for m, mine in times.items()
    ]
    caption = f"Prompt by prompt, {at_temperature(temperature)}"
    told = "; ".join(f"{m.label}: {_below(mine)}" for m, mine in times.items())
    worst = sorted(((m, t) for m, t in every if known(t.speedup)), key=lambda one: one[1].speedup)[:WORST]
    columns = ["prompt", "method", "plain ms", "ms", "x plain", "least", "greatest", "tau"]
    numbers = [[t.unit, m.label, t.plain_ms, t.ms, t.speedup, t.low, t.high, t.tau] for m, t in every]
    slowest = ", ".join(f"{t.unit} {t.speedup:.2f}{f' by {m.label}' if len(times) > 1 else ''}" for m, t in worst)
    return Picture(
        f"prompts-{number}",
        caption,
        line_plot(caption, told, Frame(x, y), series, [Reference("as fast", (0, end), (0, end))]),
        DataTable(caption, columns, numbers),
        f"Rounds alone. Above the diagonal drafts cost time. Prompts on it or below: {told}. The slowest: {slowest}.",
        legend_of(series),
    )


def _below(times: Sequence[PromptTimes]) -> str:
    return f"{sum(t.speedup >= 1 for t in times):,} of {len(times):,}"


# Over batches.


def batch_pictures(report: Report) -> list[Picture]:
    """Returns speed-up by batch (or slots) and the frontier of each temperature; none where all runs have one."""
    if len({run.width for run in report.runs}) < 2:
        return []
    found = []
    for number, temperature in enumerate(report.temperatures, 1):
        found += [_batch_map(report, temperature, number), _frontier(report, temperature, number)]
    return found


def by_batch(methods: Sequence[Method], temperature: float) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """Returns the batch and figures of arms of one name in all runs, the least batch first."""
    found: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for method in methods:
        if (figures := method.figures(temperature)) is not None:
            found.setdefault(method.arm, []).append((method.run.width, figures))
    return {arm: sorted(mine, key=lambda one: one[0]) for arm, mine in found.items()}


def _batch_map(report: Report, temperature: float, number: int) -> Picture:
    points = by_batch(report.methods, temperature)
    batches = [batch for mine in points.values() for batch, _ in mine]
    series = []
    for arm, mine in points.items():
        value, low, high = ([interval(f, "speedup")[end] for _, f in mine] for end in range(3))
        series.append(Series(arm, [b for b, _ in mine], value, low, high))
    y = axis_over(
        "times plain decoding's speed", [v for s in series for v in (*s.y, *(s.high or ())) if known(v)] + [1]
    )
    x = doubling_axis("batch", batches)
    caption = f"Speed-up by batch, {at_temperature(temperature)}"
    told = "; ".join(f"{arm} at {b}: {f['speedup']:.2f}" for arm, mine in points.items() for b, f in mine)
    numbers = [[arm, b, *interval(f, "speedup"), f["tau_micro"]] for arm, mine in points.items() for b, f in mine]
    return Picture(
        f"batch-{number}",
        caption,
        line_plot(caption, told, Frame(x, y), series, [Reference("plain decoding", (x.low, x.high), (1, 1))]),
        DataTable(caption, ["method", "batch", "x plain", "low", "high", "tau"], numbers),
        "Runs whose arms have one name, each over plain decoding at its batch. Band: 95 %.",
        legend_of(series),
    )


def _frontier(report: Report, temperature: float, number: int) -> Picture:
    points = by_batch([*report.plains, *report.methods], temperature)
    keys = ("user_tokens_per_second", "tokens_per_second")
    series = [Series(arm, [f[keys[0]] for _, f in mine], [f[keys[1]] for _, f in mine]) for arm, mine in points.items()]
    x = axis_over("tokens/s of one answer", [v for s in series for v in s.x])
    y = axis_over("tokens/s of all answers", [v for s in series for v in s.y])
    caption = f"Tokens/s of one and of all, {at_temperature(temperature)}"
    told = "; ".join(
        f"{arm} at batch {b}: {f[keys[0]]:.3g} and {f[keys[1]]:.3g}" for arm, mine in points.items() for b, f in mine
    )
    numbers = [[arm, b, *(f[key] for key in keys)] for arm, mine in points.items() for b, f in mine]
    return Picture(
        f"frontier-{number}",
        caption,
        line_plot(caption, told, Frame(x, y), series),
        DataTable(caption, ["method", "batch", x.label, y.label], numbers),
        "Along a line the batch grows. Of one answer: its rounds alone; of all: prefill in.",
        legend_of(series),
    )
