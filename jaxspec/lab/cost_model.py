"""The cost of a round as a function of the tree, from a table of costs at some sizes.

The products of a call are padded to steps of rows, nodes times batch (`row_steps`): within a step a time holds, and
between the ends of two steps of the table it is the straight line. No line is fitted through more than two. In the
batch a time goes by the padded rows too, in the context by its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.lab.costs import PARTS, CostRow, CostTable
from jaxspec.lab.row_steps import RowSteps, steps_of

REACH = 2.0
"""Most that a size may lie above the greatest of the table, or below its least, as a factor."""
DEEPEST = 127
"""Levels of the deepest tree."""


@dataclasses.dataclass(frozen=True)
class RoundCost:
    """Seconds of the parts of a round for one batch and context."""

    batch: int
    context: int
    plain: float
    """A round of plain decoding."""
    verify_N: np.ndarray
    """The target's call on `n` nodes a row; 0 is unused."""
    level_W: np.ndarray
    """A draft level that expands `w` nodes a row; 0 for none."""
    extend_P: np.ndarray
    """The drafter's `extend` of an accepted path of `p` nodes, which also drafts the root's children; 0 is unused."""
    rest: float
    """Commit and loop."""
    one_pass: bool = False
    """Whether a drafter of one pass pays its first level alone."""

    @property
    def most_nodes(self) -> int:
        """Nodes of the largest tree whose cost is known."""
        return len(self.verify_N) - 1

    def known(self, nodes_S: np.ndarray, width_SD: np.ndarray) -> np.ndarray:
        """Returns `[S]`: whether the costs of trees with these nodes and widths of levels are known."""
        widest_S = width_SD.max(1, initial=0)
        deep_S = paths_of(nodes_S, width_SD) < len(self.extend_P)
        return (nodes_S == 1) | ((nodes_S <= self.most_nodes) & (widest_S < len(self.level_W)) & deep_S)

    def round_seconds(self, nodes_S: np.ndarray, width_SD: np.ndarray) -> np.ndarray:
        """Returns `[S]`: seconds of a round of trees with these nodes, root included, and widths of levels.

        A tree of one node is plain decoding. Raises ValueError for sizes beyond the cost's.
        """
        if not self.known(nodes_S, width_SD).all():
            worst = int(np.flatnonzero(~self.known(nodes_S, width_SD))[0])
            raise ValueError(
                f"the cost of a tree of {nodes_S[worst]} nodes whose levels expand {width_SD[worst].tolist()} is not "
                f"known: costs go to {self.most_nodes} nodes, levels of {len(self.level_W) - 1} and paths of "
                f"{len(self.extend_P) - 1} nodes"
            )
        level_SD = self.level_W[width_SD[:, :1] if self.one_pass else width_SD]
        extend_S = self.extend_P[paths_of(nodes_S, width_SD)]
        drafted_S = self.verify_N[nodes_S] + level_SD.sum(1) + extend_S + self.rest
        return np.where(nodes_S == 1, self.plain, drafted_S)

    def scaled(self, *, draft: float = 1.0, target: float = 1.0, other: float = 1.0) -> RoundCost:
        """Returns the cost with parts times these factors.

        Levels and `extend` are the draft's; verification and plain decoding the target's; the rest is the other.
        """
        return dataclasses.replace(
            self,
            plain=self.plain * target,
            verify_N=self.verify_N * target,
            level_W=self.level_W * draft,
            extend_P=self.extend_P * draft,
            rest=self.rest * other,
        )


def paths_of(nodes_S: np.ndarray, width_SD: np.ndarray) -> np.ndarray:
    """Returns `[S]`: nodes of each tree's longest path, root included: every level above the deepest expands nodes."""
    return np.where(nodes_S == 1, 1, 2 + (width_SD > 0).sum(1))


class At(NamedTuple):
    """The place that a cost is asked at, and the steps of rows there."""

    batch: int
    context: int
    steps: RowSteps


def round_cost(table: CostTable, batch: int, context: int, *, one_pass: bool | None = None) -> RoundCost:
    """Returns the cost of rounds at a batch and context, for trees up to the largest verification of the table.

    Levels of the draft, and paths, go as far as a table reaches beyond its own. A table whose facts have no
    `row_steps` has the known ones of its device. Rows of context 0 are of any. Plain decoding is the cheapest that the
    table has: padded to more rows of a call it may be cheaper. Draft levels may be missing for a `one_pass` drafter
    (default: as the table's facts say): they are part of `extend` then. Raises ValueError for a batch or context more
    than `REACH` times off the table, and for parts that are missing.
    """
    if len({(row.source, row.device) for row in table.rows}) > 1:
        raise ValueError("the costs are of several devices or sources: keep the rows of one in a file")
    parts = {part: [row for row in table.rows if row.part == part] for part in PARTS}
    one_pass = bool(table.facts.get("one_pass")) if one_pass is None else one_pass
    for part in ("verify",) if one_pass else ("verify", "draft"):
        if not parts[part]:
            raise ValueError(f"the costs have no rows of the part {part}: make them anew with `jaxspec lab cost`")
    at = At(batch, context, steps_of(table.facts, table.rows[0].source, table.rows[0].device))
    verify_N = _seconds(parts["verify"], at, np.maximum(np.arange(greatest(table, "verify") + 1), 1))
    level_W = np.zeros(int(REACH * greatest(table, "draft") or greatest(table, "verify")) + 1)
    if parts["draft"]:
        level_W[1:] = _seconds(parts["draft"], at, np.arange(1, len(level_W)))
    extend_P = np.zeros(int(REACH * greatest(table, "extend")) + 1)
    if len({row.nodes for row in parts["extend"]}) < 2:
        extend_P = np.zeros(DEEPEST + 2)  # any path
    if parts["extend"]:
        extend_P[1:] = _seconds(parts["extend"], at, np.arange(1, len(extend_P)))
    rest = float(_seconds(parts["rest"], at, np.ones(1, int))[0]) if parts["rest"] else 0.0
    plain = [float(_seconds(rows, at, np.array([n]))[0]) for n, rows in _groups(parts["plain"], "nodes")]
    # Without rows of its own, plain decoding is the target's call on one node and the rest.
    plain_seconds = min(plain, default=float(verify_N[1]) + rest)
    return RoundCost(batch, context, plain_seconds, verify_N, level_W, extend_P, rest, one_pass)


def greatest(table: CostTable, part: str) -> int:
    """Returns the greatest number of nodes that a table has of a part, of a level for `draft`; 0 for a missing part."""
    return max((_size(row) for row in table.rows if row.part == part), default=0)


def grid(table: CostTable) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the batches and the contexts at which a table has verification."""
    rows = [row for row in table.rows if row.part == "verify"]
    return tuple(sorted({row.batch for row in rows})), tuple(sorted({row.context for row in rows}))


def _size(row: CostRow) -> int:
    return row.width if row.part == "draft" else row.nodes


def _seconds(rows: Sequence[CostRow], at: At, size_N: np.ndarray) -> np.ndarray:
    """Returns the seconds of a part, of which `rows` are, at these sizes: by context, then by size, then by batch.

    A part of one size does not depend on it.
    """
    part = rows[0].part
    by_batch = {}
    for batch, mine in _groups(rows, "batch"):
        groups = _groups(mine, "width" if part == "draft" else "nodes")
        by_size = {n: _at_context(same, at.context, part) for n, same in groups}
        by_batch[batch] = _by_steps(by_size, at.steps, batch, size_N)
    batches = np.array([*by_batch])
    if len(batches) == 1 and at.batch != batches[0]:
        raise ValueError(f"the costs of the part {part} are of batch {batches[0]} alone, not {at.batch}: cost that too")
    _check_reach(batches, at.batch, f"a batch of {at.batch}")
    return _at_batch(batches, np.array([*by_batch.values()]), at, size_N)


def _at_batch(known_X: np.ndarray, seconds_XN: np.ndarray, at: At, size_N: np.ndarray) -> np.ndarray:
    """Returns the seconds of these sizes at a batch, by padded rows between those of the two known batches around it.

    Above the greatest batch the last piece goes on, under the least one its seconds hold.
    """
    if len(known_X) == 1:
        return seconds_XN[0]
    high = int(np.clip(np.searchsorted(known_X, at.batch), 1, len(known_X) - 1))
    batch, below, above = max(at.batch, known_X[0]), known_X[high - 1], known_X[high]
    row_N, below_N, above_N = (at.steps.padded(size_N * b) for b in (batch, below, above))
    share_N = (row_N - below_N) / np.maximum(above_N - below_N, 1)
    # Batches of one step differ by their caches alone.
    share_N = np.where(above_N > below_N, share_N, (batch - below) / (above - below))
    return np.maximum(seconds_XN[high - 1] + share_N * (seconds_XN[high] - seconds_XN[high - 1]), 0.0)


def _by_steps(by_size: dict[int, float], steps: RowSteps, batch: int, at_N: np.ndarray) -> np.ndarray:
    """Returns the seconds at these sizes from those of known ones, which ascend.

    In a step that has a known size: the line between its known sizes, which holds beyond them. Else the line between
    the ends of the next steps that have one.
    """
    size_X, value_X = np.array([*by_size]), np.array([*by_size.values()])
    step_X, step_N = steps.padded(size_X * batch), steps.padded(at_N * batch)
    last_X = np.append(step_X[1:] != step_X[:-1], True)
    found_N = _line(step_X[last_X], value_X[last_X], step_N)
    for step in np.unique(step_X):
        in_step = step_X == step
        found_N = np.where(step_N == step, np.interp(at_N, size_X[in_step], value_X[in_step]), found_N)
    return found_N


def _at_context(rows: Sequence[CostRow], context: int, part: str) -> float:
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
