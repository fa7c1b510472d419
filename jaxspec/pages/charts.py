"""Charts of named rows as SVG: grids of cells coloured by a value, and bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxspec.pages.lines import WIDTH
from jaxspec.pages.markup import Markup, element, joined

STRONGEST, FAINTEST = 0.55, 0.04
"""Opacity of the greatest and the least value's colour; text on the strongest can still be read."""


class Cell(NamedTuple):
    """A cell of a grid: a text, a smaller one below it, and the share of full colour."""

    text: str
    below: str = ""
    strength: float = float("nan")
    """From 0 to 1; NaN: no colour."""
    told: str = ""
    """Text for a pointer that rests on it."""


class GridAxis(NamedTuple):
    """A name of a grid's axis, and those along it."""

    label: str
    names: Sequence[str]


def cell_grid(
    title: str, description: str, rows: GridAxis, columns: GridAxis, cells: Sequence[Sequence[Cell]]
) -> Markup:
    """Returns a grid of cells with names at its left and its top, as wide as a plot or wider."""
    tall = 38.0 if any(cell.below for row in cells for cell in row) else 22.0
    left = max(34.0, 8 + 6.2 * max(len(name) for name in rows.names))
    width = max((WIDTH - left - 4) / len(columns.names), 36.0)
    drawn = [
        element("text", columns.label, x=left, y=12, class_="tick"),
        element("text", rows.label, x=2, y=28, class_="tick"),
    ]
    for number, name in enumerate(columns.names):
        drawn.append(element("text", name, x=left + (number + 0.5) * width, y=28, text_anchor="middle", class_="tick"))
    for number, name in enumerate(rows.names):
        top = 34 + number * tall
        drawn.append(element("text", name, x=left - 6, y=top + tall / 2 + 4, text_anchor="end", class_="tick"))
        drawn += [_cell(cell, left + i * width, top, width, tall) for i, cell in enumerate(cells[number])]
    whole, high = left + len(columns.names) * width + 4, 38 + len(rows.names) * tall
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *drawn,
        class_="plot",
        role="img",
        viewBox=f"0 0 {whole:.0f} {high:.0f}",
        style=f"min-width: {whole:.0f}px" if whole > WIDTH + 1 else None,
    )


def _cell(cell: Cell, x: float, y: float, width: float, tall: float) -> Markup:
    box = {"x": x, "y": y, "width": width, "height": tall}
    drawn: list[Markup] = [element("title", cell.told)] if cell.told else []
    if math.isfinite(cell.strength):
        opacity = FAINTEST + (STRONGEST - FAINTEST) * min(max(cell.strength, 0.0), 1.0)
        drawn.append(element("rect", **box, class_="heat", fill_opacity=opacity))
    drawn.append(element("rect", **box, class_="cell"))
    middle = {"x": x + width / 2, "text_anchor": "middle"}
    drawn.append(element("text", cell.text, y=y + (16 if cell.below else tall / 2 + 4), **middle))
    if cell.below:
        drawn.append(element("text", cell.below, y=y + 30, **middle, class_="small"))
    return element("g", *drawn)


class Bar(NamedTuple):
    """A bar with its name before it, and a text behind it."""

    name: str
    length: float
    text: str


def bar_chart(title: str, description: str, bars: Sequence[Bar], *, full: float) -> Markup:
    """Returns horizontal bars; one of length `full` takes all the room."""
    left, tall = 10 + 6.1 * max(len(bar.name) for bar in bars), 21.0
    room = WIDTH - left - 96
    drawn = []
    for number, bar in enumerate(bars):
        y = 4 + number * tall
        length = max(room * min(max(bar.length / full, 0.0), 1.0), 1.0)
        drawn.append(element("text", bar.name, x=left - 6, y=y + 14, text_anchor="end"))
        drawn.append(element("rect", x=left, y=y + 3, width=length, height=tall - 7, class_="mark c0"))
        drawn.append(element("text", bar.text, x=left + length + 5, y=y + 14, class_="tick"))
    high = 8 + len(bars) * tall
    axis = element("path", d=f"M{left:.1f} 2V{high - 2:.1f}", class_="axis")
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        joined(*drawn),
        axis,
        class_="plot",
        role="img",
        viewBox=f"0 0 {WIDTH:g} {high:.0f}",
    )
