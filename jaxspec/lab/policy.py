"""Adaptive trees made from a profile and costs: what `trees.adaptive` needs to decide in a round what pays."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxspec.lab.cost_model import RoundCost
from jaxspec.lab.profile import BEYOND, Profile
from jaxspec.lab.search import Choice
from jaxspec.trees import AdaptiveTree, DynamicTree
from jaxspec.trees.lookup import LookupBranch

DEEPER, DEEPEST_AT_LEAST, BEAM_AT_LEAST = 2, 4, 2
"""Levels that an adaptive tree may draft beyond the best fixed one, and the least depth and beam: it stops by itself
where they do not pay, and where no fixed tree pays, some places do."""
POINTS = 33
"""Points of a calibration curve in the decode program."""


def adaptive_tree(
    profile: Profile,
    cost: RoundCost,
    choice: Choice,
    *,
    most_nodes: int,
    lookup: int | None = None,
    ragged: bool = False,
) -> AdaptiveTree:
    """Returns the adaptive tree around the best fixed one, or its runner-up where that is plain decoding.

    Its beam is the widest level of that tree, a node's children at least, and it may go `DEEPER`. Budgets are 1, 2, 4
    and so on up to `most_nodes` nodes, shared out among the rows with `ragged`. With `lookup` it has a looked-up branch
    of so many tokens. Raises ValueError where the costs do not know its sizes.
    """
    known = min(most_nodes, cost.most_nodes)
    shape = choice.chosen.shape or (choice.runner_up.shape if choice.runner_up else ())
    branches = max((max(path) + 1 for path in shape), default=1)
    widest = max(np.bincount([len(path) for path in shape] or [0]).tolist())
    beam = min(max(branches, widest, BEAM_AT_LEAST), profile.ranks)
    depth = min(max(max(map(len, shape), default=0) + DEEPER, DEEPEST_AT_LEAST), profile.rank_TD.shape[1])
    # The path that is read is the deepest there may be, whatever was accepted.
    deepest = max(depth, lookup or 0)
    if deepest + 1 >= len(cost.extend_P) or beam >= len(cost.level_W):
        raise ValueError(
            f"the costs go to paths of {len(cost.extend_P) - 1} nodes and levels of {len(cost.level_W) - 1}, and the "
            f"adaptive tree has {deepest + 1} and {beam}: make them with `jaxspec lab cost` and larger --paths, such "
            f"as 2,4,8,{deepest + 1}, and --widths"
        )
    drafted = beam + (depth - 1) * beam**2 + (lookup or 0)
    budgets = tuple(n for n in (2**i for i in range(known.bit_length())) if n <= min(known, 1 + drafted))
    return AdaptiveTree(
        DynamicTree(min(budgets[-1], 1 + beam + (depth - 1) * beam**2), depth, beam),
        budgets,
        tuple(float(cost.verify_N[n]) for n in budgets),
        level_seconds=0.0 if cost.one_pass else float(cost.level_W[beam]),
        fixed_seconds=float(cost.extend_P[deepest + 1]) + cost.rest,
        rate=choice.chosen.tokens_per_second.value / cost.batch,
        calibration=tuple(_curve(depth) for depth in profile.facts.get("calibration") or ()),
        reach=reach(profile, beam),
        lookup=None if lookup is None else LookupBranch(lookup),
        ragged=ragged,
    )


def reach(profile: Profile, beam: int) -> tuple[float, ...]:
    """Returns for each depth the share of places whose text token is among the `beam` likeliest children there."""
    there_TD = profile.rank_TD != BEYOND
    hit_TD = (profile.rank_TD >= 0) & (profile.rank_TD < beam)
    counts_D = there_TD.sum(0)
    return tuple((hit_TD.sum(0) / np.maximum(counts_D, 1)).tolist())


def _curve(fields: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns a stored calibration curve at few points, the ends included."""
    q_X, p_X = np.asarray(fields["q"]), np.asarray(fields["p"])
    at = np.unique(np.linspace(0, len(q_X) - 1, POINTS).round().astype(int))
    return tuple(q_X[at].tolist()), tuple(p_X[at].tolist())
