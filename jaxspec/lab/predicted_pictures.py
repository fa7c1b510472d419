"""Figures of a report: predicted against measured tokens/s and tau."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxspec.lab.predicted import Compared, Comparison, mismatches
from jaxspec.lab.search import Rated
from jaxspec.pages.axes import axis_over
from jaxspec.pages.lines import Frame, Reference, Series, legend, line_plot
from jaxspec.pages.markup import Markup, joined
from jaxspec.pages.page import DataTable, Picture, bullets, grid, paragraph

COLUMNS = ["arm", "prediction", "batch", "context", "tau measured", "tau predicted", "tokens/s measured"]
COLUMNS += ["tokens/s predicted", "error", "file"]


def predicted_section(found: Comparison, files: int) -> Markup:
    """Returns the section: two scatter plots, the median error, and what could not be compared."""
    if not files:
        return paragraph(
            "Nothing was measured: give results of jaxspec bench decode --json or lab check --json as --measured, with "
            "the same trees."
        )
    left = [f"{arm.arm} (batch {arm.batch}, {arm.device}, {arm.file.name}): {why}" for arm, why in found.left_out]
    told = joined(paragraph(f"{len(left)} arms are not compared:"), bullets(left)) if left else None
    if not found.compared:
        return joined(paragraph("No measured arm has a prediction."), told)
    others = [paragraph(text, soft=True) for text in mismatches(found.compared)]
    return joined(paragraph(summary(found.compared)), *others, grid(predicted_pictures(found.compared)), told)


def summary(compared: list[Compared]) -> str:
    """Returns the median error and the worst one in a sentence."""
    errors = np.array([c.error for c in compared])
    worst = compared[int(np.argmax(np.abs(errors)))]
    return (
        f"Of {len(compared)} predictions of tokens/s the median error is {100 * np.median(np.abs(errors)):.1f} %; "
        f"farthest off is {worst.measured.arm} at batch {worst.measured.batch}: {100 * worst.error:+.1f} %."
    )


def predicted_pictures(compared: list[Compared]) -> list[Picture]:
    """Returns tokens/s and tau, predicted across and measured up."""
    rows = [_row(c) for c in compared]
    speed = _scatter("measured-speed", "tokens/s", compared, rows, lambda r: list(r.tokens_per_second), 6)
    return [speed, _scatter("measured-tau", "tau", compared, rows, lambda r: list(r.tau), 4)]


def _row(c: Compared) -> list[Any]:
    arm, predicted = c.measured, c.predicted
    speeds = arm.tokens_per_second, predicted.tokens_per_second.value
    name = c.finding.names.whole
    return [arm.arm, name, arm.batch, arm.context, arm.tau, predicted.tau.value, *speeds, c.error, arm.file.name]


def _scatter(
    anchor: str, unit: str, compared: list[Compared], rows: list[list[Any]], of: Callable[[Rated], list[float]], at: int
) -> Picture:
    """Returns the plot of one unit; column `at` of the rows is the measured figure, the next one the prediction."""
    names = dict.fromkeys(c.finding.names.whole for c in compared)
    series = []
    for name in names:
        mine = [i for i, c in enumerate(compared) if c.finding.names.whole == name]
        y_or_tau = [rows[i][at] for i in mine]
        series.append(Series(name, [of(compared[i].predicted)[0] for i in mine], y_or_tau, joined=False))
    values = [v for one in series for v in (*one.x, *one.y)]
    across, up = axis_over(f"predicted {unit}", values), axis_over(f"measured {unit}", values)
    caption = f"Predicted against measured {unit}"
    line = Reference("as predicted", (across.low, across.high), (up.low, up.high))
    drawing = line_plot(caption, summary(compared), Frame(across, up), series, [line])
    note = "A mark an arm; on the dotted diagonal the prediction is right."
    return Picture(anchor, caption, drawing, DataTable(caption, COLUMNS, rows), note, legend([s.name for s in series]))
