"""Checks of pages that several tests make: whether elements are closed, what a page loads, which plots have a table."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from jaxspec.pages.chromium import open_page
from jaxspec.pages.markup import VOID

LOADING = {"src", "href", "srcset", "data", "action", "poster"}
"""Attributes whose address a browser may load."""


class PageReader(HTMLParser):
    """Reads a page; asserts that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), (tag, attrs)
        self.names.append(tag)
        self.attributes.append((tag, given))
        self.ids += [str(given["id"])] if "id" in given else []
        self.loads += [str(value) for name, value in attrs if name in LOADING]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


def check_page(text: str, *, scripts: int = 0) -> PageReader:
    """Returns a page as it is read. It must be whole, load nothing, and have a plot and a table a figure.

    `scripts` are those that it must have, data among them.
    """
    assert text.startswith("<!DOCTYPE html>\n<html")
    read = PageReader(text)
    assert len(set(read.ids)) == len(read.ids)
    assert not [address for address in read.loads if not address.startswith(("#", "data:"))]
    assert {address[1:] for address in read.loads if address.startswith("#")} <= set(read.ids)
    assert read.names.count("script") == scripts
    assert not {"iframe", "object", "embed", "img"} & set(read.names)
    assert "url(" not in text and "@import" not in text
    for figure in text.split("<figure")[1:]:
        inside = figure.split("</figure>")[0]
        assert inside.count('role="img"') == 1 and inside.count("<table>") == 1 and "<details>" in inside
        svg = inside[inside.index('<svg class="plot"') if '<svg class="plot"' in inside else 0 :]
        assert "<title>" in svg and "<desc>" in svg
    return read


def check_in_chromium(path: Path, *, width: int, dark: bool) -> bytes:
    """Returns a page's picture, once it fits a window of this width and nothing complains."""
    with open_page(path, width=width, dark=dark) as shown:
        assert not shown.complaints
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        paper = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(json.loads(paper.replace("rgb(", "[").replace(")", "]"))) < 200) == dark
        # Numbers in a plot are as large as a phone's reader needs, and no text leaves its plot.
        smallest = shown.evaluate(
            "Math.min(...Array.from(document.querySelectorAll('figure svg.plot text')).map(t => "
            "parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getScreenCTM().a))"
        )
        assert smallest >= 8.5
        shown.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        picture = shown.picture()
        assert not shown.complaints
    assert picture.startswith(b"\x89PNG")
    return picture
