"""Acceptance by depth and rank, estimated from a profile: what draws the shapes that a search then replays."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from jaxspec.lab.forest import Forest, Path
from jaxspec.lab.profile import BEYOND, Profile

STRENGTH = 20.0
"""Starts that the prior of a cell counts for: Beta, centred on the rank's rate over all depths."""
Given = Literal["text", "kept"]
"""Starts that a depth's row is of: all whose text is long enough, or of those the ones whose ranks above are known,
so that a tree of all ranks would have kept their path down to there."""


@dataclasses.dataclass(frozen=True)
class AcceptanceTable:
    """Probabilities that the children of a kept node are accepted.

    The value of a path is the product along it; the sum of a tree's values, 1 for its root, is its tokens per round.
    """

    rate_DK: np.ndarray
    """`[d, r]`: that of the rank-`r` child of a node at depth `d`; the root has depth 0."""
    second_KK: np.ndarray | None = None
    """`[q, r]`: that of the rank-`r` child of the root's rank-`q` child, in the place of `rate_DK[1]`: a one-pass
    drafter does not know which child it drafts below. None where only depth and rank count."""

    @property
    def depth(self) -> int:
        """Levels of the table."""
        return len(self.rate_DK)

    def row(self, path: Path) -> np.ndarray:
        """Returns `[K]`: the rates of the children of a node."""
        if len(path) == 1 and self.second_KK is not None:
            return self.second_KK[path[0]]
        return self.rate_DK[len(path)]

    def values(self, forest: Forest) -> np.ndarray:
        """Returns `[U]`: the values of the forest's nodes."""
        edge_U = np.ones(len(forest.parent_U))
        drafted = forest.depth_U > 0
        edge_U[drafted] = self.rate_DK[forest.depth_U[drafted] - 1, forest.rank_U[drafted]]
        if self.second_KK is not None:
            second = forest.depth_U == 2
            edge_U[second] = self.second_KK[forest.rank_U[forest.parent_U[second]], forest.rank_U[second]]
        value_U = edge_U.copy()
        for depth in range(1, int(forest.depth_U.max(initial=0)) + 1):
            level = forest.depth_U == depth
            value_U[level] = value_U[forest.parent_U[level]] * edge_U[level]
        return value_U

    def cut(self, depth: int, ranks: int | None = None) -> AcceptanceTable:
        """Returns the table of the first depths and ranks."""
        second = None if self.second_KK is None or depth < 2 else self.second_KK[:ranks, :ranks]
        return AcceptanceTable(self.rate_DK[:depth, :ranks], second)

    def scaled(self, factor: float) -> AcceptanceTable:
        """Returns the table with all rates times `factor`, but no row above 1 in all."""
        return AcceptanceTable(
            _scaled(self.rate_DK, factor), None if self.second_KK is None else _scaled(self.second_KK, factor)
        )


def _scaled(rate_DK: np.ndarray, factor: float) -> np.ndarray:
    whole_D1 = rate_DK.sum(-1, keepdims=True)
    most_D1 = np.divide(1.0, whole_D1, out=np.full_like(whole_D1, np.inf), where=whole_D1 > 0)
    return rate_DK * np.minimum(factor, np.maximum(most_D1, 1.0))


def acceptance_table(
    profile: Profile,
    *,
    starts: np.ndarray | None = None,
    given: Given = "text",
    strength: float = STRENGTH,
    monotone: bool = True,
    by_parent: bool | None = None,
) -> AcceptanceTable:
    """Returns the rates along the texts of a profile.

    A cell is `(hits + strength * prior) / (starts + strength)`; its prior is the rank's rate over all depths.
    `monotone` pools ranks that stand in the wrong order, so that rates do not rise with the rank. `starts` are those
    counted (default: all; those where rounds begin make it a table by round). `by_parent` fits depth 2 by the parent's
    rank (default: for one-pass drafters). Hits of depth 1 are the target's probabilities where the profile has them,
    which have the same mean: a start is chosen by the text before it. The mean is over positions: a replay is what
    rounds see.
    """
    at = slice(None) if starts is None else starts
    rank_TD = profile.rank_TD[at]
    hits_DK, starts_D = _count(rank_TD, profile.ranks, given)
    if profile.p_TK is not None:
        hits_DK[0] = profile.p_TK[at].sum(0, dtype=np.float64)
    prior_K = hits_DK.sum(0) / max(starts_D.sum(), 1)
    rate_DK = _shrunk(hits_DK, starts_D, prior_K, strength, monotone)
    if by_parent is None:
        by_parent = bool(profile.facts.get("one_pass"))
    if not by_parent or len(rate_DK) < 2:
        return AcceptanceTable(rate_DK)
    known_T = (rank_TD[:, 1] != BEYOND) & (rank_TD[:, 0] >= 0)
    above_T, below_T = rank_TD[known_T, 0].astype(int), rank_TD[known_T, 1].astype(int)
    hit_T = below_T >= 0
    hits_KK = np.zeros((profile.ranks, profile.ranks))
    np.add.at(hits_KK, (above_T[hit_T], below_T[hit_T]), 1.0)
    starts_K = np.bincount(above_T, minlength=profile.ranks)
    return AcceptanceTable(rate_DK, _shrunk(hits_KK, starts_K, rate_DK[1], strength, monotone))


def _count(rank_TD: np.ndarray, ranks: int, given: Given) -> tuple[np.ndarray, np.ndarray]:
    """Returns hits by depth and rank, and starts by depth."""
    depths = rank_TD.shape[1]
    hits_DK, starts_D = np.zeros((depths, ranks)), np.zeros(depths)
    kept_T = np.ones(len(rank_TD), bool)
    for depth in range(depths):
        rank_T = rank_TD[:, depth]
        counted_T = (rank_T != BEYOND) & kept_T
        starts_D[depth] = counted_T.sum()
        hits_DK[depth] = np.bincount(rank_T[counted_T & (rank_T >= 0)], minlength=ranks)[:ranks]
        if given == "kept":
            kept_T &= rank_T >= 0
    return hits_DK, starts_D


def _shrunk(
    hits_DK: np.ndarray, starts_D: np.ndarray, prior_K: np.ndarray, strength: float, monotone: bool
) -> np.ndarray:
    """Returns the cells' posterior means, in order of rank where asked."""
    weight_D1 = starts_D[:, None] + strength
    rate_DK = np.divide(hits_DK + strength * prior_K, weight_D1, out=np.zeros_like(hits_DK), where=weight_D1 > 0)
    return np.array([pool_violators(row_K) for row_K in rate_DK]) if monotone else rate_DK


def pool_violators(rate_K: np.ndarray) -> np.ndarray:
    """Returns the nearest rates, in the mean of squares, that do not rise with the rank; sums stay.

    Pool adjacent violators: neighbours in the wrong order become their mean until none is left.
    """
    means: list[float] = []
    sizes: list[int] = []
    for rate in rate_K:
        mean, size = float(rate), 1
        while means and means[-1] < mean:
            before, count = means.pop(), sizes.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        means.append(mean)
        sizes.append(size)
    return np.repeat(means, sizes)


def product_gap(profile: Profile) -> float:
    """Returns the total variation between the ranks of two depths and the product of their marginals, from 0 to 1.

    For a one-pass drafter it is how far the tree's second level is from what its marginals say. NaN where no text is
    two tokens long.
    """
    if profile.rank_TD.shape[1] < 2:
        return float("nan")
    pair_T2 = profile.rank_TD[profile.rank_TD[:, 1] != BEYOND, :2].astype(int)
    if not len(pair_T2):
        return float("nan")
    joint = np.zeros((profile.ranks + 1,) * 2)
    np.add.at(joint, (pair_T2[:, 0], pair_T2[:, 1]), 1 / len(pair_T2))  # MISSED, -1, is the last row and column
    return float(0.5 * np.abs(joint - joint.sum(1, keepdims=True) * joint.sum(0)).sum())
