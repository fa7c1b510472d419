"""The cost of a round of speculative decoding: seconds of its parts, measured, compiled or by the roofline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.console.disk import writing
from jaxspec.console.results import json_text

SOURCES = ("measured", "compiled", "roofline")
"""Where a figure is from: a clock on this machine; a compiler's cycles and traffic for a chip; bytes and FLOPs."""
PARTS = ("plain", "verify", "draft", "extend", "rest")
"""Parts of a round. `plain`: a whole round of plain decoding, its call `nodes` rows wide: 1, or 8 with padding.
`verify`: the target's call on `nodes` nodes, and the rule that accepts a path. `draft`: one level of drafting, of
`width` nodes expanded together, and the choice of their children; a drafter of one pass pays it once a round.
`extend`: the drafter reads the accepted path of `nodes` nodes, once a round; it drafts the root's children. `rest`: the
commit and the loop."""

SOURCE_NOTES = {
    "measured": "measured: median of loops on this machine, all parts of a batch and context in turns",
    "compiled": "compiled: not run; ",
    "roofline": "roofline: not run; bytes at the bandwidth or FLOPs at the peak, and nothing is faster than that",
}
"""The sources in words; of a compiled table the fact `method` follows."""
PART_NOTES = """\
plain: a whole round of plain decoding, one row or padded to 8; verify: the target's call on so many nodes, and the rule
draft: one level of so many nodes together, and the choice of the children of each; extend: the drafter reads a path
rest: commit and loop; what the parts leave of a whole round, 0 where fusion saves more than that; by the roofline the
commit's bytes"""


class CostRow(NamedTuple):
    """Seconds of one part of a round."""

    source: str
    device: str
    part: str
    nodes: int
    """Nodes a row, root included: of the tree, of `extend` those of the accepted path; 1 where they do not matter."""
    width: int
    """Nodes of a level that are expanded together; 0 where the part does not depend on it."""
    batch: int
    context: int
    """Committed tokens of a row."""
    seconds: float

    @property
    def place(self) -> tuple[str, int, int, int, int]:
        """The part and its sizes: what a row of another source is compared by."""
        return self.part, self.nodes, self.width, self.batch, self.context


@dataclasses.dataclass(frozen=True)
class CostTable:
    """Cost rows of one device and source, and the facts they were made with."""

    rows: tuple[CostRow, ...]
    facts: dict[str, Any]
    """`target`, `drafter`, `dtype`, `source`, `device`, `mesh`, and whatever else a reader needs; JSON."""

    def save(self, path: Path) -> None:
        """Writes a JSON file."""
        value = {"format": FORMAT, **self.facts, "rows": [row._asdict() for row in self.rows]}
        with writing(path):
            path.write_text(json_text(value, indent=1) + "\n", encoding="utf-8")


FORMAT = "jaxspec costs 1"


def load_costs(path: Path) -> CostTable:
    """Returns the costs of a file. Raises ValueError where it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        known = value.pop("format", None)
        rows = tuple(CostRow(**row) for row in value.pop("rows"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file of costs; make one with `jaxspec lab cost`") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: holds no costs ({error}); make a file with `jaxspec lab cost`") from error
    if known != FORMAT or any(row.part not in PARTS or row.source not in SOURCES for row in rows):
        raise ValueError(f"{path}: holds no costs of this version; make a file with `jaxspec lab cost`")
    return CostTable(rows, value)


class Difference(NamedTuple):
    """The difference of one part's rows from those of another source."""

    part: str
    points: int
    """Rows that both have."""
    ratio: float
    """Median of the seconds by the other's."""
    median_error: float
    """Median of `|ratio - 1|`."""
    worst_error: float
    """Of the row that is farthest off, `ratio - 1`."""
    worst: CostRow
    """That row."""


def differences(rows: Sequence[CostRow], against: Sequence[CostRow]) -> list[Difference]:
    """Returns how far `rows` are from those of another source, part by part, where both have a figure above 0."""
    known = {row.place: row.seconds for row in against if row.seconds > 0}
    found = []
    for part in PARTS:
        mine = [row for row in rows if row.part == part and row.place in known]
        if mine:
            ratios = np.asarray([row.seconds / known[row.place] for row in mine])
            errors = np.abs(ratios - 1)
            worst = int(np.argmax(errors))
            medians = float(np.median(ratios)), float(np.median(errors))
            found.append(Difference(part, len(mine), *medians, float(ratios[worst] - 1), mine[worst]))
    return found
