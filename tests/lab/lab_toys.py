"""Costs that the tests of the tree lab share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxspec.lab.cost_model import RoundCost
from jaxspec.lab.costs import CostRow, CostTable

ROW = (0.7, 0.1, 0.05, 0.03, 0.02, 0.01, 0.01, 0.005)
"""The rank row of the specification's toy search."""


def ridge_cost(ridge: float, batch: int, *, nodes: int = 128, level: float = 0.06, step: int = 8) -> RoundCost:
    """Returns a cost in units of reading the weights, on stairs of `step` rows."""
    size_N = np.arange(nodes + 1)
    verify_N = np.maximum(1.0, -(-size_N // step) * step * batch / ridge)
    level_W = np.concatenate([[0.0], np.full(64, level)])
    return RoundCost(batch, 512, 1.05, verify_N, level_W, np.full(10, level), 0.05)


def cost_table(
    batches: Sequence[int] = (1, 4, 16), contexts: Sequence[int] = (512, 2048), **facts: object
) -> CostTable:
    """Returns a table of the roofline's kind: verification rises where arithmetic passes the weights."""
    rows = []
    for batch in batches:
        for context in contexts:
            read = 1e-2 * (1 + batch * context / 122_000)
            at = batch, context
            rows += [_row("verify", n, 0, at, max(read, 1e-2 * n * batch / 240)) for n in (1, 2, 4, 8, 16, 32, 64)]
            rows += [_row("draft", 1, w, at, 6e-4 + 1e-6 * w * batch) for w in (1, 2, 4, 8)]
            rows += [_row("extend", 1, 0, at, 6e-4), _row("plain", 1, 0, at, read + 5e-4)]
        rows.append(_row("rest", 1, 0, (batch, 0), 5e-4))
    made = {"source": "roofline", "device": "toy", "target": "t", "drafter": "d", "dtype": "bf16", **facts}
    return CostTable(tuple(rows), made)


def _row(part: str, nodes: int, width: int, at: tuple[int, int], seconds: float) -> CostRow:
    return CostRow("roofline", "toy", part, nodes, width, *at, seconds)


def times(table: CostTable, factor: float) -> CostTable:
    """Returns the table with all seconds times `factor`."""
    assert math.isfinite(factor)
    return CostTable(tuple(row._replace(seconds=row.seconds * factor) for row in table.rows), table.facts)
