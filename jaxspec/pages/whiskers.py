"""Charts of named rows with numbers across: points with their intervals in groups, and bars of stacked parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxspec.pages.axes import Axis
from jaxspec.pages.lines import WIDTH, mark
from jaxspec.pages.markup import Markup, element, joined
from jaxspec.pages.style import COLOURS

LEFT, RIGHT, TALL = 12.0, 18.0, 17.0
SHORT = 22.0
"""Width of a part that has room for its number."""


class IntervalRow(NamedTuple):
    """A point of a group with its interval; the mark is that of `look`."""

    value: float
    low: float
    high: float
    look: int
    told: str
    """Text for a pointer that rests on it."""


class IntervalGroup(NamedTuple):
    """Points below one name."""

    name: str
    rows: Sequence[IntervalRow]


class StackedBar(NamedTuple):
    """A bar of parts, one behind the other, with its name above and a text behind it."""

    name: str
    parts: Sequence[float]
    text: str


def interval_chart(
    title: str, description: str, axis: Axis, groups: Sequence[IntervalGroup], *, line_at: float | None = None
) -> Markup:
    """Returns points with whiskers, a row each, in groups below their names; a line stands at `line_at`."""
    drawn, y, top = [], 4.0, 4.0
    bottom = top + sum((1 + len(group.rows)) * TALL + 5 for group in groups)
    drawn.append(_across(axis, top, bottom))
    if line_at is not None and axis.low <= line_at <= axis.high:
        x = _place(axis, line_at)
        drawn.append(element("path", d=f"M{x:.1f} {top:.1f}V{bottom:.1f}", class_="axis"))
    for group in groups:
        drawn.append(element("text", group.name, x=2, y=y + 12, class_="strong halo"))
        y += TALL
        for row in group.rows:
            drawn.append(_interval(axis, row, y + TALL / 2))
            y += TALL
        y += 5
    return _plot(title, description, drawn, bottom + 36)


def stacked_bars(title: str, description: str, axis: Axis, bars: Sequence[StackedBar]) -> Markup:
    """Returns horizontal bars of numbered parts, each bar below its name; parts below 0 have no length."""
    tall, top = 40.0, 4.0
    bottom = top + len(bars) * tall
    drawn: list[Markup] = [_across(axis, top, bottom)]
    for number, bar in enumerate(bars):
        y, at = top + number * tall, 0.0
        drawn.append(element("text", bar.name, x=LEFT, y=y + 12, class_="halo"))
        for part, length in enumerate(bar.parts):
            begin, at = at, at + max(length, 0.0)
            x0, x1 = _place(axis, begin), _place(axis, at)
            box = {"x": x0, "y": y + 16, "width": x1 - x0, "height": 15}
            drawn.append(element("rect", **box, class_=f"mark c{part % COLOURS}"))
            if x1 - x0 >= SHORT:
                drawn.append(element("text", part + 1, x=(x0 + x1) / 2, y=y + 27.5, **_CENTRED))
        drawn.append(element("text", bar.text, x=WIDTH - 4, y=y + 12, text_anchor="end", class_="tick halo"))
    return _plot(title, description, drawn, bottom + 36)


_CENTRED = {"text_anchor": "middle", "class_": "strong halo"}


def numbered_legend(names: Sequence[str]) -> Markup:
    """Returns the names of parts with their numbers and colours."""
    items = []
    for number, name in enumerate(names):
        box = element("rect", x=4, y=1, width=22, height=12, class_=f"mark c{number % COLOURS}")
        swatch = element("svg", box, viewBox="0 0 30 14", aria_hidden="true")
        items.append(element("li", swatch, f"{number + 1} {name}"))
    return element("ul", *items, class_="legend")


def _place(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _across(axis: Axis, top: float, bottom: float) -> Markup:
    """Returns the axis below, with a thin line at each tick."""
    drawn = []
    for tick in axis.ticks:
        x = _place(axis, tick)
        drawn.append(element("path", d=f"M{x:.1f} {top:.1f}V{bottom:.1f}", class_="rule"))
        drawn.append(element("text", axis.name(tick), x=x, y=bottom + 14, text_anchor="middle", class_="tick"))
    drawn.append(element("text", axis.label, x=WIDTH / 2, y=bottom + 31, text_anchor="middle"))
    return joined(*drawn)


def _interval(axis: Axis, row: IntervalRow, y: float) -> Markup | None:
    if not math.isfinite(row.value):
        return element("text", "not measured", x=LEFT, y=y + 4, class_="tick")
    drawn = [element("title", row.told)]
    if math.isfinite(row.low) and math.isfinite(row.high):
        x0, x1 = _place(axis, row.low), _place(axis, row.high)
        ends = "".join(f"M{x:.1f} {y - 3:.1f}v6" for x in (x0, x1))
        drawn.append(element("path", d=f"M{x0:.1f} {y:.1f}H{x1:.1f}{ends}", class_=f"whisker c{row.look % COLOURS}"))
    drawn.append(mark(row.look, _place(axis, row.value), y))
    return element("g", *drawn)


def _plot(title: str, description: str, drawn: Sequence[Markup | None], high: float) -> Markup:
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *drawn,
        class_="plot",
        role="img",
        viewBox=f"0 0 {WIDTH:g} {high:.0f}",
    )
