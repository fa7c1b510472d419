"""A draft tree as SVG: levels from left to right, as thick as the share of rounds that reach a node."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxspec.lab.forest import Path, Shape
from jaxspec.pages.markup import Markup, element, joined
from jaxspec.pages.page import DataTable, Picture, folded
from jaxspec.trees import StaticTree

MOST_DRAWN = 64
"""Nodes of a drawing; of a larger tree the likeliest are drawn."""
ACROSS, DOWN, LEAF_DOWN = 52.0, 25.0, 15.0
"""Distance of levels; height of a row, and of one that is a leaf alone, whose name stands beside it."""
MARGIN = 22.0


def tree_picture(anchor: str, caption: str, shape: Shape, shares: Mapping[Path, float]) -> Picture:
    """Returns the figure of a tree with the share of rounds that accept each node; 1 for the root."""
    kept = {(), *sorted(shape, key=lambda path: (-shares[path], len(path), path))[: MOST_DRAWN - 1]}
    left_out = len(shape) + 1 - len(kept)
    note = "Circles and numbers: the share of rounds that reach a node. Levels go right; siblings down, by rank from 0"
    note += "; rN: the rank is N, where ranks before it are left out." if _gaps(shape) else "."
    note += f" {left_out} nodes that fewer rounds reach are not drawn." if left_out else ""
    rows = [[_named(path), len(path), path[-1] if path else "-", shares[path]] for path in ((), *shape)]
    table = DataTable(f"Nodes of the tree: {caption}", ["path of ranks", "depth", "rank", "share of rounds"], rows)
    spec = folded("As --tree takes it", element("pre", StaticTree(shape).spec))
    return Picture(anchor, caption, _drawing(caption, kept, shares), table, note, scrolls=True, more=spec)


def _gaps(shape: Shape) -> bool:
    known = set(shape)
    return any(path[-1] and (*path[:-1], path[-1] - 1) not in known for path in shape)


def _named(path: Path) -> str:
    return ".".join(map(str, path)) or "root"


def _drawing(caption: str, kept: set[Path], shares: Mapping[Path, float]) -> Markup:
    place = layout(kept)
    deepest = max(level for level, _ in place.values())
    top = _tops([row for _, row in place.values()])
    width, high = 2.4 * MARGIN + max(deepest, 1) * ACROSS, 1.5 * MARGIN + top[-1]
    at = {path: (MARGIN + level * ACROSS, MARGIN + top[row]) for path, (level, row) in place.items()}
    edges = [_edge(at[path[:-1]], at[path], shares[path]) for path in sorted(kept) if path]
    alone = [row for _, row in place.values()]
    nodes = [_node(path, at[path], shares[path], kept, alone.count(place[path][1]) == 1) for path in sorted(kept)]
    return element(
        "svg",
        element("title", f"{caption}: a tree of {len(kept)} nodes"),
        element("desc", f"{deepest} levels from left to right; the table below the drawing lists all nodes"),
        *edges,
        *nodes,
        class_="plot",
        role="img",
        viewBox=f"0 0 {width:.0f} {high:.0f}",
        style=f"min-width: {width:.0f}px; max-width: {1.25 * width:.0f}px",
    )


def layout(paths: set[Path]) -> dict[Path, tuple[int, int]]:
    """Returns the level and row of each node: a first child in its parent's row, each other one below all before it."""
    found: dict[Path, tuple[int, int]] = {}
    row = 0
    for path in sorted(paths):  # a node stands right before what is below it
        parent = path[:-1]
        if path and any(other[:-1] == parent for other in found if other):
            row += 1
        found[path] = len(path), row
    return found


def _tops(row_of_nodes: list[int]) -> list[float]:
    """Returns the place of each row: rows of several nodes have room for names above them."""
    tops = [0.0]
    for row in range(1, max(row_of_nodes) + 1):
        tops.append(tops[-1] + (LEAF_DOWN if row_of_nodes.count(row) == 1 else DOWN))
    return tops


def _edge(above: tuple[float, float], below: tuple[float, float], share: float) -> Markup:
    (x0, y0), (x1, y1) = above, below
    bend = x0 + 0.5 * (x1 - x0)
    curve = f"M{x0:.1f} {y0:.1f}C{bend:.1f} {y0:.1f} {x0:.1f} {y1:.1f} {bend:.1f} {y1:.1f}L{x1:.1f} {y1:.1f}"
    return element("path", d=curve, class_="edge", stroke_width=0.8 + 5 * share)


def _node(path: Path, at: tuple[float, float], share: float, kept: set[Path], alone: bool) -> Markup:
    (x, y), rank = at, path[-1] if path else 0
    told = f"{_named(path)}: depth {len(path)}, reached in {100 * share:.2f} % of rounds"
    name = f"{100 * share:.0f}%" if share >= 0.0095 or not share else f"{100 * share:.1f}%"
    if rank and (*path[:-1], rank - 1) not in kept:
        name += f" r{rank}"
    radius = 2.2 + 5 * math.sqrt(share)
    beside = {"x": x + radius + 3, "y": y + 3.5}
    above = {"x": x, "y": y - radius - 2.5, "text_anchor": "middle"}
    return element(
        "g",
        element("title", told),
        element("circle", cx=x, cy=y, r=radius, class_="mark c0"),
        joined(element("text", name, **(beside if alone else above), class_="tick halo")),
    )
