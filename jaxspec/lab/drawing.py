"""Draft trees as text."""

from __future__ import annotations

from collections.abc import Mapping

from jaxspec.lab.forest import Path, Shape

MOST_LINES = 40
"""Nodes that a drawing shows."""


def draw(shape: Shape, share: Mapping[Path, float], most: int = MOST_LINES) -> str:
    """Returns a drawing with a line a node: its rank among its siblings, and the share of rounds that accept it.

    Of a larger tree the likeliest nodes are drawn, and the last line counts the others.
    """
    kept = {(), *sorted(shape, key=lambda path: (-share[path], len(path), path))[: most - 1]}
    # A parent is as likely as its child at least, and shallower, so it is kept with it.
    lines = ["root"]
    _draw_below((), "", sorted(kept - {()}), share, lines)
    if len(shape) + 1 > len(kept):
        lines.append(f"and {len(shape) + 1 - len(kept)} nodes that fewer rounds accept")
    return "\n".join(lines)


def _draw_below(path: Path, margin: str, paths: list[Path], share: Mapping[Path, float], lines: list[str]) -> None:
    """Adds the lines of all nodes below a path."""
    children = [p for p in paths if p[:-1] == path]
    for child in children:
        last = child == children[-1]
        lines.append(f"{margin}{'└' if last else '├'}─ {child[-1]}  {100 * share[child]:.1f} %")
        _draw_below(child, margin + ("   " if last else "│  "), paths, share, lines)
