"""Answers of a report in sentences, its tables of tasks and methods, and where drafts do not help."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxspec.evaluation.breakdown import PromptTimes, prompt_times
from jaxspec.evaluation.metrics import SHARED_BATCHES
from jaxspec.pages.markup import Markup, element, joined
from jaxspec.pages.page import DataTable, bullets, folded, paragraph, table
from jaxspec.report.runs import ALL, Method, Report, ReportRun, differing, not_comparable
from jaxspec.report.wording import at_temperature, counted, identical, interval, known, per_second, spoken, spread

SHOWN = 20
"""Prompts or problems that are named; the rest are counted."""
FEW = 10
"""Prompts of a task below which a reader is warned of its intervals."""
MATRICES = {
    "Speed-up": lambda f: spread(f, "speedup"),
    "tau (micro)": lambda f: spread(f, "tau_micro"),
    "tau (macro)": lambda f: spread(f, "tau_macro"),
    "Tokens/s, prefill in": lambda f: "-" if f is None else per_second(f["tokens_per_second"]),
    "Token-identical to plain decoding": identical,
}
"""Title of a table of tasks and methods -> the text of its cells."""
FIRST_SHOWN = 2
"""Tables that are shown; the rest are folded."""
EVERY_FIGURE = (
    "prompts", "answers", "failed", "without_rounds", "tokens", "target_calls", "tau_raw", "length_sglang",
    "length_specdec", "drafted_tokens", "acceptance_rate", "alpha", "mbsu", "speedup_macro", "decode_speedup",
    "efficiency", "user_tokens_per_second", "ttft_ms",
)  # fmt: skip
"""Figures of the last table, which those above it do not show."""


# The answer.


def lead(report: Report) -> Markup:
    """Returns the answer in a few sentences, and what a reader must know before reading on."""
    answers = [answer(report, run, temperature) for run in report.runs for temperature in run.temperatures]
    return joined(bullets(answers), *(paragraph(text, soft=True) for text in cautions(report)))


def answer(report: Report, run: ReportRun, temperature: float) -> Markup:
    """Returns the best method of a run at a temperature in a sentence."""
    name = at_temperature(temperature)
    title = element("strong", f"{run.name}, {name}" if len(report.runs) > 1 else name.capitalize())
    best = report.best(temperature, run)
    if best is None:
        return joined(title, ": no method with drafts was measured.")
    figures = best.figures(temperature)
    assert figures is not None
    speed, (_, low, high) = spread(figures, "speedup"), interval(figures, "speedup")
    text = f": {best.arm} is fastest, {speed} times plain decoding (95 % interval), with "
    if not known(low):
        few = f"{speed} times plain decoding (too few measurements for an interval), with "
        text = f": {best.arm} is fastest{' of those that draft' if figures['speedup'] < 1 else ''}, {few}"
    elif high < 1:
        text = f": no method beats plain decoding; the nearest is {best.arm}, {speed} times as fast, with "
    elif low <= 1:
        text = f": {best.arm} is at {speed} times plain decoding, which is not told apart from 1, with "
    sizes = f"{counted(figures['prompts'], 'prompt')}, {counted(figures['answers'], 'answer')}"
    return joined(title, text, f"{figures['tau_micro']:.2f} tokens per target call. {told_identical(figures)} {sizes}.")


def told_identical(figures: Mapping[str, Any]) -> str:
    """Returns a sentence about answers that are, or are not, plain decoding's."""
    share = figures["identical_fraction"]
    if share is None:
        return "Its text need not be plain decoding's: the rule keeps the distribution."
    if share == 1:
        return "Every answer is plain decoding's, token for token."
    if not figures["differing"]:
        ties = counted(figures["near_ties"], "answer")
        return f"{ties} part from plain decoding's at a near tie of the target's scores, all others are the same."
    return f"{counted(figures['differing'], 'answer')} differ from plain decoding's by more than rounding: a fault."


def cautions(report: Report) -> list[str]:
    """Returns what a reader must know of the runs: broken invariants, failed turns, runs that are not alike."""
    found = []
    for run in report.runs:
        if run.problems:
            found.append(f"Do not trust these figures. {run.name}: {broken_invariants(run)}")
        if run.partial:
            found.append(f"{run.name} {run.partial}. Its figures are those of the rows that are there.")
        if run.failed:
            told = counted(len(run.failed), "failed turn")
            found.append(f"{run.name}: {told}, left out of every figure (see Checks).")
    apart = not_comparable(report.runs)
    if apart:
        names = ", ".join(name.replace("_", " ") for name in apart)
        found.append(f"The runs are not of the same questions and target ({names}): read each by itself.")
    if any(math.isnan(row["tokens_per_second"]) for run in report.runs for row in run.summary if row["answers"]):
        found.append(SHARED_BATCHES)
    few = sorted({t for m in report.methods for t in report.tasks for n in report.temperatures if _few(m, n, t)})
    if few:
        named = ", ".join(map(spoken, few))
        found.append(f"Fewer than {FEW} prompts, so that intervals are rough: {named}.")
    if len(report.runs) > 1 and not apart and "machine" in differing(report.runs):
        found.append("The runs are of different machines; each speed-up is over plain decoding of its own run.")
    return found


def broken_invariants(run: ReportRun) -> str:
    """Returns a sentence about what does not hold of a run's rows."""
    hold = "does" if len(run.problems) == 1 else "do"
    return f"{counted(len(run.problems), 'invariant')} of its rows {hold} not hold (see Checks on the page)."


def _few(method: Method, temperature: float, task: str) -> bool:
    figures = method.figures(temperature, task)
    return figures is not None and figures["prompts"] < FEW


# Tables of tasks and methods.


def result_tables(report: Report) -> Markup:
    """Returns the tables of all temperatures."""
    blocks = []
    for temperature in report.temperatures:
        several = len(report.temperatures) > 1
        made = [table(_matrix(report, temperature, title, told)) for title, told in MATRICES.items()]
        rest = [*made[FIRST_SHOWN:], table(every_figure(report, temperature))]
        blocks += [element("h3", at_temperature(temperature).capitalize()) if several else None]
        blocks += [
            element("div", *made[:FIRST_SHOWN], class_="side"),
            folded("More: macro tau, tokens/s, identity, other figures", *rest),
        ]
    note = (
        "Speed-up: plain decoding's seconds over the method's, prefill in. tau: tokens per target call, micro over all "
        "rounds, macro as a mean of answers. In brackets: 95 %, by resampling conversations within tasks, or batches "
        "of several answers, paired."
    )
    return joined(*blocks, paragraph(note, soft=True))


def _matrix(
    report: Report, temperature: float, title: str, told: Callable[[Mapping[str, Any] | None], str]
) -> DataTable:
    """Returns a table of a figure: a line a task, a column a method, plain decoding among them where it has one."""
    methods = [*(report.plains if "Tokens/s" in title else []), *report.methods]
    rows = []
    for task in [ALL, *(report.tasks if len(report.tasks) > 1 else [])]:
        cells = [told(method.figures(temperature, task)) for method in methods]
        rows.append(["all tasks" if task == ALL else spoken(task), *cells])
    caption = f"{title}, {at_temperature(temperature)}"
    return DataTable(caption, ["task", *(method.label for method in methods)], rows)


def every_figure(report: Report, temperature: float) -> DataTable:
    """Returns the figures that the other tables do not show, a line a task and method."""
    rows = []
    for task in [ALL, *(report.tasks if len(report.tasks) > 1 else [])]:
        for method in [*report.plains, *report.methods]:
            if (figures := method.figures(temperature, task)) is not None:
                name = "all tasks" if task == ALL else spoken(task)
                rows.append([name, method.label, *(figures[key] for key in EVERY_FIGURE)])
    columns = ["task", "method", *(key.replace("_", " ") for key in EVERY_FIGURE)]
    return DataTable(f"Other figures, {at_temperature(temperature)}", columns, rows)


# Where drafts do not help.


def where_not(report: Report) -> Markup:
    """Returns the tasks whose interval of the speed-up lies below 1, and the prompts that were slower every time."""
    if not report.methods:
        return paragraph("No method with drafts was measured.")
    rows, shown = tasks_below(report), None
    if rows:
        columns = ["task", "method", "temperature", "x plain", "prompts", "finding"]
        shown = table(DataTable("Tasks whose interval of the speed-up does not lie above 1", columns, rows))
    return joined(
        paragraph(_all_above(report)) if shown is None else shown,
        paragraph(
            "Below: prompts whose rounds were slower than plain decoding's in every repeat. A single prompt has no "
            "bootstrap interval; its ends are those of its repeats."
        ),
        *(_prompts(method, temperature) for temperature in report.temperatures for method in report.methods),
    )


def _all_above(report: Report) -> str:
    """Returns a sentence for a report none of whose tasks is slower or not told apart from plain decoding."""
    figures = [
        method.figures(temperature, task)
        for temperature in report.temperatures
        for method in report.methods
        for task in report.tasks
    ]
    ends = [known(interval(found, "speedup")[1]) for found in figures if found is not None]
    if all(ends):
        return "In every task the interval of every method's speed-up lies above 1."
    if not any(ends):
        return "No task has an interval of its speed-up, so none is told apart from plain decoding."
    return "In every task that has an interval, that of every method's speed-up lies above 1; some have none."


def tasks_below(report: Report) -> list[list[Any]]:
    """Returns a line for every task, method and temperature whose interval of the speed-up does not lie above 1."""
    found = []
    for temperature in report.temperatures:
        for method in report.methods:
            for task in report.tasks:
                figures = method.figures(temperature, task)
                if figures is None or (finding := _finding(*interval(figures, "speedup"))) is None:
                    continue
                told = at_temperature(temperature), spread(figures, "speedup"), figures["prompts"], finding
                found.append([spoken(task), method.label, *told])
    return found


def _finding(value: float, low: float, high: float) -> str | None:
    """Returns the verdict about a speed-up that is not surely above 1."""
    if known(low):
        return "slower" if high < 1 else "not told apart from plain decoding" if low <= 1 else None
    return "slower, but without an interval" if value < 1 else None


def slower(times: Sequence[PromptTimes]) -> list[PromptTimes]:
    """Returns the prompts that were slower than plain decoding in every repeat, the slowest first."""
    found = [t for t in times if (t.high if known(t.high) else t.speedup) < 1]
    return sorted(found, key=lambda t: t.speedup)


def _prompts(method: Method, temperature: float) -> Markup | None:
    times = prompt_times(method.rows(temperature), method.plain_rows(temperature))
    if not times:
        return None
    found, title = slower(times), f"{method.label}, {at_temperature(temperature)}"
    repeats = min(t.repeats for t in times)
    once = " (measured once: noise of the clock may be all of it)" if repeats == 1 else f" in each of {repeats} repeats"
    if not found:
        return paragraph(element("strong", title), f": no prompt of {len(times):,} was slower{once}.")
    rows = [[t.unit, t.speedup, t.low, t.high, t.tau, t.plain_ms, t.ms] for t in found[:SHOWN]]
    columns = ["prompt", "x plain", "least", "greatest", "tau", "plain ms a token", "ms a token"]
    told = f": {len(found):,} of {counted(len(times), 'prompt')} slower{once}"
    told += f"; the {SHOWN} slowest are named." if len(found) > SHOWN else "."
    shown = table(DataTable(f"Slower than plain decoding: {title}", columns, rows))
    return joined(paragraph(element("strong", title), told), folded("Their names", shown))


# Checks.


def checks(report: Report) -> Markup:
    """Returns what was asserted of the rows, what does not hold, and the turns that failed with their reasons."""
    blocks: list[Markup] = []
    for run in report.runs:
        rows = len(run.evaluation.rows)
        if run.problems:
            shown = [*run.problems[:SHOWN]]
            more = len(run.problems) - len(shown)
            blocks.append(paragraph(element("strong", run.name), ": of its rows these invariants do not hold."))
            blocks.append(bullets([*shown, *([f"and {more:,} more"] if more else [])]))
        else:
            blocks.append(paragraph(element("strong", run.name), f": all invariants hold of {rows:,} rows."))
        if run.failed:
            lines = [[row.id, spoken(row.task), row.turn + 1, row.error] for row in run.failed]
            made = DataTable(f"Turns that failed: {run.name}", ["question", "task", "turn", "reason"], lines)
            blocks.append(table(made))
    return joined(*blocks)
