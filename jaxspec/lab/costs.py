"""The cost of a round of speculative decoding: seconds of its parts, measured, compiled or by the roofline."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.console.disk import writing

SOURCES = ("measured", "compiled", "roofline")
"""Where a figure is from: a clock on this machine; a compiler's cycles and traffic for a chip; bytes and FLOPs."""
PARTS = ("plain", "verify", "draft", "extend", "rest")
"""Parts of a round. `plain`: a whole round of plain decoding. `verify`: the target's call on `nodes` nodes, and the
rule that accepts a path. `draft`: one level of drafting, of `width` nodes expanded together. `extend`: the drafter
reads what was accepted, once a round; it drafts the root's children. `rest`: the commit and the loop."""


class CostRow(NamedTuple):
    """Seconds of one part of a round."""

    source: str
    device: str
    part: str
    nodes: int
    """Nodes a row, root included; 1 where the part does not depend on them."""
    width: int
    """Nodes of a level that are expanded together; 0 where the part does not depend on it."""
    batch: int
    context: int
    """Committed tokens of a row."""
    seconds: float


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
            path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


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
