"""Best-first trees of all sizes for a one-pass drafter, replayed on a profile: candidates beside the static shapes.

The likeliest nodes of a depth are nested: those of a tree of `n` nodes are the first `n` of the largest tree. So one
tree is grown a start and depth, and the node at which the text leaves it says what every smaller tree accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxspec.lab.candidates import Limits, rates_at
from jaxspec.lab.cost_model import RoundCost
from jaxspec.lab.grown import sizes_of, text_nodes
from jaxspec.lab.profile import Profile
from jaxspec.lab.replay import tokens_of, walk_calls
from jaxspec.trees import BestFirstTree


class BestFirstGrid(NamedTuple):
    """Best-first trees of every depth and number of nodes, with their target calls on some prompts."""

    trees: tuple[BestFirstTree, ...]
    calls_SP: np.ndarray
    tokens_P: np.ndarray

    def rates(self, cost: RoundCost, limits: Limits) -> np.ndarray:
        """Returns `[S]`: tokens per second of all rows together; 0 where limits or costs leave a tree out."""
        nodes_S = np.array([tree.nodes for tree in self.trees])
        width_SD = np.zeros((len(self.trees), max((tree.depth for tree in self.trees), default=1) - 1), np.int64)
        for width_D, tree in zip(width_SD, self.trees, strict=True):
            width_D[: tree.depth - 1] = sizes_of(tree)[1][0]
        tau_S = self.tokens_P.sum() / self.calls_SP.sum(1)
        return rates_at(cost, limits, tau_S, (nodes_S, width_SD))


def find_best_first(profile: Profile, costs: Sequence[RoundCost], limits: Limits) -> BestFirstGrid:
    """Returns the best-first trees within the limits, replayed on a profile. Raises ValueError as `text_nodes`."""
    most = min(limits.nodes, max(limits.allow(cost) for cost in costs))
    width = min(limits.branch or profile.ranks, profile.ranks, max(most - 1, 1))
    trees: list[BestFirstTree] = []
    calls = [np.zeros((0, len(profile.sources)), np.int32)]
    for depth in range(1, min(limits.depth, profile.rank_TD.shape[1]) + 1):
        nodes = min(most, 1 + sum(width**d for d in range(1, depth + 1)))
        sizes = [n for n in range(2, nodes + 1) if n % limits.multiple == 0]
        if not sizes:
            continue
        node_TD = text_nodes(profile, BestFirstTree(sizes[-1], depth, width))
        lengths = [np.count_nonzero((node_TD > 0) & (node_TD < n), axis=1).astype(np.int8) for n in sizes]
        # A child of rank r comes behind r siblings, so a tree of n nodes has no rank above n - 2.
        trees += [BestFirstTree(n, depth, min(width, n - 1)) for n in sizes]
        calls.append(walk_calls(profile, np.array(lengths)))
    return BestFirstGrid(tuple(trees), np.concatenate(calls), tokens_of(profile))
