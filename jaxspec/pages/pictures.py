"""Pages written to disk, and their pictures: PNGs of the whole and of every figure, by headless Chromium."""

from __future__ import annotations

import sys
from pathlib import Path

from jaxspec.console.disk import writing
from jaxspec.pages.chromium import find_chromium, open_page

SHARP = 2.0
"""Pixels of a picture for one of the page."""


def check_page_flags(out: Path, png: Path | None) -> None:
    """Raises ValueError for a page that is none by its name, or for pictures where Chromium is missing."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{out} must end in .html, for it is a page")
    if png is not None and find_chromium() is None:
        raise ValueError("--png needs Chromium, and none is installed: install it, or leave out --png")


def write_page(out: Path, page: str, png: Path | None) -> list[Path]:
    """Writes a page, and its pictures if a folder for them is given; says so, and returns the pictures' paths."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with writing(out):
        out.write_text(page, encoding="utf-8")
    sys.stdout.write(f"{out}: the page\n")
    pictures = [] if png is None else take_pictures(out, png)
    if pictures:
        sys.stdout.write(f"{png}: {len(pictures)} pictures\n")
    return pictures


def take_pictures(page: Path, folder: Path) -> list[Path]:
    """Writes PNGs of the whole page and of every figure, named by its anchor; returns their paths.

    Figures in a closed part of the page are opened. Raises ValueError where Chromium is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with open_page(page, scale=SHARP) as shown:
        shown.evaluate("document.querySelectorAll('details:has(figure)').forEach(part => { part.open = true })")
        anchors = shown.evaluate("Array.from(document.querySelectorAll('figure')).map(figure => figure.id)")
        for name, selector in {"page": "html", **{anchor: f"#{anchor}" for anchor in anchors}}.items():
            path = folder / f"{name}.png"
            with writing(path):
                path.write_bytes(shown.picture(selector))
            found.append(path)
    return found
