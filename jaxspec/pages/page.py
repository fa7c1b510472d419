"""Blocks of a page: the document, its sections, tables, figures with their table behind, and lists of facts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.console.tables import cell
from jaxspec.pages.markup import Content, Markup, element, joined
from jaxspec.pages.style import STYLE

LONG = 40
"""Letters from which a cell may break."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy: the page loads nothing, and runs nothing but a script whose hash is added."""


class Section(NamedTuple):
    """A part of a page with a heading."""

    anchor: str
    """Its name in links: letters, digits and `-`."""
    title: str
    content: Markup


class DataTable(NamedTuple):
    """Rows of values under named columns; the first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """Texts, numbers, None and NaN, which become a dash."""


class Picture(NamedTuple):
    """A drawing and what stands beside it."""

    anchor: str
    """Its name in links, and of its PNG."""
    caption: str
    drawing: Markup
    table: DataTable
    """The numbers that are drawn."""
    note: Content = None
    legend: Markup | None = None
    wide: bool = False
    """Whether it takes the whole width of the page."""
    scrolls: bool = False
    """Whether the drawing may be wider than a phone, and scrolls sideways then."""
    more: Markup | None = None
    """More below all that."""


class Extras(NamedTuple):
    """Parts of a page that most pages lack."""

    style: str = ""
    script: str = ""
    """JavaScript of ours, which the policy allows by its hash; texts of others never stand in it."""
    data: Any = None
    """Values that programs may read from the page: JSON in the element `data`."""


def document(
    title: str, lead: Markup, sections: Sequence[Section], foot: Content = None, extras: Extras | None = None
) -> str:
    """Returns a whole page: title, `lead` below it, links to the sections, and the sections."""
    extras = Extras() if extras is None else extras
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy(extras.script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(STYLE + extras.style)),
    )
    links = [element("li", element("a", s.title, href=f"#{s.anchor}")) for s in sections]
    body = element(
        "body",
        element("a", "Skip to the results", class_="skip", href="#results"),
        element("header", element("h1", title), lead, element("nav", element("ul", *links), aria_label="Sections")),
        element("main", *map(_section, sections), id="results"),
        None if foot is None else element("footer", foot),
        None if extras.data is None else _data(extras.data),
        element("script", Markup(extras.script)) if extras.script else None,
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def policy(script: str) -> str:
    """Returns the content security policy of a page with this script, which may be empty."""
    if not script:
        return POLICY
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"{POLICY}; script-src 'sha256-{digest}'"


def _data(value: Any) -> Markup:
    # No text in it can end the element, or begin another, without a `<`.
    text = json.dumps(value, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    return element("script", Markup(text), type="application/json", id="data")


def _section(section: Section) -> Markup:
    heading = element("h2", section.title, id=f"{section.anchor}-title")
    return element("section", heading, section.content, id=section.anchor, aria_labelledby=f"{section.anchor}-title")


def paragraph(*content: Content, soft: bool = False) -> Markup:
    """Returns a paragraph; a `soft` one stands back."""
    return element("p", *content, class_="soft" if soft else None)


def bullets(items: Iterable[Content]) -> Markup:
    """Returns a list."""
    return element("ul", *(element("li", item) for item in items), class_="answers")


def table(shown: DataTable) -> Markup:
    """Returns a table that scrolls by itself where it is too wide, by the keyboard too."""
    numeric = [any(_is_number(row[i]) for row in shown.rows) for i in range(len(shown.columns))]
    head = [
        element("th", name, scope="col", class_="number" if n else None)
        for name, n in zip(shown.columns, numeric, strict=True)
    ]
    rows = [element("tr", *(_cell(i, value, numeric[i]) for i, value in enumerate(row))) for row in shown.rows]
    inner = element(
        "table",
        element("caption", shown.caption),
        element("thead", element("tr", *head)),
        element("tbody", *rows),
    )
    return scrolled(inner, shown.caption)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _cell(place: int, value: Any, numeric: bool) -> Markup:
    text = value if isinstance(value, Markup) else cell(value)
    if place == 0:
        return element("th", text, scope="row", class_="number" if numeric else None)
    return element("td", text, class_="number" if numeric else "long" if len(text) > LONG else None)


def scrolled(content: Markup, label: str) -> Markup:
    """Returns content in a box that scrolls sideways."""
    return element("div", content, class_="scroll", role="region", tabindex=0, aria_label=label)


def folded(summary: str, *content: Content) -> Markup:
    """Returns content behind a line that opens it."""
    return element("details", element("summary", summary), *content)


def figure(picture: Picture) -> Markup:
    """Returns a figure: caption, legend, drawing, note, and the table behind it."""
    return element(
        "figure",
        element("figcaption", picture.caption),
        picture.legend,
        scrolled(picture.drawing, picture.caption) if picture.scrolls else picture.drawing,
        None if picture.note is None else element("p", picture.note),
        folded("The numbers", table(picture.table)),
        picture.more,
        id=picture.anchor,
        class_="wide" if picture.wide else None,
    )


def grid(pictures: Sequence[Picture]) -> Markup:
    """Returns figures side by side as far as the page is wide."""
    return element("div", *map(figure, pictures), class_="grid")


def facts(known: Iterable[tuple[str, Content]]) -> Markup:
    """Returns a list of names and values."""
    return element("dl", *(joined(element("dt", name), element("dd", value)) for name, value in known))
