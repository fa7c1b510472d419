"""The cost of a round as a function of the tree, from a table of costs at some sizes.

Between two sizes of the table a time is the straight line between theirs; no line is fitted through more than two, and
none reaches over the end of a step that the table has. In the context a time is a straight line too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxspec.lab.costs import CostRow, CostTable

REACH = 2.0
"""Most that a size may lie above the greatest of the table, or below its least, as a factor."""


@dataclasses.dataclass(frozen=True)
class RoundCost:
    """Seconds of the parts of a round for one batch and context."""

    batch: int
    context: int
    plain: float
    """A round of plain decoding."""
    verify_N: np.ndarray
    """The target's call on `n` nodes a row; 0 is unused."""
    other_N: np.ndarray
    """The rest of a round with `n` nodes: the drafter's `extend`, commit and loop; 0 is unused."""
    level_W: np.ndarray
    """A draft level that expands `w` nodes a row; 0 for none."""

    @property
    def most_nodes(self) -> int:
        """Nodes of the largest tree whose cost is known."""
        return len(self.verify_N) - 1

    def round_seconds(self, nodes_S: np.ndarray, width_SD: np.ndarray) -> np.ndarray:
        """Returns `[S]`: seconds of a round of trees with these nodes, root included, and widths of levels.

        A tree of one node is plain decoding. Raises ValueError for sizes beyond the cost's.
        """
        nodes_S = np.asarray(nodes_S)
        if nodes_S.size and nodes_S.max() > self.most_nodes:
            raise ValueError(f"the cost of {nodes_S.max()} nodes is not known: give a table that goes beyond")
        if width_SD.size and width_SD.max() >= len(self.level_W):
            raise ValueError(f"the cost of a level of {width_SD.max()} nodes is not known: give a table beyond it")
        drafted_S = self.verify_N[nodes_S] + self.other_N[nodes_S] + self.level_W[width_SD].sum(1)
        return np.where(nodes_S == 1, self.plain, drafted_S)

    def scaled(self, *, draft: float = 1.0, target: float = 1.0, other: float = 1.0) -> RoundCost:
        """Returns the cost with parts times these factors; plain decoding is the target's."""
        return dataclasses.replace(
            self,
            plain=self.plain * target,
            verify_N=self.verify_N * target,
            other_N=self.other_N * other,
            level_W=self.level_W * draft,
        )


def round_cost(
    table: CostTable, batch: int, context: int, *, nodes: int | None = None, width: int | None = None
) -> RoundCost:
    """Returns the cost of rounds of up to `nodes` nodes and levels of `width`.

    By default `nodes` is the greatest of the table, and `width` as far as it reaches beyond its own.

    A table whose facts have `node_step` costs a tree as the next multiple of it. Draft levels may be missing where
    `one_pass` is among the facts: all levels come from one pass, which is part of `extend`. Raises ValueError for a
    batch, context or size more than `REACH` times off the table, and for parts that are missing.
    """
    if len({(row.source, row.device) for row in table.rows}) > 1:
        raise ValueError("the costs are of several devices or sources: keep the rows of one in a file")
    nodes = greatest(table, "verify") if nodes is None else nodes
    if width is None:
        width = int(REACH * greatest(table, "draft")) or nodes
    step = int(table.facts.get("node_step", 1))
    size_N = np.maximum(-(-np.arange(nodes + 1) // step) * step, 1)
    size_N = np.minimum(size_N, max(greatest(table, "verify"), nodes))
    at = batch, context
    verify_N = _seconds(table, "verify", at, size_N)
    extend_N, rest_N = (_seconds(table, part, at, size_N, varies=False) for part in ("extend", "rest"))
    level_W = np.zeros(width + 1)
    if any(row.part == "draft" for row in table.rows):
        level_W[1:] = _seconds(table, "draft", at, np.arange(1, width + 1))
    elif not table.facts.get("one_pass"):
        raise ValueError("the costs have no rows of the part draft: make them anew with `jaxspec lab cost`")
    plain_1 = _seconds(table, "plain", at, np.ones(1, int), varies=False)
    # Without rows of its own, plain decoding is the target's call on one node and the rest.
    plain = float(plain_1[0]) or float(verify_N[1] + rest_N[1])
    return RoundCost(batch, context, plain, verify_N, extend_N + rest_N, level_W)


def greatest(table: CostTable, part: str) -> int:
    """Returns the greatest number of nodes that a table has of a part, of a level for `draft`; 0 for a missing part."""
    return max((_size(row) for row in table.rows if row.part == part), default=0)


def grid(table: CostTable) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the batches and the contexts at which a table has verification."""
    rows = [row for row in table.rows if row.part == "verify"]
    return tuple(sorted({row.batch for row in rows})), tuple(sorted({row.context for row in rows}))


SIZE = {"draft": "width"}
"""Size that a part's time depends on, where that is not `nodes`."""


def _size(row: CostRow) -> int:
    return row.width if row.part == "draft" else row.nodes


def _seconds(
    table: CostTable, part: str, at: tuple[int, int], size_N: np.ndarray, *, varies: bool = True
) -> np.ndarray:
    """Returns the seconds of a part at these sizes: by context first, then by size, then by batch."""
    rows = [row for row in table.rows if row.part == part]
    if not rows:
        if not varies:
            return np.zeros(len(size_N))
        raise ValueError(f"the costs have no rows of the part {part}: make them anew with `jaxspec lab cost`")
    batch, context = at
    by_batch = {}
    for each, mine in _groups(rows, "batch"):
        by_size = {size: _at_context(same, context, part) for size, same in _groups(mine, SIZE.get(part, "nodes"))}
        if len(by_size) == 1 and not varies:
            by_batch[each] = np.full(len(size_N), next(iter(by_size.values())))
            continue
        sizes, seconds = np.array([*by_size]), np.array([*by_size.values()])
        _check_reach(sizes[-1:], size_N.max(), f"a {part} of {size_N.max()} nodes")
        by_batch[each] = _line(sizes, seconds, size_N)
    batches = np.array([*by_batch])
    if len(batches) == 1 and batch != batches[0]:
        raise ValueError(f"the costs of the part {part} are of batch {batches[0]} alone, not {batch}: cost that too")
    _check_reach(batches, batch, f"a batch of {batch}")
    return _line(batches, np.array([*by_batch.values()]), np.array([batch]))[0]


def _at_context(rows: Iterable[CostRow], context: int, part: str) -> float:
    """Returns the seconds at a context; rows of context 0 are of any."""
    by_context = {c: float(np.median([row.seconds for row in same])) for c, same in _groups(rows, "context")}
    contexts = np.array([*by_context])
    if contexts[-1] > 0:
        _check_reach(contexts, context, f"a context of {context} tokens in the part {part}")
    return float(_line(contexts, np.array([*by_context.values()]), np.array([context]))[0])


def _groups(rows: Iterable[CostRow], field: str) -> list[tuple[int, list[CostRow]]]:
    """Returns rows by the value of a field, ascending."""
    found: dict[int, list[CostRow]] = {}
    for row in rows:
        found.setdefault(int(getattr(row, field)), []).append(row)
    return sorted(found.items())


def _check_reach(known: np.ndarray, asked: int, what: str) -> None:
    """Raises ValueError for a size too far from the known ones, which ascend."""
    if asked > REACH * known[-1] or asked * REACH < known[0]:
        raise ValueError(
            f"{what} lies more than {REACH:g} times off the costs, which go from {known[0]} to {known[-1]}: cost a "
            "grid that holds it with `jaxspec lab cost`"
        )


def _line(known_X: np.ndarray, value_X: np.ndarray, at_N: np.ndarray) -> np.ndarray:
    """Returns `[N, ...]`: values on the straight pieces between known points, which ascend; `value_X` is `[X, ...]`.

    Above the greatest point the last piece goes on, not below 0; under the least one its value holds.
    """
    if len(known_X) == 1:
        return np.repeat(value_X[:1], len(at_N), axis=0)
    high_N = np.clip(np.searchsorted(known_X, at_N), 1, len(known_X) - 1)
    below_N, above_N = known_X[high_N - 1], known_X[high_N]
    share_N = np.maximum((at_N - below_N) / (above_N - below_N), 0.0)
    share_N = share_N.reshape(-1, *[1] * (value_X.ndim - 1))
    return np.maximum(value_X[high_N - 1] + share_N * (value_X[high_N] - value_X[high_N - 1]), 0.0)


def describe(table: CostTable) -> dict[str, Any]:
    """Returns where the costs are from: source, device, models, dtype."""
    return {key: table.facts.get(key) for key in ("source", "device", "target", "drafter", "dtype", "mesh")}
