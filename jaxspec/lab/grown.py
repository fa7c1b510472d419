"""Replay of trees that are grown anew each round, for drafters of one pass.

A one-pass drafter drafts every depth behind the root, whatever stands between. So the log-probabilities that a profile
holds of a start are those of the whole tree there, and the tree's own `grow` is run on them, with ranks for tokens: it
breaks ties as in decoding. A round accepts the longest prefix of the text's ranks that is a path of its tree.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Array, Children, Frontier
from jaxspec.evaluation.statistics import Counts
from jaxspec.lab.forest import make_forest, shape_of
from jaxspec.lab.profile import Profile
from jaxspec.lab.replay import check_replayable, count_rounds, replay, walk_rounds
from jaxspec.trees import BestFirstTree, DynamicTree, StaticTree, parse_tree

GrownTree = BestFirstTree | DynamicTree
"""Trees that are a function of the draft."""
ReplayedTree = StaticTree | GrownTree
"""Trees that replay on a profile."""
STARTS_AT_ONCE = 1024
"""Most starts whose trees are grown side by side."""
CELLS = 1 << 22
"""Most children of one level, of all these trees together."""


def replayed_tree(spec: str) -> ReplayedTree:
    """Returns the tree of a command line, without padding. Raises ValueError for an adaptive one."""
    tree = parse_tree(spec)
    if isinstance(tree, StaticTree):
        return StaticTree(shape_of(tree.paths))
    if isinstance(tree, GrownTree):
        return tree
    raise ValueError(
        f"tree {spec} is adaptive, so its rounds depend on seconds and on those before, and is not replayed: "
        "measure it with `jaxspec bench decode --tree`"
    )


def check_grown(profile: Profile) -> None:
    """Raises ValueError for a profile on which no grown tree can be replayed."""
    check_replayable(profile)
    if profile.facts.get("kind") == "simulated":
        raise ValueError(
            "the profile's texts are drawn from rates, which do not say what the draft is at a place, and trees that "
            "are grown anew each round depend on that: replay static trees, or profile a drafter"
        )
    if not profile.facts.get("one_pass"):
        raise ValueError(
            "the drafter drafts a level at a time, and a profile does not hold its probabilities off the text, on "
            "which a tree that is grown anew each round depends: replay static trees, or decode with the tree by "
            "`jaxspec bench decode --tree`"
        )
    if not profile.top_TDK.size or profile.top_TDK.dtype != np.float32:
        raise ValueError(
            "the profile is of an earlier version and holds draft probabilities that are rounded, in which paths tie: "
            "make it anew with `jaxspec lab profile`"
        )


def growable(profile: Profile) -> bool:
    """Returns whether grown trees can be replayed on a profile."""
    try:
        check_grown(profile)
    except ValueError:
        return False
    return True


def width_of(tree: GrownTree) -> int:
    """Returns the most children of a node."""
    return tree.width if isinstance(tree, BestFirstTree) else tree.beam


def sizes_of(tree: ReplayedTree) -> tuple[np.ndarray, np.ndarray]:
    """Returns nodes `[1]` and widths of the draft's levels `[1, D]`, as `Forest` has them, for the costs of a round."""
    if isinstance(tree, StaticTree):
        forest = make_forest([tree.paths])
        return forest.nodes_S, forest.width_SD
    levels = tree.depth - 1
    return np.array([tree.nodes]), np.full((1, levels), tree.slots // max(levels, 1))


def text_nodes(profile: Profile, tree: GrownTree) -> np.ndarray:
    """Returns `[T, D]`, int32: the node of each start's tree at which the text's first `d + 1` tokens end, 0 for none.

    Raises ValueError for a profile that does not hold what the tree depends on.
    """
    check_grown(profile)
    depths, width = profile.rank_TD.shape[1], width_of(tree)
    if tree.depth > depths or width > profile.ranks:
        raise ValueError(
            f"the tree {tree.spec} is {tree.depth} deep with {width} children a node, and cannot be replayed on a "
            f"profile of {depths} depths and {profile.ranks} ranks: make one with more --depth and --ranks"
        )
    rows = min(STARTS_AT_ONCE, max(1, CELLS // (width * max(tree.nodes, width))))
    starts = len(profile.rank_TD)
    logp_TDK, rank_TD = profile.top_TDK[:, : tree.depth, :width], profile.rank_TD[:, : tree.depth]
    found_TD = np.zeros((starts, tree.depth), np.int32)
    for first in range(0, starts, rows):
        last = min(first + rows, starts)
        # Rows are filled up to one size, so that one program is compiled.
        at = np.minimum(np.arange(first, first + rows), starts - 1)
        found_TD[first:last] = np.asarray(_text_nodes(tree, logp_TDK[at], rank_TD[at]))[: last - first]
    return found_TD


@functools.partial(jax.jit, static_argnames="tree")
def _text_nodes(tree: GrownTree, logp_BDK: Array, rank_BD: Array) -> Array:
    """Grows the trees of some starts on the profile's log-probabilities, then follows the text's ranks in them."""

    def draft(scratch: Any, frontier: Frontier) -> tuple[Array, Any]:
        logp_B1K = logp_BDK[:, frontier.depth, None]
        return jnp.broadcast_to(logp_B1K, (*frontier.token_BW.shape, logp_B1K.shape[-1])), scratch

    def choose(logp_BWK: Array, count: int, _: int) -> Children:
        logp_BWR = logp_BWK[..., :count]
        return Children(jnp.broadcast_to(jnp.arange(count), logp_BWR.shape), logp_BWR, logp_BWR)

    root_B = jnp.zeros(len(rank_BD), jnp.int32)
    grown = tree.grow(draft, choose, None, logp_BDK[:, 0], root_B)
    node_B, alive_B, found = root_B, jnp.ones(len(root_B), bool), []
    for rank_B in rank_BD.astype(jnp.int32).T:
        on_BN = grown.valid_BN & (grown.parent_BN == node_B[:, None]) & (grown.token_BN == rank_B[:, None])
        alive_B &= jnp.any(on_BN, axis=1)
        node_B = jnp.where(alive_B, jnp.argmax(on_BN, axis=1), 0)
        found.append(node_B)
    return jnp.stack(found, axis=1)


def replay_tree(profile: Profile, tree: ReplayedTree) -> Counts:
    """Returns tokens, target calls and accept histogram of each prompt, as decoding by any such tree would count them.

    A grown tree needs a one-pass drafter's profile. Its replay is exact but for ties that lie within the rounding of
    two fp32 programs. Raises ValueError as `replay` and `text_nodes`.
    """
    if isinstance(tree, StaticTree):
        return replay(profile, tree.paths)
    length_T = np.count_nonzero(text_nodes(profile, tree), axis=1)
    at = walk_rounds(profile, length_T)
    return count_rounds(profile, at, length_T[at], tree.depth)
