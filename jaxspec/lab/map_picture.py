"""Figure of a report: the best tree of every batch and context."""

from __future__ import annotations

from typing import Any

from jaxspec.lab.findings import SearchFinding
from jaxspec.lab.search import Choice
from jaxspec.pages.charts import Cell, GridAxis, cell_grid
from jaxspec.pages.page import DataTable, Picture

COLUMNS = ["batch", "context", "nodes", "levels", "tau", "tokens/s", "plain tokens/s", "x plain", "tree"]


def map_picture(finding: SearchFinding, number: int) -> Picture:
    """Returns the best tree of each batch, across, and context, down, coloured by its gain over plain decoding."""
    most = max([1.0, *(speedup(choice) for choice in finding.cells.values())])
    cells = [[_cell(finding, (b, c), most) for b in finding.batches] for c in finding.contexts]
    caption = f"Best tree by batch and context: {finding.names.whole}"
    rows = [_row(choice) for choice in finding.cells.values()]
    rows += [[b, c, *[None] * 6, reason] for (b, c), reason in finding.refused.items()]
    note = "Nodes x levels, and tokens/s over plain decoding; the deeper the colour, the more."
    if finding.refused:
        note += f" {len(finding.refused)} of {len(rows)} lie beyond the costs or the memory (the table says why)."
    drawing = cell_grid(
        caption,
        f"{len(finding.cells)} batches and contexts; plain decoding is fastest at {len(plain_cells(finding))} of them",
        GridAxis("context", [f"{c:,}" for c in finding.contexts]),
        GridAxis("batch", [f"{b:,}" for b in finding.batches]),
        cells,
    )
    return Picture(f"map-{number}", caption, drawing, DataTable(caption, COLUMNS, rows), note, scrolls=True)


def speedup(choice: Choice) -> float:
    """Returns tokens a second of the chosen tree over those of plain decoding."""
    return choice.chosen.tokens_per_second.value / choice.plain.tokens_per_second.value


def plain_cells(finding: SearchFinding) -> list[tuple[int, int]]:
    """Returns the batches and contexts at which no tree pays."""
    return [cell for cell, choice in finding.cells.items() if not choice.chosen.shape]


def _cell(finding: SearchFinding, at: tuple[int, int], most: float) -> Cell:
    choice = finding.cells.get(at)
    where = f"batch {at[0]}, context {at[1]:,}"
    if choice is None:
        return Cell("–", told=f"{where}: {finding.refused[at]}")
    gain, tree = speedup(choice), choice.chosen.tree
    if tree.nodes == 1:
        return Cell("plain", "1x", 0.0, f"{where}: no tree pays")
    strength = max(gain - 1, 0.0) / (most - 1) if most > 1 else 0.0
    return Cell(f"{tree.nodes}x{tree.depth}", f"{gain:.2f}x", strength, f"{where}: {tree.spec}")


def _row(choice: Choice) -> list[Any]:
    chosen, plain = choice.chosen, choice.plain.tokens_per_second.value
    return [
        chosen.batch,
        chosen.context,
        chosen.tree.nodes,
        chosen.tree.depth,
        chosen.tau.value,
        chosen.tokens_per_second.value,
        plain,
        speedup(choice),
        chosen.tree.spec,
    ]
