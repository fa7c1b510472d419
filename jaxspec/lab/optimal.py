"""Optimal tree shapes for a table of acceptance: the dynamic program, the heap and the beam.

| method | is optimal for |
|---|---|
| `solve` | any table by depth and rank, a number of nodes, a depth and a branch limit |
| `heap` | tables whose rows do not rise with the rank, by the parent's rank too; one run serves every number of nodes |
| `beam` | such tables with at most `width` nodes expanded a level |

The dynamic program is Sequoia's problem (arXiv 2402.12374) in a form of two tables. The heap is best-first search. The
beam is EAGLE-2's expansion and rerank (arXiv 2406.16858) with the table in the draft's place.
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np

from jaxspec.lab.acceptance import AcceptanceTable
from jaxspec.lab.forest import Path, Shape, shape_of


@dataclasses.dataclass(frozen=True)
class Solution:
    """The best trees of every number of nodes up to a limit `M`."""

    value_M: np.ndarray
    """Expected tokens per round of the best tree of `m` nodes; -inf where no tree of that size fits. 0 is unused."""
    branch_DM: np.ndarray
    """Ranks that the best subtree of `m` nodes at depth `d` may use."""
    split_DKM: np.ndarray
    """Nodes that its rank-`k` child gets, of `m` left for ranks up to `k`; 0: none."""

    def shape(self, nodes: int) -> Shape:
        """Returns the best tree of so many nodes, root included. Raises ValueError where none fits."""
        if not 1 <= nodes < len(self.value_M) or self.value_M[nodes] == -np.inf:
            deep, ranks = self.split_DKM.shape[:2]
            raise ValueError(f"no tree {deep} deep of {ranks} children a node has {nodes} nodes: ask for fewer")
        found: list[Path] = []
        left: list[tuple[Path, int]] = [((), nodes)]
        while left:
            path, size = left.pop()
            found.append(path)
            rank = int(self.branch_DM[len(path), size]) if size > 1 else 0
            while rank > 0:
                share = int(self.split_DKM[len(path), rank - 1, size])
                if share:
                    left.append(((*path, rank - 1), share))
                rank, size = rank - 1, size - share
        return shape_of(found)


def solve(rate_DK: np.ndarray, nodes: int, *, skip: bool = False) -> Solution:
    """Returns the best trees of 1 to `nodes` nodes for rates by depth and rank, in any order of rank.

    `best[d][m]` are the tokens of a subtree at depth `d` with exactly `m` nodes, `fan` those with children of the first
    ranks only. Drawn children are tried in turn, so a child needs those before it; the likeliest tokens may `skip`
    ranks. O(D K M^2).
    """
    rate_DK = np.asarray(rate_DK, np.float64)
    depths, ranks = rate_DK.shape
    size = np.arange(nodes + 1)
    # m nodes in all, s of them below the newest child, m - s for the root and the ranks before it.
    rest_MS = size[:, None] - size[None, :]
    possible_MS = (rest_MS >= 1) & (size[None, :] >= 1)
    best_M = np.where(size == 1, 1.0, -np.inf)
    branch_DM = np.zeros((depths, nodes + 1), np.int32)
    split_DKM = np.zeros((depths, ranks, nodes + 1), np.int32)
    for depth in reversed(range(depths)):
        fan_M = np.where(size == 1, 1.0, -np.inf)
        found_M = fan_M.copy()
        for rank in range(ranks):
            # A product with -inf: a subtree that does not exist, whatever the rate.
            below_M = np.where(best_M == -np.inf, -np.inf, rate_DK[depth, rank] * np.where(best_M > 0, best_M, 0))
            total_MS = np.where(possible_MS, fan_M[np.maximum(rest_MS, 0)] + below_M, -np.inf)
            split_M = total_MS.argmax(1)
            with_M = total_MS[size, split_M]
            if skip:
                split_M = np.where(with_M > fan_M, split_M, 0)
                with_M = np.maximum(with_M, fan_M)
            split_DKM[depth, rank], fan_M = split_M, with_M
            better_M = fan_M > found_M
            branch_DM[depth][better_M] = rank + 1
            found_M = np.where(better_M, fan_M, found_M)
        best_M = found_M
    return Solution(best_M, branch_DM, split_DKM)


def heap(table: AcceptanceTable, nodes: int, depth: int | None = None) -> list[tuple[Path, float]]:
    """Returns up to `nodes` paths with their values, the likeliest first; every beginning of the list is a tree.

    The root comes first. It pops the likeliest path and pushes its next sibling and its first child; of equal ones the
    shallower comes first, then the one of lower ranks. Fewer paths come back where depth and ranks hold no more.
    """
    depth = table.depth if depth is None else min(depth, table.depth)
    queue: list[tuple[float, int, Path, float]] = [(-1.0, 0, (), 1.0)]
    found: list[tuple[Path, float]] = []
    while queue and len(found) < nodes:
        minus, _, path, above = heapq.heappop(queue)
        found.append((path, -minus))
        if path:
            row_K = table.row(path[:-1])
            if path[-1] + 1 < len(row_K):
                sibling = (*path[:-1], path[-1] + 1)
                heapq.heappush(queue, (-above * float(row_K[path[-1] + 1]), len(path), sibling, above))
        if len(path) < depth and len(row_K := table.row(path)):
            heapq.heappush(queue, (minus * float(row_K[0]), len(path) + 1, (*path, 0), -minus))
    return found


def beam(table: AcceptanceTable, nodes: int, width: int, depth: int | None = None) -> list[tuple[Path, float]]:
    """Returns up to `nodes` paths with their values, the likeliest first, no more than `width` expanded a level.

    The `width` likeliest nodes of a level get all their children; then the likeliest of all are kept. Every beginning
    of the list is a tree. The root is expanded whatever the width.
    """
    depth = table.depth if depth is None else min(depth, table.depth)
    seen: list[tuple[Path, float]] = [((), 1.0)]
    front = list(seen)
    for _ in range(depth):
        made = [((*p, rank), v * float(rate)) for p, v in front for rank, rate in enumerate(table.row(p))]
        made.sort(key=lambda node: (-node[1], node[0]))
        seen += made
        front = made[:width]
    seen.sort(key=lambda node: (-node[1], len(node[0]), node[0]))
    return seen[:nodes]


def expected_tokens(table: AcceptanceTable, shape: Shape) -> float:
    """Returns the sum of the values of a tree's nodes, the root's 1 included: the table's tokens per round."""
    return 1.0 + sum(path_value(table, path) for path in shape)


def path_value(table: AcceptanceTable, path: Path) -> float:
    """Returns the probability that a path is accepted: the product of its rates."""
    value = 1.0
    for depth, rank in enumerate(path):
        value *= float(table.row(path[:depth])[rank])
    return value


def edge_sensitivity(table: AcceptanceTable, shape: Shape) -> np.ndarray:
    """Returns `[D, K]`: the derivative of a tree's expected tokens by each rate of a table by depth and rank.

    Exactly `sum of value(path) / rate` over the nodes whose path uses the edge; taken without the division, so that
    rates of 0 have theirs. Raises ValueError for a table by the parent's rank.
    """
    if table.second_KK is not None:
        raise ValueError("the sensitivity is that of a table by depth and rank: leave out the rates by parent")
    slope_DK = np.zeros_like(table.rate_DK)
    for path in shape:
        rates = [float(table.rate_DK[depth, rank]) for depth, rank in enumerate(path)]
        for depth, rank in enumerate(path):
            slope_DK[depth, rank] += np.prod(rates[:depth] + rates[depth + 1 :])
    return slope_DK
