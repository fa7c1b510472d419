"""Pictures of a page: PNGs of the whole and of every figure, by headless Chromium."""

from __future__ import annotations

from pathlib import Path

from jaxspec.console.disk import writing
from jaxspec.pages.chromium import open_page

SHARP = 2.0
"""Pixels of a picture for one of the page."""


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
