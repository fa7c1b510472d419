"""Line plots and scatter plots as SVG: series told apart by colour, dashes and the shape of their marks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxspec.pages.axes import Axis
from jaxspec.pages.markup import Markup, element, joined
from jaxspec.pages.style import COLOURS

WIDTH, HEIGHT = 360.0, 236.0
"""Units of a plot: pixels on a phone, so that text is as large as it is set."""
LEFT, RIGHT, TOP, BOTTOM = 46.0, 18.0, 20.0, 36.0
DASHES = (None, "7 3", "2 2.5", "8 3 2 3")
CROWDED = 24
"""Points from which a line shows its marks no more."""


class Series(NamedTuple):
    """Points of one kind; those that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """Lower ends of intervals."""
    high: Sequence[float] | None = None
    joined: bool = True
    """Whether a line joins the points; else each has a whisker in the place of a band."""
    best: tuple[float, float] | None = None
    """A point that is ringed."""
    best_name: str = ""
    look: int | None = None
    """Number of its colour, dashes and mark; None: its place among the series."""


class Reference(NamedTuple):
    """A thin line to compare with."""

    name: str
    x: tuple[float, float]
    y: tuple[float, float]


class Frame(NamedTuple):
    """The axes of a plot, and where their values stand in it."""

    x: Axis
    y: Axis

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Returns the place of a point in the drawing."""
        across = LEFT + self.x.place(x) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - self.y.place(y) * (HEIGHT - TOP - BOTTOM)


def line_plot(
    title: str, description: str, frame: Frame, series: Sequence[Series], references: Sequence[Reference] = ()
) -> Markup:
    """Returns a plot; `title` and `description` are for those who do not see it."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        _axes(frame),
        *(_reference(frame, reference) for reference in references),
        *(_band(frame, _look(number, one), one) for number, one in enumerate(series)),
        *(_line(frame, _look(number, one), one) for number, one in enumerate(series)),
        *_rings(frame, series),
        class_="plot",
        role="img",
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
    )


def legend(names: Sequence[str], looks: Sequence[int] | None = None) -> Markup | None:
    """Returns the names of series, each with its line and mark (by default those of its place); None for one alone."""
    if len(names) < 2:
        return None
    looks = range(len(names)) if looks is None else looks
    items = [element("li", _swatch(look), name) for name, look in zip(names, looks, strict=True)]
    return element("ul", *items, class_="legend")


def legend_of(series: Sequence[Series]) -> Markup | None:
    """Returns the legend of series as a plot draws them; None for one alone."""
    return legend([one.name for one in series], [_look(number, one) for number, one in enumerate(series)])


def _look(number: int, one: Series) -> int:
    return number if one.look is None else one.look


def _swatch(number: int) -> Markup:
    line = element("path", d="M1 7H29", class_=f"line c{number % COLOURS}", stroke_dasharray=_dash(number))
    return element("svg", line, mark(number, 15, 7), viewBox="0 0 30 14", aria_hidden="true")


def _dash(number: int) -> str | None:
    return DASHES[number % len(DASHES)]


def _axes(frame: Frame) -> Markup:
    (left, bottom), (right, top) = frame.at(frame.x.low, frame.y.low), frame.at(frame.x.high, frame.y.high)
    drawn = []
    for tick in frame.y.ticks:
        _, y = frame.at(frame.x.low, tick)
        drawn.append(element("path", d=f"M{left:.1f} {y:.1f}H{right:.1f}", class_="rule"))
        drawn.append(element("text", frame.y.name(tick), x=left - 5, y=y + 3.5, text_anchor="end", class_="tick"))
    for tick in frame.x.ticks:
        x, _ = frame.at(tick, frame.y.low)
        drawn.append(element("path", d=f"M{x:.1f} {bottom:.1f}v4", class_="axis"))
        drawn.append(element("text", frame.x.name(tick), x=x, y=bottom + 15, text_anchor="middle", class_="tick"))
    drawn.append(element("path", d=f"M{left:.1f} {bottom:.1f}H{right:.1f}", class_="axis"))
    drawn.append(element("text", frame.x.label, x=(left + right) / 2, y=HEIGHT - 4, text_anchor="middle"))
    drawn.append(element("text", frame.y.label, x=4, y=top - 9))
    return joined(*drawn)


def _reference(frame: Frame, reference: Reference) -> Markup:
    (x0, y0), (x1, y1) = (frame.at(x, y) for x, y in zip(reference.x, reference.y, strict=True))
    line = element("path", d=f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}", class_="reference")
    # At the top edge the name would stand in the title of the axis.
    x, y, anchor = (x1 + 3, y1 + 11, "start") if y1 < TOP + 8 and x1 < WIDTH - RIGHT - 30 else (x1 - 2, y1 - 4, "end")
    name = element("text", reference.name, x=x, y=y, text_anchor=anchor, class_="tick halo")
    return joined(line, name)


def _known(one: Series) -> list[int]:
    return [i for i, (x, y) in enumerate(zip(one.x, one.y, strict=True)) if math.isfinite(x) and math.isfinite(y)]


def _band(frame: Frame, number: int, one: Series) -> Markup | None:
    """Returns the intervals of a series: a band of a line, whiskers of points."""
    if one.low is None or one.high is None:
        return None
    low, high, colour = one.low, one.high, f"c{number % COLOURS}"
    known = [i for i in _known(one) if math.isfinite(low[i]) and math.isfinite(high[i])]
    ends = [(frame.at(one.x[i], low[i]), frame.at(one.x[i], high[i])) for i in known]
    if not one.joined:
        d = "".join(
            f"M{x:.1f} {y0:.1f}V{y1:.1f}M{x - 3:.1f} {y0:.1f}h6M{x - 3:.1f} {y1:.1f}h6" for (x, y0), (_, y1) in ends
        )
        return element("path", d=d, class_=f"whisker {colour}")
    around = [above for _, above in ends] + [below for below, _ in reversed(ends)]
    return element("path", d=_path(around) + "Z", class_=f"band {colour}") if around else None


def _line(frame: Frame, number: int, one: Series) -> Markup:
    known = _known(one)
    points = [frame.at(one.x[i], one.y[i]) for i in known]
    drawn = []
    if one.joined and points:
        drawn.append(
            element("path", d=_path(points), class_=f"line c{number % COLOURS}", stroke_dasharray=_dash(number))
        )
    if not one.joined or len(points) <= CROWDED:
        drawn += [mark(number, x, y) for x, y in points]
    return joined(*drawn)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def mark(number: int, x: float, y: float) -> Markup:
    """Returns a mark: a dot, square, triangle or diamond, by the number of the series."""
    shapes = (
        "m-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z",
        "m-3 -3h6v6h-6z",
        "m0 -4l4 7h-8z",
        "m0 -4.2l4.2 4.2l-4.2 4.2l-4.2 -4.2z",
    )
    return element("path", d=f"M{x:.1f} {y:.1f}{shapes[number % len(shapes)]}", class_=f"mark c{number % COLOURS}")


def _rings(frame: Frame, series: Sequence[Series]) -> list[Markup]:
    """Returns a ring around the best point of each series, with its name above, where no other name stands."""
    drawn: list[Markup] = []
    names: list[tuple[float, float]] = []
    for one in series:
        if one.best is None:
            continue
        x, y = frame.at(*one.best)
        drawn.append(element("circle", cx=x, cy=y, r=5.6, class_="ring"))
        inside = min(max(x, LEFT + 14), WIDTH - RIGHT - 14)
        if all(abs(inside - other) > 18 or abs(y - height) > 12 for other, height in names):
            names.append((inside, y))
            drawn.append(element("text", one.best_name, x=inside, y=y - 9, text_anchor="middle", class_="strong halo"))
    return drawn
